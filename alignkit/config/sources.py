"""The layers of a run's settings (the model, a recipe, the run file, the overrides), and mistakes with the place of
each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.config import toml
from alignkit.config.sections import PLAIN, PLUGINS, TOP
from alignkit.errors import ConfigError
from alignkit.files import parse_toml, read_text
from alignkit.registry import nearest, normalise

LISTS = {"reward": "reward", "regulariser": "regulariser", "evaluate.rewards": "reward"}
"""Sections that list plugins, by name or by table, and the kind of plugin. Single fields, of overrides and of models,
stand under the section's name and a dot."""

MOST_BYTES = 1 << 20
"""Largest run file."""
RESOLVED = "resolved"
"""The key of a run file that holds every setting, those of its recipe included."""


class RunFile:
    """A run file that has been read; knows the line of each key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.text = read_text(path, MOST_BYTES)
            self.tree = parse_toml(self.text)
            self.resolved = self.tree.pop(RESOLVED, False)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not UTF-8 text: {error}") from None
        except ValueError as error:
            raise ConfigError(f"{path}: not valid TOML: {error}") from None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read as a run file: {error.strerror}") from None
        if not isinstance(self.resolved, bool):
            found = toml.format_value(self.resolved)
            raise ConfigError(f"{self.where(RESOLVED, '', 0)}{RESOLVED}: found {found}, expected true or false")

    def where(self, section: str, key: str, entry: int) -> str:
        line = toml.line_of(self.text, section, key, entry)
        outer, _, inner = section.partition(".")
        if not line and inner:  # entries of a list that stand on its line
            line = toml.line_of(self.text, outer, inner)
        return f"{self.path}:{line}: " if line else f"{self.path}: "

    def resolve(self, name: str) -> Path:
        """Return `name` relative to the folder of this file."""
        return self.path.parent / name


def nest(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Nest dotted keys: {"train.updates": 3} becomes {"train": {"updates": 3}}.

    In the sections of `LISTS` "reward.NAME.key" becomes {"reward.": {NAME: {key: ...}}}."""
    tree: dict[str, Any] = {}
    for path, value in overrides.items():
        if value is None:
            raise ConfigError(f"{path}: found None, expected a value; leave the key out for its default")
        listed = next((f"{name}." for name in LISTS if path.startswith(f"{name}.")), "")
        section, *keys = [listed, *path[len(listed) :].split(".")] if listed else path.split(".")
        if len(keys) != (2 if listed else 1) and not (not keys and (section in TOP or section in LISTS)):
            raise ConfigError(
                f"{path}: expected section.key, as train.updates, or reward.NAME.key or regulariser.NAME.key"
            )
        if not keys:
            tree[section] = value
            continue
        table = tree.setdefault(section, {})
        for key in keys[:-1]:
            table = table.setdefault(normalise(key), {})
        table[keys[-1]] = value
    return tree


@dataclass
class Layer:
    """One source of settings."""

    label: str
    """Prefix of messages about a mistake in it; empty for overrides, and for files, which have lines."""
    tree: Mapping[str, Any]
    ours: bool = False
    """Whether it comes with the model, the algorithm or a recipe and not from the user."""
    file: RunFile | None = None
    """The file that it was read from."""


def model_layer(label: str, tree: Mapping[str, Any]) -> Layer:
    """Wrap the settings that a model brings; a table of regularisers, instead of a list, holds single fields."""
    fields = tree.get("regulariser")
    if not isinstance(fields, Mapping):
        return Layer(label, tree, ours=True)
    others = {key: value for key, value in tree.items() if key != "regulariser"}
    return Layer(label, {**others, "regulariser.": fields}, ours=True)


class Layers:
    """All layers, the earliest first, and the mistakes found in them; the last one holds the overrides."""

    def __init__(self, layers: list[Layer], file: RunFile | None) -> None:
        self.layers, self.file = layers, file
        self.problems: list[str] = []

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def name(self, section: str) -> str:
        """Return the plugin's name in the last layer that gives one, or ""."""
        named = [t["name"] for x in self if isinstance(t := x.tree.get(section), Mapping) and "name" in t]
        return normalise(str(named[-1])) if named else ""

    def problem(self, section: str, key: str, text: str, entry: int = 0) -> None:
        """Note a mistake under the layer that the value comes from; `entry` counts the tables of a list."""
        tables = ((x, [value_at(x.tree, section), *x.tree.get(f"{section}.", {}).values()]) for x in self.layers[::-1])
        source = next((x for x, found in tables if any(_holds(table, key) for table in found)), None)
        file = source.file if source else self.file
        where = file.where(section, key, entry) if file else source.label if source else ""
        self.problems.append(f"{where}{f'{section}.{key}' if key else section}: {text}")

    def raise_problems(self) -> None:
        """Raise ConfigError, one line for each mistake, where there is one."""
        if self.problems:
            raise ConfigError("\n".join(self.problems))

    def wanted(self, section: str) -> list[str]:
        """Return the names in the last list that was given in a section of `LISTS`."""
        given = [entries for x in self if (entries := value_at(x.tree, section)) is not None]
        last: list[Any] = given[-1] if given else []
        return [normalise(entry if isinstance(entry, str) else entry["name"]) for entry in last]

    def listed(self, section: str, where: str, twice: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """Yield (place, name, fields) of each entry of the last list that was given in a section of `LISTS`.

        Fields of the same name in earlier lists, and single fields, still hold; later layers win. `where` and `twice`
        end the messages about a single field, in overrides, of a name that is not listed, and about one that is listed
        twice."""
        wanted = self.wanted(section)
        for name in self.layers[-1].tree.get(f"{section}.", {}).keys() - set(wanted):
            self.problems.append(f"{section}.{name}: not {where} ({', '.join(wanted) or 'which is empty'})")
        for entry, name in enumerate(wanted):
            if name in wanted[:entry]:
                self.problem(section, "name", f"{name} is listed twice; {twice}", entry)
                continue
            values: dict[str, Any] = {}
            for layer in self:
                for one in value_at(layer.tree, section) or ():
                    if not isinstance(one, str) and normalise(one["name"]) == name:
                        values |= {key: value for key, value in one.items() if key != "name"}
                values |= layer.tree.get(f"{section}.", {}).get(name, {})
            yield entry, name, values

    def check_shape(self) -> None:
        """Allow only known sections, each a table; those of `LISTS` hold a list of names or tables.

        Raises ConfigError for what cannot be read any further; an unknown section is noted."""
        sections = [*TOP, *PLAIN, *PLUGINS]
        single = [f"{name}." for name in LISTS]
        unknown = 0
        for section, value in ((section, value) for layer in self for section, value in layer.tree.items()):
            if section in (*LISTS, *single):
                continue
            if section not in sections:
                what = "section" if isinstance(value, Mapping | list) else "key"
                self.problem(
                    section, "", f"unknown {what}{nearest(section, sections)} (there are {', '.join(sections)})"
                )
                unknown += 1
            elif section not in TOP and not isinstance(value, Mapping):
                self.problem(section, "", f"found {toml.format_value(value)}, expected a table [{section}]")
        for section, layer in ((section, layer) for section in LISTS for layer in self):
            entries = value_at(layer.tree, section)
            good = isinstance(entries, Sequence) and not isinstance(entries, str)
            if entries is not None and not (good and all(map(_names_a_plugin, entries))):
                what = f"[[{section}]] tables, each" if section in PLUGINS else "a list of names or of tables"
                self.problem(section, "", f"expected {what} with a name")
        if len(self.problems) > unknown:
            self.raise_problems()


def value_at(tree: Mapping[str, Any], section: str) -> Any:
    """Return the value of a tree at "section" or "section.key"; None if there is none."""
    outer, _, key = section.partition(".") if section in LISTS else (section, "", "")
    table = tree.get(outer)
    return (table.get(key) if isinstance(table, Mapping) else None) if key else table


def _names_a_plugin(entry: Any) -> bool:
    return isinstance(entry, str) or (isinstance(entry, Mapping) and isinstance(entry.get("name"), str))


def _holds(table: Any, key: str) -> bool:
    """Whether a section (a table, or a list of tables or of names) has this key; without a key, that it is there."""
    if table is None:
        return False
    if not key or (key == "name" and isinstance(table, str)):
        return True
    if isinstance(table, list | tuple):
        return any(_holds(item, key) for item in table)
    return isinstance(table, Mapping) and key in table
