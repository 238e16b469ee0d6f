"""Load a run file and overrides into a RunConfig, strictly.

Later wins: the defaults of the dataclasses, the regularisers of the algorithm, the settings of the model, those of the
model under this algorithm and with this reward, the recipe, the run file, the overrides. All mistakes are collected and
reported together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from alignkit.config import schema, toml
from alignkit.config.bundles import find_bundle
from alignkit.config.recipes import NONE, Recipe, read_recipe
from alignkit.config.sections import (
    PLAIN,
    PLUGINS,
    TOP,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    PluginConfig,
    RegulariserConfig,
    RewardConfig,
    RunConfig,
    SurrogateConfig,
    TrainConfig,
)
from alignkit.config.sources import LISTS, RESOLVED, Layer, Layers, RunFile, model_layer, nest
from alignkit.config.trust import texts
from alignkit.data.prompt_sets import prompt_file
from alignkit.errors import AlignkitError, ConfigError
from alignkit.files import path_fault
from alignkit.interfaces import ModelBundle
from alignkit.registry import Registry, default_registry, nearest, normalise

__all__ = [
    "DataConfig",
    "EvaluateConfig",
    "ModelConfig",
    "PluginConfig",
    "RegulariserConfig",
    "RewardConfig",
    "RunConfig",
    "SurrogateConfig",
    "TrainConfig",
    "find_bundle",
    "load",
    "to_toml",
]

DEFAULT_ALGORITHM = "lasro"
PATHS = {
    "data.prompts", "data.images", "data.pairs", "data.cache", "evaluate.prompts", "surrogate.init", "scoring.cache",
    "model.name", "model.teacher", "model.unet", "model.adapter", "model.config",
}  # fmt: skip

_ONE_MORE = "whose value is one more, as in diffusers: 1 is the conditional prediction"
RENAMED = {
    "data.pictures": "data.images",
    "data.broken": 'data.on_error, "raise" or "skip"',
    "scoring.broken": 'scoring.on_error, "raise" or "skip"',
    "model.guidance": f"model.guidance_scale, {_ONE_MORE}",
    "algorithm.w_min": f"guidance_scale_min, under regulariser.lcd for lasro, ddpo and pso, {_ONE_MORE}",
    "algorithm.w_max": f"guidance_scale_max, under regulariser.lcd for lasro, ddpo and pso, {_ONE_MORE}",
    "algorithm.ode_steps": "regulariser.lcd.ode_steps",
    "algorithm.dataset_weight": 'a table [[regulariser]] with name = "lcd" and weight = ...',
    "algorithm.gradient_draws": "algorithm.gradient_samples",
    "algorithm.distillation_weight": 'a table [[regulariser]] with name = "lcd" and weight = ...',
    "algorithm.reference_weight": 'a table [[regulariser]] with name = "reference" and weight = ...',
}
"""Keys of earlier versions, and their replacements."""


def load(
    path: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    registry: Registry | None = None,
    trust: bool = False,
) -> RunConfig:
    """Load the run that the run file at `path` (None: defaults alone) and `overrides` describe.

    Keys of `overrides` are dotted ("train.updates", "reward.clip_score.weight"); "reward" is a list of names or
    tables and replaces the list of the file; "recipe" is the name of a recipe, or "paper" for none. Without `trust`,
    the run refuses code from outside of installed distributions, and addresses for tokens, that the file alone names
    (`alignkit.config.trust`). Raises ConfigError with one line for each mistake.
    """
    registry = registry or default_registry()
    file = RunFile(Path(path)) if path else None
    changes = nest(overrides or {})
    trees = [file.tree if file else {}, changes]
    named = [m["name"] for t in trees if isinstance(m := t.get("model"), Mapping) and isinstance(m.get("name"), str)]
    model = named[-1] if named else ModelConfig().name
    local = file.resolve(model) if file else Path(model)
    if fault := path_fault(model) or path_fault(local):
        raise ConfigError(f"model.name: found {model[:60]!r}, which cannot be a path: {fault}")
    registered = any(row.kind == "model" for row in registry.named(model))
    bundle = find_bundle(model if registered or not local.is_dir() else str(local), registry)
    config = _Loader(registry, model, bundle, file, changes).run()
    return config if trust or file is None else replace(config, stated=frozenset(texts(changes)))


def to_toml(config: RunConfig) -> str:
    """Return the resolved run file: loading it, from any folder, gives an equal RunConfig."""
    tree = {key: getattr(config, key) for key in TOP} | {RESOLVED: True}
    tree |= {section: asdict(getattr(config, section)) for section in PLAIN}
    tree |= {"sampler": _table(config.sampler), "reward": [_table(reward) for reward in config.rewards]}
    tree |= {"surrogate": _table(config.surrogate)} if config.surrogate else {}
    tree |= {"algorithm": _table(config.algorithm)}
    return toml.format_file(tree | {"regulariser": [_table(regulariser) for regulariser in config.regularisers]})


def _table(plugin: PluginConfig) -> dict[str, Any]:
    table = asdict(plugin)
    return {"name": table.pop("name"), **{k: v for k, v in table.items() if k != "fields"}, **table["fields"]}


class _Loader:
    def __init__(
        self, registry: Registry, model: str, bundle: ModelBundle, file: RunFile | None, changes: dict[str, Any]
    ) -> None:
        self.registry, self.file = registry, file
        label = f"model {model}: "
        user = [Layer("", file.tree, file=file)] if file else []
        self.layers = Layers([model_layer(label, bundle.defaults), *user, Layer("", changes)], file)
        self.layers.check_shape()
        self.recipe = self._named_recipe()
        resolved = file is not None and file.resolved
        recipe = self._with_recipe(self.recipe) if self.recipe not in (None, *NONE) and not resolved else None
        self.algorithm = self.layers.name("algorithm") or DEFAULT_ALGORITHM
        wanted = self.layers.wanted("reward")
        only = f"{self.algorithm}/{wanted[0]}" if len(wanted) == 1 else ""
        default = bundle.recipes.get(only) or bundle.recipes.get(self.algorithm)
        if self.recipe is None and default and not resolved:
            recipe = self._with_recipe(default)
        suited: dict[str, Any] = dict(bundle.algorithm_defaults.get(self.algorithm, {}))
        suited["algorithm"] = {**suited.get("algorithm", {}), "name": self.algorithm}
        closely = bundle.algorithm_defaults.get(only, {})
        self.layers.layers[1:1] = [model_layer(label, suited), model_layer(label, closely)]
        self.layers.layers.insert(0, Layer(f"algorithm {self.algorithm}: ", self._own_regularisers(), ours=True))
        if recipe:
            recipe.check_fit(self.algorithm, model, bundle, self.layers.wanted("reward"), registry)

    def _named_recipe(self) -> str | None:
        """Return the recipe that the run file or an override names, by the last; None where neither has the key.

        A resolved run file holds the settings of its recipe, so that overrides change neither recipe nor algorithm."""
        if not any("recipe" in layer.tree for layer in self.layers):
            return None
        name = normalise(self._value("recipe", TOP["recipe"]) or "")
        if self.file and self.file.resolved:
            kept = normalise(str(self.file.tree.get("recipe", "")))
            algorithm = normalise(str(self.file.tree.get("algorithm", {}).get("name", "")))
            if name != kept:
                self.layers.problem("recipe", "", f"{self.file.path} holds every setting already; leave the recipe out")
            elif kept not in NONE and self.layers.name("algorithm") != algorithm:
                text = (
                    f"{self.file.path} holds the settings of recipe {kept}, which is for {algorithm}; take another file"
                )
                self.layers.problem("algorithm", "name", text)
            self.layers.raise_problems()
        return name

    def _with_recipe(self, name: str) -> Recipe:
        """Read a recipe and put its settings between those of the model and those of the user."""
        recipe = read_recipe(self.registry, name)
        self.recipe = recipe.name
        settings = {
            section: {key: self._resolve(section, key, value, recipe.file) for key, value in table.items()}
            if isinstance(table, Mapping)
            else table
            for section, table in recipe.settings.items()
        }
        self.layers.layers.insert(1, Layer("", settings, ours=True, file=recipe.file))
        return recipe

    def _own_regularisers(self) -> dict[str, Any]:
        """Return the regularisers of the algorithm, which are used if no layer lists others."""
        try:
            default: Mapping[str, float] = self.registry.get("algorithm", self.algorithm).default_regularisers
        except AlignkitError:
            return {}  # `_plugin` reports an unknown algorithm
        return {"regulariser": [{"name": name, "weight": weight} for name, weight in default.items()]}

    def run(self) -> RunConfig:
        given = [k for k in TOP if k != "recipe" and any(k in layer.tree for layer in self.layers)]
        values = {k: self._value(k, TOP[k]) for k in given} | {"recipe": self.recipe or ""}
        plain = {section: self._plain(section, cls) for section, cls in PLAIN.items()}
        algorithm = self._plugin("algorithm", self.algorithm)
        sampler = self._plugin("sampler", self.layers.name("sampler"))
        rewards, regularisers = list(self._listed("reward")), list(self._listed("regulariser"))
        held_out = list(self._held_out({reward.name: reward for reward in rewards}))
        surrogate = self._surrogate(algorithm)
        self.layers.raise_problems()
        plain["evaluate"] = replace(plain["evaluate"], rewards=held_out)
        config: dict[str, Any] = {"sampler": sampler, "algorithm": algorithm, "surrogate": surrogate}
        try:
            return RunConfig(**config, rewards=rewards, regularisers=regularisers, **values, **plain)
        except ValueError as error:
            raise ConfigError("\n".join(map(str, error.args))) from error

    def _value(self, key: str, hint: type) -> Any:
        value = next(layer.tree[key] for layer in reversed(self.layers.layers) if key in layer.tree)
        try:
            converted = schema.convert(value, hint)
            if key == "output" and (fault := path_fault(converted)):
                raise ValueError(f"found {value[:60]!r}, which cannot be a path: {fault}")
            return converted
        except (TypeError, ValueError) as error:
            self.layers.problem(key, "", str(error))

    def _plain(self, section: str, cls: type) -> Any:
        values: dict[str, Any] = {}
        for layer in self.layers:
            values |= layer.tree.get(section, {})
        count = len(self.layers.problems)
        good = self._convert(section, schema.field_types(cls), values, section)
        built = self._build(section, cls, good)  # even after problems, to report values out of range too
        return built if len(self.layers.problems) == count else None

    def _plugin(self, section: str, name: str) -> Any:
        """Return the section's config, from the fields that were given for the plugin `name`."""
        if not name:
            self.layers.problem(section, "name", f"missing; expected the name of one (`alignkit list {section}s`)")
            return None
        values: dict[str, Any] = {}
        inherited = ""
        for layer in self.layers:
            table = dict(layer.tree.get(section, {}))
            # Fields without a name belong to the plugin that the model named before; those of the user, to any plugin.
            meant = normalise(str(table.pop("name", inherited if layer.ours else "")))
            inherited = meant if layer.ours else inherited
            if meant in ("", name):
                values |= table
        return self._check_plugin(section, name, values)

    def _listed(self, section: str) -> Iterator[Any]:
        """Yield the configs of the plugins in a section that is a list."""
        for entry, name, values in self.layers.listed(section, f"one of this run's {section}s", "add up the weights"):
            if config := self._check_plugin(section, name, values, entry):
                yield config

    def _held_out(self, trained: Mapping[str, RewardConfig]) -> Iterator[dict[str, Any]]:
        """Yield tables with every field; for a reward that is also trained on, the name alone."""
        section = "evaluate.rewards"
        for entry, name, values in self.layers.listed(section, f"in {section}", "remove one of them"):
            if name in trained and not values:
                yield {"name": name}
            elif (config := self._check_plugin(section, name, values, entry)) and name not in trained:
                yield {"name": name, **config.fields}
            elif config and config.fields == trained[name].fields:
                yield {"name": name}
            elif config:
                text = f"{name} is trained on with other settings, and a run has it once; leave the settings out here"
                self.layers.problem(section, "name", text, entry)

    def _surrogate(self, algorithm: PluginConfig | None) -> Any:
        """Return the surrogate if the algorithm needs one. A section without a use is a mistake, unless it came with
        the model, or with a run file whose algorithm an override has replaced."""
        if algorithm is None:
            return None
        cls = self.registry.get("algorithm", algorithm.name)
        if "surrogate" in cls(**algorithm.fields).needs:
            return self._plugin("surrogate", self.layers.name("surrogate") or cls.default_surrogate)
        file, overrides = self.file.tree if self.file else {}, self.layers.layers[-1].tree
        if "surrogate" in overrides or ("surrogate" in file and "name" not in overrides.get("algorithm", {})):
            self.layers.problem("surrogate", "", f"algorithm {algorithm.name} uses none; remove this section")
        return None

    def _check_plugin(self, section: str, name: str, values: dict[str, Any], entry: int = 0) -> Any:
        kind = LISTS.get(section, section)
        try:
            cls = self.registry.get(kind, name)
            types = schema.field_types(cls)
        except AlignkitError as error:
            self.layers.problem(section, "name", str(error), entry)
            return None
        holder = PLUGINS.get(section, PluginConfig)  # a held-out reward has no weight
        own = {key: hint for key, hint in schema.field_types(holder).items() if key not in ("name", "fields")}
        count = len(self.layers.problems)
        checked = self._convert(section, types | own, values, name, entry)
        for key in types.keys() - schema.defaults(cls).keys() - values.keys():
            self.layers.problem(section, key, f"missing; expected {schema.describe(types[key])}", entry)
        if len(self.layers.problems) > count:
            return None
        plugin = {key: value for key, value in checked.items() if key in types and key not in own}
        if self._build(section, cls, plugin, entry) is None:
            return None
        core = {key: value for key, value in checked.items() if key in own}
        fields = {key: value for key, value in (schema.defaults(cls) | plugin).items() if key not in own}
        return self._build(section, holder, {"name": name, "fields": fields, **core}, entry)

    def _convert(
        self, section: str, types: Mapping[str, Any], values: dict[str, Any], docs: str, entry: int = 0
    ) -> dict[str, Any]:
        """Return the values that have a field and its type; note a problem for each of the others."""
        checked: dict[str, Any] = {}
        for key, value in values.items():
            if key not in types and f"{section}.{key}" in RENAMED:
                self.layers.problem(section, key, f"was renamed; write {RENAMED[f'{section}.{key}']}", entry)
                continue
            if key not in types:
                hint = self._suggest(section, key, types)
                self.layers.problem(section, key, f"unknown key{hint} (`alignkit show {docs}` lists all)", entry)
                continue
            try:
                checked[key] = self._resolve(section, key, schema.convert(value, types[key]), self.file)
            except (TypeError, ValueError, AlignkitError) as error:
                self.layers.problem(section, key, str(error), entry)
        return checked

    def _suggest(self, section: str, key: str, types: Mapping[str, Any]) -> str:
        """Suggest the key of this name in another section, else the nearest name in this one, else in another."""
        elsewhere = {k: f"{s}.{k}" for s, cls in PLAIN.items() if s != section for k in schema.field_types(cls)}
        for other in ("algorithm", "sampler", "surrogate"):
            name = self.algorithm if other == "algorithm" else self.layers.name(other)
            try:
                found = schema.field_types(self.registry.get(other, name)) if other != section else {}
            except AlignkitError:
                continue  # a section that is missing or wrong has no names to offer
            elsewhere |= {k: f"{other}.{k}" for k in found}
        for name in self.layers.wanted("regulariser"):
            with suppress(AlignkitError):  # `_check_plugin` reports an unknown name
                found = schema.field_types(self.registry.get("regulariser", name))
                elsewhere = {k: f"regulariser.{name}.{k}" for k in found} | elsewhere
        if key in elsewhere:
            return f"; did you mean {elsewhere[key]}?"
        return nearest(key, types) or nearest(f"{section}.{key}", elsewhere.values())

    def _resolve(self, section: str, key: str, value: Any, file: RunFile | None) -> Any:
        """Make a path absolute: from the folder of `file` if it exists there, else from the working directory."""
        if f"{section}.{key}" not in PATHS or not isinstance(value, str) or not value:
            return value
        if fault := path_fault(value) or (path_fault(file.resolve(value)) if file else ""):
            raise ValueError(f"found {value[:60]!r}, which cannot be a path: {fault}")
        if re.fullmatch(r"[A-Za-z_][\w.]*:\w+|datasets:.+", value):
            return value
        if section == "model" and any(row.kind == "model" for row in self.registry.named(value)):
            return normalise(value)
        local = file.resolve(value) if file else Path(value)
        # Of a pattern (shards/{0000..0012}.tar) the folder before its first wildcard must exist.
        fixed = next(p for p in (Path(value), *Path(value).parents) if not re.search(r"[*?{[]", str(p)))
        there = local.exists() or (file is not None and file.resolve(str(fixed)).exists())
        path = local if there else prompt_file(value) if key == "prompts" else Path(value)
        # A model that is no path may be a hub id; any other missing path is reported when the run is checked.
        return value if section == "model" and not path.exists() else str(path.resolve())

    def _build(self, section: str, cls: type, values: dict[str, Any], entry: int = 0) -> Any:
        """Return an instance; note what its __post_init__ rejects as problems of the section."""
        try:
            return cls(**values)
        except (ValueError, AlignkitError) as error:
            for text in map(str, error.args):
                key, colon, rest = text.partition(": ")
                named = bool(colon) and key in schema.field_types(cls)
                self.layers.problem(section, key if named else "", rest if named else text, entry)
            return None
