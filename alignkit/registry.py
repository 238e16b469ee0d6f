"""Map component names to classes, and record which plugin registered each and which plugins are broken.

Plugins are the entry points of the group `alignkit`. Each is imported separately, so one that fails does not affect the
others. A component's class is imported only when it is requested.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
import re
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pluggy

from alignkit import hookspecs, interfaces
from alignkit.errors import AlignkitError, PluginError
from alignkit.files import parse_toml, read_text

GROUP = "alignkit"
DISABLE = "ALIGNKIT_DISABLE_PLUGINS"
KINDS: dict[str, type] = {
    "algorithm": interfaces.Algorithm,
    "reward": interfaces.Reward,
    "sampler": interfaces.Sampler,
    "surrogate": interfaces.Surrogate,
    "regulariser": interfaces.Regulariser,
    "model": interfaces.ModelBundle,
    "policy": interfaces.Policy,
    "recipe": Path,
    "command": object,
}
PAPER = "paper"
"""Stands for no recipe, so no recipe has this name."""
OWN_COMMANDS = {
    "list", "show", "check", "train", "prepare", "sample", "score", "serve", "pairs", "prefer", "evaluate", "gallery",
    "report", "export", "new", "check_plugin", "prompts",
}  # fmt: skip
"""The commands of alignkit itself, which no plugin may replace."""
RENAMED = {("reward", "shapes_reading"): "pixel_check"}
"""Current names of renamed components, by kind and old name."""


@dataclass(frozen=True)
class Component:
    """One registered name, or (kind "plugin") one plugin that could not be imported."""

    kind: str
    name: str
    help: str
    target: str
    """"module:Attribute"; of a recipe, the path of its file."""
    plugin: str
    """Name of the entry point, as in ALIGNKIT_DISABLE_PLUGINS."""
    distribution: str
    version: str
    broken: str = ""
    """Reason why the plugin cannot be used; empty if it can."""

    @property
    def origin(self) -> str:
        return f"plugin {self.plugin} of {self.distribution} {self.version}".rstrip()


def normalise(name: str) -> str:
    """Return the snake_case form, in which "-" and "_" are equal."""
    return name.strip().replace("-", "_")


def plural(kind: str) -> str:
    """The name of all components of a kind, as in `alignkit list policies` and `register_policies`."""
    return f"{kind[:-1]}ies" if kind.endswith("y") else f"{kind}s"


def nearest(name: str, names: Iterable[str]) -> str:
    """Return "; did you mean X?" for the closest of `names`, or "" if none is close."""
    names = list(names)
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.6)
    close = close or [known for known in names if name and known.startswith(f"{name.lower()}_")]
    return f"; did you mean {close[0]}?" if close else ""


class Registry:
    """The components of some plugins. Raises PluginError if two plugins register the same name."""

    def __init__(self, plugins: Iterable[EntryPoint]) -> None:
        self._rows: dict[tuple[str, str], Component] = {}
        self._added: dict[tuple[str, str], Any] = {}
        named = functools.cache(_named)  # plugins of one distribution share its object, which reads a file at each use
        for entry in sorted(plugins, key=lambda e: e.name):
            for row in _read(entry, named(entry.dist) if entry.dist else ("an unknown distribution", "")):
                other = self._rows.setdefault((row.kind, row.name), row)
                if other is not row:
                    raise PluginError(
                        f"{row.kind} {row.name} is registered by {other.origin} and by {row.origin}; "
                        f"disable one with {DISABLE}={row.plugin}"
                    )

    def add(self, row: Component, target: Any) -> None:
        """Register the class `target` in this process only, replacing an earlier one that was added under this name.

        Raises PluginError if an installed plugin has registered the name.
        """
        key = row.kind, row.name
        if key in self._rows and key not in self._added:
            raise PluginError(
                f"{row.kind} {row.name} is already registered by {self._rows[key].origin}; choose another name"
            )
        self._rows[key], self._added[key] = row, target

    def components(self, kind: str | None = None) -> list[Component]:
        """Return the components of one kind, or of all, sorted, with the broken plugins last."""
        order = [*KINDS, "plugin"]
        rows = (row for row in self._rows.values() if kind in (None, row.kind) or row.broken)
        return sorted(rows, key=lambda row: (order.index(row.kind), row.name))

    def named(self, name: str) -> list[Component]:
        """Return the usable components with this name, of any kind."""
        return [row for row in self.components() if row.name == normalise(name) and not row.broken]

    def find(self, kind: str, name: str) -> Component:
        """Return a component without importing its class. Raises AlignkitError with the nearest name if not found."""
        if found := self._rows.get((kind, normalise(name))):
            return found
        names = [row.name for row in self.components(kind) if not row.broken]
        others = sorted(row.kind for row in self.named(name))
        if now := RENAMED.get((kind, normalise(name))):
            raise AlignkitError(f"{kind} {name!r} was renamed; use {now}")
        hint = f" (there is a {' and a '.join(others)} of this name)" if others else nearest(normalise(name), names)
        broken = [f"; {row.origin} is broken: {row.broken}" for row in self.components() if row.broken]
        raise AlignkitError(
            f"unknown {kind} {name!r}{hint} (`alignkit list {plural(kind)}` shows all){''.join(broken)}"
        )

    def get(self, kind: str, name: str) -> Any:
        """Import and return the class of a component, the ModelBundle of a model, or the path of a recipe.

        Raises AlignkitError for an unknown name, and PluginError for a target that cannot be imported or is not a
        complete implementation of the kind.
        """
        row = self.find(kind, name)
        if (kind, row.name) in self._added:
            return self._added[kind, row.name]
        if kind == "recipe":
            return Path(row.target)
        what = f"{kind} {row.name} ({row.target}, {row.origin})"
        module, _, attribute = row.target.partition(":")
        try:
            target = getattr(importlib.import_module(module), attribute)
            if kind == "model" and callable(target):
                target = target()
        except Exception as error:
            raise PluginError(f"{what} cannot be imported: {_reason(error)}") from error
        expected = KINDS[kind]
        if kind == "command":
            if callable(target):
                return target
            raise PluginError(f"{what} is neither a function nor a typer.Typer")
        fits = isinstance(target, expected) if kind == "model" else _is_subclass(target, expected)
        if not fits:
            raise PluginError(f"{what} is not an alignkit.interfaces.{expected.__name__}")
        if inspect.isabstract(target):
            raise PluginError(f"{what} does not implement {', '.join(sorted(target.__abstractmethods__))}")
        return target


@functools.cache
def default_registry() -> Registry:
    """Return the installed plugins, except those in ALIGNKIT_DISABLE_PLUGINS (entry-point names, comma-separated)."""
    disabled = {normalise(name) for name in os.environ.get(DISABLE, "").split(",")}
    return Registry(entry for entry in entry_points(group=GROUP) if normalise(entry.name) not in disabled)


def responsible_plugin(error: BaseException) -> str:
    """Return the origin of the plugin whose code raised `error` or passed it on last; "" if no plugin was involved."""
    packages = {row.target.partition(":")[0].partition(".")[0]: row.origin for row in default_registry().components()}
    frames = traceback.walk_tb(error.__traceback__)
    found = [packages.get(str(frame.f_globals.get("__name__", "")).partition(".")[0]) for frame, _ in frames]
    return next((origin for origin in reversed(found) if origin), "")


def source_line(error: BaseException) -> str:
    """Return the file and line to show for `error`, for example "reward.py, line 7".

    It is the last frame outside of installed libraries and the core, else the last in a plugin, else the very last.
    """
    packages = {row.target.partition(":")[0].partition(".")[0] for row in default_registry().components()}
    frames = list(traceback.walk_tb(error.__traceback__))
    modules = [str(frame.f_globals.get("__name__", "")).partition(".")[0] for frame, _ in frames]
    files = [Path(frame.f_code.co_filename) for frame, _ in frames]
    own = [i for i, file in enumerate(files) if "site-packages" not in file.parts and modules[i] != "alignkit"]
    best = (own or [i for i, module in enumerate(modules) if module in packages] or range(len(frames)))[-1]
    return f"{files[best].name}, line {frames[best][1]}"


def _named(distribution: Distribution) -> tuple[str, str]:
    return distribution.name, distribution.version


def _read(entry: EntryPoint, distribution: tuple[str, str]) -> Iterator[Component]:
    """Yield the components that a plugin registers, or a single row with the reason why it is broken.

    `distribution` is the name and version of the one that brings it.
    """
    rows: list[Component] = []
    try:
        # One manager per plugin, so that an exception in a hook affects that plugin alone.
        manager = pluggy.PluginManager("alignkit")
        manager.add_hookspecs(hookspecs)
        manager.register(entry.load(), name=entry.name)
        manager.check_pending()
        for kind in KINDS:

            def register(name: str, target: str, help: str, kind: str = kind) -> None:
                name = _checked_name(kind, name)
                if not re.fullmatch(r"[\w.]+:\w+", target):
                    raise ValueError(f'{kind} {name}: found target {target!r}, expected "module:Attribute"')
                rows.append(Component(kind, name, help, target, entry.name, *distribution))

            def register_recipe(name: str, path: Path) -> None:
                name = _checked_name("recipe", name)
                rows.append(Component("recipe", name, _about_recipe(name, path), str(path), entry.name, *distribution))

            hook = getattr(manager.hook, f"register_{plural(kind)}")
            hook(register=register_recipe if kind == "recipe" else register)
    except (Exception, SystemExit) as error:
        rows = [Component("plugin", normalise(entry.name), "", entry.value, entry.name, *distribution, _reason(error))]
    yield from rows


def _checked_name(kind: str, name: str) -> str:
    """Return a name that a plugin registers, normalised. Raises ValueError for one that cannot be registered."""
    name = normalise(name)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"{kind} name {name!r} is not snake_case")
    if kind == "command" and name in OWN_COMMANDS:
        raise ValueError(f"command {name} is registered by alignkit itself; choose another name")
    if kind == "recipe" and name == PAPER:
        raise ValueError(f"recipe {PAPER}: this name stands for no recipe; choose another name")
    return name


def _about_recipe(name: str, path: Path) -> str:
    """Return "ALGORITHM: COMMENT" from the file of a recipe, with its first comment; raises for an unusable file."""
    text = read_text(path)
    algorithm = parse_toml(text).get("algorithm", {}).get("name")
    if not algorithm:
        raise ValueError(f"recipe {name}: {path} names no algorithm; write [algorithm] with name = ...")
    comments = (line.strip("# ") for line in text.splitlines() if line.startswith("#"))
    return f"{algorithm}: {next(comments, '')}"


def _reason(error: BaseException) -> str:
    """Return type and message of `error` on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _is_subclass(target: object, expected: type) -> bool:
    return isinstance(target, type) and issubclass(target, expected)
