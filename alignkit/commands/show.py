"""The description of a component or of a section, together with the settings that a model changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from alignkit.config import reference, schema
from alignkit.config.bundles import find_bundle
from alignkit.config.sections import PLAIN, PLUGINS, ModelConfig
from alignkit.config.toml import format_value
from alignkit.errors import AlignkitError
from alignkit.interfaces import ModelBundle
from alignkit.registry import Component, Registry, nearest, normalise

Tree = Mapping[str, Any]
"""Sections of a run file."""


def show(registry: Registry, name: str, model: str | None = None) -> list[dict[str, Any]]:
    """Describe every component of this name, else the section of a run file, as JSON values.

    What `alignkit.config.reference` gives, and for a component that a run file names also "model": {"name",
    "settings", "recipes"}, what `model` changes for it (see `changes` and `recipes`). `model` is a registered name, a
    hub id or a folder; by default the model that runs take by default, if it is installed. Raises AlignkitError for an
    unknown name.
    """
    found = [_component(registry, row, model) for row in registry.named(name)] or reference.section(name)
    if not found:
        names = [row.name for row in registry.components() if not row.broken]
        raise AlignkitError(f"show: unknown name {name!r}{nearest(normalise(name), names)} (`alignkit list` shows all)")
    return found


def _component(registry: Registry, row: Component, model: str | None) -> dict[str, Any]:
    if row.kind == "command":
        about = {"kind": row.kind, "name": row.name, "origin": row.origin, "target": row.target, "help": row.help}
        return {**about, "doc": f"{row.help}\n\n`alignkit {row.name} --help` has the details.", "fields": []}
    found = reference.component(registry, row)
    chosen = model or ModelConfig().name
    installed = any(other.kind == "model" for other in registry.named(chosen))
    if row.kind not in PLUGINS or not (model or installed):
        return found
    bundle = find_bundle(chosen, registry)
    model_changes = {"name": chosen, "settings": changes(registry, row, bundle), "recipes": recipes(row, bundle)}
    return {**found, "model": model_changes}


def recipes(row: Component, bundle: ModelBundle) -> list[dict[str, str]]:
    """Return the recipes that a model names for an algorithm: {"name", "where"}, where the second is the only reward
    that it is limited to, or empty."""
    keys = [(key.partition("/"), name) for key, name in bundle.recipes.items()]
    return [
        {"name": name, "where": reward}
        for (algorithm, _, reward), name in keys
        if row.kind == "algorithm" and algorithm == row.name
    ]


def changes(registry: Registry, row: Component, bundle: ModelBundle) -> list[dict[str, Any]]:
    """Return the settings of `bundle` for a component that differ from the defaults.

    For an algorithm these are all that the bundle sets under it, its own fields first; for other kinds the fields of
    the component, whatever the algorithm. Each is {"key", "value", "default", "where"}: a field of the component by its
    name, any other as "section.key"; the values in TOML, the default None where there is none; "where" lists the
    algorithms (for an algorithm: the only reward) that the setting is limited to, and is empty where it always holds.
    """
    places: dict[tuple[bool, str, str, str | None], list[str]] = {}
    changed: set[tuple[str, str, str]] = set()
    for place, algorithm, tree in _layers(row, bundle):
        for section, name, key, value in _settings(tree, _names(registry, algorithm, bundle, tree)):
            own = section == row.kind and name == row.name
            if (own and key == "name") or not (own or row.kind == "algorithm"):
                continue
            default = _default(registry, bundle, algorithm, section, name, key)
            # A more specific layer may set a changed field back to its default.
            if (text := format_value(value)) != default or (section, name, key) in changed:
                changed.add((section, name, key))
                single = isinstance(tree[section], Mapping) and key in tree[section]
                path = [key] if own else [section, key] if single else [section, name, key]
                places.setdefault((not own, ".".join(filter(None, path)), text, default), []).append(place)
    return [
        {"key": key, "value": value, "default": default, "where": [] if "" in where else where}
        for (_, key, value, default), where in sorted(places.items(), key=lambda item: item[0][0])
    ]


def _layers(row: Component, bundle: ModelBundle) -> Iterator[tuple[str, str, Tree]]:
    """Yield (place, algorithm, sections) for each layer of a bundle that can hold settings for a component."""
    if row.kind == "algorithm":  # what the model sets under every algorithm stands in `alignkit show MODEL`
        yield "", row.name, {"algorithm": bundle.defaults.get("algorithm", {})}
    else:
        yield "", "", bundle.defaults
    for key, tree in bundle.algorithm_defaults.items():
        algorithm, _, reward = key.partition("/")
        if row.kind != "algorithm":
            yield key.replace("/", " with "), algorithm, tree
        elif algorithm == row.name:
            yield reward, algorithm, tree


def _settings(tree: Tree, names: Mapping[str, str]) -> Iterator[tuple[str, str, str, Any]]:
    """Yield (section, component, key, value) for each setting; a list of components also as one without a key."""
    for section, table in tree.items():
        if isinstance(table, Mapping):
            for key, value in table.items():
                if isinstance(value, Mapping):  # single fields of components that are listed elsewhere
                    yield from ((section, key, field, one) for field, one in value.items())
                else:
                    yield section, names.get(section, ""), key, value
        elif isinstance(table, list | tuple):
            yield section, "", "", _listed(table)
            for entry in table:
                if isinstance(entry, Mapping):
                    yield from ((section, entry["name"], key, entry[key]) for key in entry if key != "name")
        else:
            yield section, "", "", table


def _listed(entries: Sequence[Any]) -> list[str]:
    """Return the names in a list of names and tables."""
    return [entry if isinstance(entry, str) else entry["name"] for entry in entries]


def _names(registry: Registry, algorithm: str, bundle: ModelBundle, tree: Tree) -> dict[str, str]:
    """Return the component of each section: named in the layer `tree`, else below it, else by the algorithm."""
    names = {"algorithm": algorithm}
    with contextlib.suppress(AlignkitError):  # an algorithm that is not installed names no surrogate
        names["surrogate"] = registry.get("algorithm", algorithm).default_surrogate
    for layer in (bundle.defaults, bundle.algorithm_defaults.get(algorithm, {}), tree):
        for section, table in layer.items():
            if section != "algorithm" and isinstance(table, Mapping) and "name" in table:
                names[section] = normalise(table["name"])
    return names


def _default(registry: Registry, bundle: ModelBundle, algorithm: str, section: str, name: str, key: str) -> str | None:
    """Return the value in TOML that holds without the setting; None if there is none."""
    if not key:
        listed = bundle.defaults.get(section)
        if section == "regulariser" and not isinstance(listed, list):  # a table holds fields of regularisers alone
            with contextlib.suppress(AlignkitError):
                listed = list(registry.get("algorithm", algorithm).default_regularisers)
        return format_value(_listed(listed)) if isinstance(listed, list | tuple) else None
    defaults = schema.defaults((PLAIN | PLUGINS)[section])
    with contextlib.suppress(AlignkitError):  # a component that is not installed has no defaults
        defaults |= schema.defaults(registry.get(section, name)) if section in PLUGINS else {}
    if key not in defaults or key == "name":
        return None
    return "left out" if defaults[key] is None else format_value(defaults[key])
