"""The reference that `alignkit show` prints, as JSON values: kind, name, origin, doc, target and fields; of a
recipe also the text of its file."""

from __future__ import annotations

import inspect
import re
from typing import Any

from alignkit.config import schema
from alignkit.config.recipes import read_recipe
from alignkit.config.sections import PLAIN, PLUGINS
from alignkit.config.toml import format_value
from alignkit.interfaces import ModelBundle
from alignkit.registry import Component, Registry


def component(registry: Registry, row: Component) -> dict[str, Any]:
    """Describe a registered component, importing its class (and mostly torch). Raises PluginError as `get` does."""
    target = registry.get(row.kind, row.name)
    about = {"kind": row.kind, "name": row.name, "origin": row.origin, "target": row.target, "help": row.help}
    if row.kind == "recipe":
        read = read_recipe(registry, row.name)
        doc = f"Settings that are not the paper's, for {read.purpose()}."
        return {**about, "doc": doc, "fields": [], "text": read.file.text}
    if isinstance(target, ModelBundle):
        settings = {"path": target.path, "teacher": target.teacher or "", **_flat(target.defaults)}
        for algorithm, sections in target.algorithm_defaults.items():
            under = algorithm.replace("/", " with ")
            settings |= {f"under {under}: {key}": value for key, value in _flat(sections).items()}
        fields = [_field(name, "", format_value(value), "") for name, value in settings.items()]
        for key, recipe in target.recipes.items():
            doc = f"Not the paper's settings: `alignkit show {recipe}`; `--recipe paper` leaves them out."
            fields.append(_field(f"under {key.replace('/', ' with ')}: recipe", "", format_value(recipe), doc))
        return {**about, "doc": row.help, "fields": fields}
    doc = _prose(target.__doc__ or row.help)
    if row.kind == "algorithm" and target.default_regularisers:
        own = ", ".join(f"{name} (weight {weight})" for name, weight in target.default_regularisers.items())
        doc += f"\n\nRegularisers of a run that lists none: {own}."
    return {**about, "doc": doc, "fields": class_fields(target)}


def section(name: str) -> list[dict[str, Any]]:
    """Describe a section of a run file; empty if there is none of this name."""
    cls = (PLAIN | PLUGINS).get(name)
    if cls is None:
        return []
    fields = [field for field in class_fields(cls) if field["name"] != "fields"]
    doc = _prose(cls.__doc__ or "")
    if name in PLUGINS:
        doc += f"\n`name` picks the plugin (`alignkit list {name}s`), whose own fields stand here as well."
    about = {"kind": "section", "name": name, "origin": "of a run file", "target": "", "help": doc.splitlines()[0]}
    return [{**about, "doc": doc, "fields": fields}]


def class_fields(cls: type) -> list[dict[str, Any]]:
    """Return name, type with range, default (TOML; None if required) and doc of each field."""
    defaults, docs = schema.defaults(cls), schema.field_docs(cls)
    return [
        _field(name, schema.describe(hint), _default(name, defaults), docs.get(name, ""))
        for name, hint in schema.field_types(cls).items()
    ]


def _prose(text: str) -> str:
    """Join each paragraph of a docstring to one line; indented blocks keep theirs."""
    return re.sub(r"(?<=\S)\n(?=\S)", " ", inspect.cleandoc(text))


def _default(name: str, defaults: dict[str, Any]) -> str | None:
    if name not in defaults:
        return None
    return "left out" if defaults[name] is None else format_value(defaults[name])


def _field(name: str, type_: str, default: str | None, doc: str) -> dict[str, Any]:
    return {"name": name, "type": type_, "default": default, "doc": doc}


def _flat(sections: Any) -> dict[str, Any]:
    """Flatten {"train": {"updates": 3}} to {"train.updates": 3}."""
    flat: dict[str, Any] = {}
    for section_name, values in sections.items():
        if isinstance(values, dict):
            flat |= {f"{section_name}.{key}": value for key, value in values.items()}
        else:
            flat[section_name] = values
    return flat
