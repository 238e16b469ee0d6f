"""Recipes: run files that plugins ship under a name, for settings that are not those of a paper."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.config import schema
from alignkit.config.sections import TOP, RecipeConfig, RunConfig
from alignkit.config.sources import Layer, Layers, RunFile
from alignkit.errors import ConfigError
from alignkit.interfaces import ModelBundle
from alignkit.registry import PAPER, Registry, default_registry, normalise

NONE = ("", PAPER)
"""Values of the key `recipe` that stand for none."""
OURS = "Not in the paper"
"""Words in the docstring of a field that is an addition to the paper."""


@dataclass(frozen=True)
class Recipe:
    """A recipe that has been read."""

    name: str
    file: RunFile
    algorithm: str
    settings: Mapping[str, Any]
    """Sections of a run file."""
    fits: RecipeConfig

    def purpose(self) -> str:
        """Return the runs that it is for, as "algorithm lasro on shapes_lcm, with ocr as the only reward"."""
        models = f" on {' or '.join(self.fits.models)}" if self.fits.models else ""
        reward = f", with {self.fits.for_reward} as the only reward" if self.fits.for_reward else ""
        return f"algorithm {self.algorithm}{models}{reward}"

    def check_fit(
        self, algorithm: str, model: str, bundle: ModelBundle, rewards: Sequence[str], registry: Registry
    ) -> None:
        """Raise ConfigError, in one line, if it is for another algorithm, model or reward than the run's."""
        models = [row.name for row in registry.components("model") if row.name in self.fits.models]
        found = ""
        if self.algorithm != algorithm:
            found = f"algorithm {algorithm}"
        elif self.fits.models and bundle not in [registry.get("model", name) for name in models]:
            found = f"model {model}"
        elif self.fits.for_reward and list(rewards) != [self.fits.for_reward]:
            found = " and ".join(rewards) or "no reward"
        if found:
            raise ConfigError(
                f"recipe: found {self.name} with {found}, expected {self.purpose()}; choose another recipe (`alignkit "
                "list recipes`), or none with --recipe paper"
            )


def read_recipe(registry: Registry, name: str) -> Recipe:
    """Read the recipe of this name. Raises AlignkitError for an unknown one, with a line for each mistake in its file.

    Its values are checked with those of the run.
    """
    path = registry.get("recipe", name)
    file = RunFile(path)
    settings = {key: value for key, value in file.tree.items() if key != "recipe"}
    layers = Layers([Layer("", settings, file=file)], file)
    layers.check_shape()
    for key in settings.keys() & TOP.keys():
        layers.problem(key, "", "a recipe holds sections alone; remove this key")
    if "name" in settings.get("model", {}):
        layers.problem("model", "name", "a recipe chooses no model; write [recipe] with models = [...]")
    layers.raise_problems()
    return Recipe(normalise(name), file, layers.name("algorithm"), settings, _fits(file))


def _fits(file: RunFile) -> RecipeConfig:
    table, types = file.tree.get("recipe", {}), schema.field_types(RecipeConfig)
    try:
        if not isinstance(table, Mapping) or table.keys() - types:
            raise TypeError(f"expected a table [recipe] with no other keys than {' and '.join(types)}")
        fits = {key: schema.convert(value, types[key]) for key, value in table.items()}
    except TypeError as error:
        raise ConfigError(f"{file.where('recipe', '', 0)}recipe: {error}") from None
    return RecipeConfig([normalise(name) for name in fits.get("models", ())], normalise(fits.get("for_reward", "")))


def departure(config: RunConfig, registry: Registry | None = None) -> str:
    """Return in a few words what of a run is not the paper's: its recipe, else fields that are not in the paper and
    are set; empty if nothing is."""
    surrogate = [("surrogate", config.surrogate)] if config.surrogate else []
    regularisers = [("regulariser", one) for one in config.regularisers]
    parts = [("algorithm", config.algorithm), ("sampler", config.sampler), *surrogate, *regularisers]
    return departure_of(config.recipe, ((kind, one.name, one.fields) for kind, one in parts), registry)


def departure_of(
    recipe: str, parts: Iterable[tuple[str, str, Mapping[str, Any]]], registry: Registry | None = None
) -> str:
    """Return the `departure` of a recipe and parts: kind, name and fields each."""
    if recipe not in NONE:
        return f"recipe {recipe}, not the paper's"
    added = list(_additions(parts, registry or default_registry()))
    return f"{', '.join(added)}, not the paper's" if added else ""


def _additions(parts: Iterable[tuple[str, str, Mapping[str, Any]]], registry: Registry) -> Iterator[str]:
    """Yield the fields of plugins that say "Not in the paper" and are not at their default."""
    for kind, name, fields in parts:
        cls = registry.get(kind, name)
        defaults, docs = schema.defaults(cls), schema.field_docs(cls)
        for key, value in fields.items():
            if OURS in docs.get(key, "") and value != defaults.get(key):
                yield f"{kind}.{key}"
