"""Run the checks of `alignkit.testing` on every component that an installed plugin registers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from alignkit.commands.added import build
from alignkit.config import schema
from alignkit.config.load import ModelConfig, load
from alignkit.config.recipes import read_recipe
from alignkit.errors import AlignkitError, ConfigError, PluginError
from alignkit.interfaces import Algorithm, ModelBundle, Policy
from alignkit.records import Example, PolicySettings
from alignkit.registry import Component, Registry, default_registry, nearest, normalise
from alignkit.testing import (
    check_algorithm,
    check_model,
    check_policy,
    check_regulariser,
    check_reward,
    check_sampler,
    check_surrogate,
    refusal,
    tiny_pipeline,
)
from alignkit.testing.world import FORMS, Form

SAMPLERS: dict[Form, tuple[str, ...]] = {"lcm": ("lcm",), "teacher": ("ddim", "euler_ancestral", "renoise")}
"""The forms of models that an algorithm is checked on, each with the samplers to try until it accepts one."""


@dataclass(frozen=True)
class Checked:
    """The result of checking one component."""

    kind: str
    name: str
    status: str
    """"passed", "failed" or "skipped"."""
    detail: str
    """The failed promise, the reason for skipping, or the settings that the check ran with."""
    seconds: float


class _Skipped(Exception):
    """A component that cannot be checked here."""


def members(registry: Registry, package: str) -> list[Component]:
    """Return all that a distribution, an entry point or a package of this name registers.

    Raises AlignkitError if there is none.
    """
    rows = registry.components()
    wanted = normalise(package).lower()
    found = [row for row in rows if wanted in (normalise(name).lower() for name in _names(row))]
    if not found:
        names = sorted({name for row in rows for name in _names(row)})
        raise AlignkitError(
            f"check-plugin: no plugin {package!r} is installed{nearest(package, names)}; expected the name of a "
            "distribution, of an entry point or of a package (`alignkit list` shows all)"
        )
    return found


def _names(row: Component) -> tuple[str, ...]:
    package = [] if row.kind == "recipe" else [row.target.partition(":")[0].partition(".")[0]]
    return row.distribution, row.plugin, *package


def check_plugin(
    package: str, settings: Mapping[str, Any] | None = None, examples: Sequence[Example] | None = None
) -> Iterator[Checked]:
    """Check every component of a plugin, one after another.

    `settings` are fields by "KIND.NAME.FIELD", to name a local checkpoint or to make a network smaller. Rewards score
    `examples`, by default prompts of coloured shapes. Raises AlignkitError for an unknown plugin or setting.
    """
    registry = default_registry()
    rows = members(registry, package)
    given = _by_component(registry, settings or {})
    for row in rows:
        start = time.perf_counter()
        try:
            status, detail = "passed", _check(registry, row, given, examples)
        except (AssertionError, PluginError) as error:
            status, detail = "failed", str(error)
        except (_Skipped, AlignkitError) as error:
            status, detail = "skipped", str(error)
        yield Checked(row.kind, row.name, status, " ".join(detail.split()), time.perf_counter() - start)


def _by_component(registry: Registry, settings: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Turn {"reward.clip_score.model": ...} into {("reward", "clip_score"): {"model": ...}}, converted to the fields'
    types."""
    given: dict[tuple[str, str], dict[str, Any]] = {}
    for path, value in settings.items():
        kind, _, rest = path.partition(".")
        name, _, field = rest.rpartition(".")
        if kind not in ("algorithm", "reward", "sampler", "surrogate", "regulariser") or not name:
            raise ConfigError(f"--set {path}: expected KIND.NAME.FIELD=VALUE, as reward.clip_score.checkpoint=my/clip")
        types = schema.field_types(registry.get(kind, name))
        if field not in types:
            raise ConfigError(f"--set {path}: unknown key{nearest(field, types)} (`alignkit show {name}` lists all)")
        try:
            given.setdefault((kind, normalise(name)), {})[field] = schema.convert(value, types[field])
        except (TypeError, ValueError) as error:
            raise ConfigError(f"--set {path}: {error}") from None
    return given


def _check(registry: Registry, row: Component, given: Mapping[tuple[str, str], dict[str, Any]], examples: Any) -> str:
    """Check one component and return what it was checked with.

    Raises AssertionError or PluginError for a failure, _Skipped or another AlignkitError if it cannot be checked here.
    """
    if row.broken:
        raise AssertionError(f"{row.origin} is broken: {row.broken}")
    if row.kind == "model":
        return check_model(row.name)
    if row.kind == "recipe":
        return _check_recipe(registry, row.name)
    if row.kind == "command":
        return _check_command(registry, row)
    if row.kind == "policy":
        return _check_policy(registry, row.name)
    component = _built(registry, row.kind, row.name, given)
    if row.kind == "reward":
        check_reward(component, examples=examples)
    elif row.kind == "sampler":
        check_sampler(component)
    elif row.kind == "surrogate":
        check_surrogate(component)
    elif row.kind == "regulariser":
        check_regulariser(component)
    elif row.kind == "algorithm":
        return _check_algorithm(registry, component, given)
    else:
        raise _Skipped(f"there is no check for a {row.kind}")
    return ", ".join(f"{key} = {value}" for key, value in given.get((row.kind, row.name), {}).items())


def _built(registry: Registry, kind: str, name: str, given: Mapping[tuple[str, str], dict[str, Any]]) -> Any:
    cls = registry.get(kind, name)
    chosen = given.get((kind, name), {})
    missing = schema.field_types(cls).keys() - schema.defaults(cls).keys() - chosen.keys()
    if missing:
        raise _Skipped(f"{sorted(missing)[0]} has no default; set it with --set {kind}.{name}.{sorted(missing)[0]}=")
    try:
        return cls(**chosen)
    except ValueError as error:
        if chosen:
            raise ConfigError(f"{kind} {name}: {error}") from error
        raise AssertionError(f"{kind} {name} rejects its own defaults: {error}") from error


def _check_recipe(registry: Registry, name: str) -> str:
    """Load the run that a recipe makes on each of its models, or on the default model."""
    try:
        recipe = read_recipe(registry, name)
        for model in recipe.fits.models or [ModelConfig().name]:
            rewards = {"reward": [recipe.fits.for_reward]} if recipe.fits.for_reward else {}
            load(None, {"recipe": name, "model.name": model, **rewards}, registry)
    except ConfigError as error:
        raise AssertionError(str(error)) from error
    return recipe.purpose()


def _check_command(registry: Registry, row: Component) -> str:
    """Import a command and format its help, which reads all of its parameters."""
    command = build(registry, row)
    command.get_help(command.context_class(command, info_name=f"alignkit {row.name}"))
    return "its --help"


def _check_algorithm(
    registry: Registry, algorithm: Algorithm[Any, Any], given: Mapping[tuple[str, str], dict[str, Any]]
) -> str:
    """Check an algorithm on each form of model, with the first sampler that it accepts."""
    surrogate = None
    if "surrogate" in algorithm.needs and (own := algorithm.default_surrogate):
        surrogate = _built(registry, "surrogate", normalise(own), given)
    checked, reasons = [], []
    for form, names in SAMPLERS.items():
        for name in names:
            sampler = registry.get("sampler", name)(num_steps=2)
            if reason := refusal(algorithm, sampler):
                reasons.append(reason)
                continue
            check_algorithm(algorithm, sampler, form=form, surrogate=surrogate)
            checked.append(f"{name} on {form}")
            break
    if not checked:
        raise _Skipped(reasons[0])
    return ", ".join(checked)


def _check_policy(registry: Registry, name: str) -> str:
    """On the untrained pipelines of `alignkit.testing` that it serves, and on a registered model on this disk."""
    policy: type[Policy] = registry.get("policy", name)
    checked = []
    for what, source, settings in _checkpoints(registry, name, policy):
        check_policy(policy.load(source, settings))
        checked.append(what)
    if not checked:
        raise _Skipped(
            "no checkpoint that it serves is on this disk; register a model whose path is a folder, with "
            f"model.policy = {name} in its defaults"
        )
    return ", ".join(checked)


def _checkpoints(registry: Registry, name: str, policy: type[Policy]) -> Iterator[tuple[str, str, PolicySettings]]:
    """A description, a source and the settings of each checkpoint: the tiny pipelines, or else the first model."""
    tiny = [(form, str(tiny_pipeline(form))) for form in FORMS]
    served = [(form, source) for form, source in tiny if policy.serves(source)]
    yield from ((f"an untrained {form}", source, PolicySettings(lora_rank=4)) for form, source in served)
    for row in () if served else registry.components("model"):
        bundle: ModelBundle | None = None if row.broken else registry.get("model", row.name)
        if bundle is None or not Path(bundle.path).is_dir():
            continue
        model = bundle.defaults.get("model", {})
        if model.get("policy", name) == name and policy.serves(bundle.path):
            known = {field.name for field in fields(PolicySettings)} & model.keys()
            yield f"model {row.name}", bundle.path, PolicySettings(**{key: model[key] for key in known})
            return
