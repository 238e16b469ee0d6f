"""Where the values of a run come from (the model, the run file, the overrides), and whom a mistake is blamed on."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit import toml
from alignkit.errors import ConfigError
from alignkit.registry import nearest, normalise
from alignkit.sections import PLAIN, PLUGINS, TOP


class RunFile:
    """A run file that has been read; knows the line of each key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.text = path.read_text(encoding="utf-8")
            self.tree = tomllib.loads(self.text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path}: not valid TOML: {error}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not UTF-8 text: {error}") from None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read as a run file: {error.strerror}") from None

    def where(self, section: str, key: str, entry: int) -> str:
        line = toml.line_of(self.text, section, key, entry)
        return f"{self.path}:{line}: " if line else f"{self.path}: "

    def beside(self, name: str) -> Path:
        """`name` as seen from the folder of this file."""
        return self.path.parent / name


def nest(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """{"train.updates": 3} as {"train": {"updates": 3}}; "reward.NAME.key" as {"reward.": {NAME: {key: ...}}}."""
    tree: dict[str, Any] = {}
    for path, value in overrides.items():
        if value is None:
            raise ConfigError(f"{path}: found None, expected a value; leave the key out for its default")
        section, *keys = path.split(".")
        section = "reward." if section == "reward" and keys else section
        if len(keys) != {"reward.": 2}.get(section, 1) and not (not keys and (section in TOP or section == "reward")):
            raise ConfigError(f"{path}: expected section.key, as train.updates, or reward.NAME.key")
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
    label: str
    tree: Mapping[str, Any]
    ours: bool = False
    """Whether it comes with the model and not from the user."""


class Layers:
    """The layers, the earliest first, and the mistakes found in them. The last one holds the overrides."""

    def __init__(self, layers: list[Layer], file: RunFile | None) -> None:
        self.layers, self.file = layers, file
        self.problems: list[str] = []

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def name(self, section: str) -> str:
        """The plugin that the last layer with an opinion names, or ""."""
        named = [t["name"] for x in self if isinstance(t := x.tree.get(section), Mapping) and "name" in t]
        return normalise(str(named[-1])) if named else ""

    def problem(self, section: str, key: str, text: str, entry: int = 0) -> None:
        """Note a mistake under the layer that the value comes from; `entry` counts [[reward]] tables."""
        source = next((x for x in reversed(self.layers) if section in x.tree and _holds(x.tree[section], key)), None)
        where = source.label if source else ""
        if self.file and (source is None or source.tree is self.file.tree):
            where = self.file.where(section, key, entry)
        self.problems.append(f"{where}{f'{section}.{key}' if key else section}: {text}")

    def raise_problems(self) -> None:
        """Raise ConfigError, one line for each mistake, where there is one."""
        if self.problems:
            raise ConfigError("\n".join(self.problems))

    def check_shape(self) -> None:
        """Only known sections, each a table; [[reward]] a list of names or tables. Raises ConfigError."""
        sections = [*TOP, *PLAIN, *PLUGINS]
        for section, found in ((section, found) for layer in self for section, found in layer.tree.items()):
            if section == "reward":
                good = isinstance(found, Sequence) and not isinstance(found, str)
                if not good or not all(isinstance(e, str) or (isinstance(e, Mapping) and "name" in e) for e in found):
                    self.problem(section, "", "expected [[reward]] tables, each with a name")
            elif section not in sections and section != "reward.":
                hint = nearest(section, sections)
                self.problem(section, "", f"unknown section{hint} (there are {', '.join(sections)})")
            elif section not in TOP and not isinstance(found, Mapping):
                self.problem(section, "", f"found {toml.format_value(found)}, expected a table [{section}]")
        self.raise_problems()


def _holds(table: Any, key: str) -> bool:
    """Whether a section (a table, or a list of tables or of names) has this key; without a key, that it is there."""
    if not key or (key == "name" and isinstance(table, str)):
        return True
    if isinstance(table, list | tuple):
        return any(_holds(item, key) for item in table)
    return isinstance(table, Mapping) and key in table
