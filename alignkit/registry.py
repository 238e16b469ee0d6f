"""Names to classes, lazily: who brought what, and what is broken.

Plugins are the entry points of the group `alignkit`. Each is imported on its own, so that one which fails leaves the
others working; the classes behind the names are imported only when one is asked for.
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
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pluggy

from alignkit import hookspecs, interfaces
from alignkit.errors import AlignkitError, PluginError

GROUP = "alignkit"
DISABLE = "ALIGNKIT_DISABLE_PLUGINS"
KINDS: dict[str, type] = {
    "algorithm": interfaces.Algorithm,
    "reward": interfaces.Reward,
    "sampler": interfaces.Sampler,
    "surrogate": interfaces.Surrogate,
    "regulariser": interfaces.Regulariser,
    "model": interfaces.ModelBundle,
}
RENAMED = {("reward", "shapes_reading"): "pixel_check"}
"""Components of earlier versions, and what they are called now."""


@dataclass(frozen=True)
class Component:
    """One registered name, or (kind "plugin") one plugin that could not be read."""

    kind: str
    name: str
    help: str
    target: str
    """"module:Attribute"."""
    plugin: str
    """The entry point's name, which ALIGNKIT_DISABLE_PLUGINS takes."""
    distribution: str
    version: str
    broken: str = ""
    """Why the plugin cannot be used; empty where it can."""

    @property
    def origin(self) -> str:
        return f"plugin {self.plugin} of {self.distribution} {self.version}".rstrip()


def normalise(name: str) -> str:
    """The snake_case form: "-" and "_" are the same."""
    return name.strip().replace("-", "_")


def nearest(name: str, names: Iterable[str]) -> str:
    """ "; did you mean X?" for the closest of `names`, or nothing where none is close."""
    names = list(names)
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.6)
    close = close or [known for known in names if name and known.startswith(f"{name.lower()}_")]
    return f"; did you mean {close[0]}?" if close else ""


class Registry:
    """The components of some plugins. Raises PluginError where two bring the same name."""

    def __init__(self, plugins: Iterable[EntryPoint]) -> None:
        self._rows: dict[tuple[str, str], Component] = {}
        self._added: dict[tuple[str, str], Any] = {}
        for entry in sorted(plugins, key=lambda e: e.name):
            for row in _read(entry):
                other = self._rows.setdefault((row.kind, row.name), row)
                if other is not row:
                    raise PluginError(
                        f"{row.kind} {row.name} is brought by {other.origin} and by {row.origin}; "
                        f"leave one out with {DISABLE}={row.plugin}"
                    )

    def add(self, row: Component, target: Any) -> None:
        """A component of this process alone, whose class is handed over. It replaces one that was added before; raises
        PluginError where a plugin has the name."""
        key = row.kind, row.name
        if key in self._rows and key not in self._added:
            raise PluginError(f"{row.kind} {row.name} is brought by {self._rows[key].origin}; choose another name")
        self._rows[key], self._added[key] = row, target

    def components(self, kind: str | None = None) -> list[Component]:
        """All rows of one kind (or of every kind), broken plugins included, sorted."""
        order = [*KINDS, "plugin"]
        rows = (row for row in self._rows.values() if kind in (None, row.kind) or row.broken)
        return sorted(rows, key=lambda row: (order.index(row.kind), row.name))

    def named(self, name: str) -> list[Component]:
        """The working rows of this name, of whatever kind."""
        return [row for row in self.components() if row.name == normalise(name) and not row.broken]

    def find(self, kind: str, name: str) -> Component:
        """The row of a name, without importing its class. Raises AlignkitError with the nearest name."""
        if found := self._rows.get((kind, normalise(name))):
            return found
        names = [row.name for row in self.components(kind) if not row.broken]
        others = sorted(row.kind for row in self.named(name))
        if now := RENAMED.get((kind, normalise(name))):
            raise AlignkitError(f"{kind} {name!r} was renamed; write {now}")
        hint = f" (there is a {' and a '.join(others)} of this name)" if others else nearest(normalise(name), names)
        broken = [f"; {row.origin} is broken: {row.broken}" for row in self.components() if row.broken]
        raise AlignkitError(f"unknown {kind} {name!r}{hint} (`alignkit list {kind}s` shows all){''.join(broken)}")

    def get(self, kind: str, name: str) -> Any:
        """The class of a component, or the ModelBundle of a model, imported now.

        Raises AlignkitError for an unknown name and PluginError for a target that does not import or does not fit.
        """
        row = self.find(kind, name)
        if (kind, row.name) in self._added:
            return self._added[kind, row.name]
        what = f"{kind} {row.name} ({row.target}, {row.origin})"
        module, _, attribute = row.target.partition(":")
        try:
            target = getattr(importlib.import_module(module), attribute)
            if kind == "model" and callable(target):
                target = target()
        except Exception as error:
            raise PluginError(f"{what} does not import: {_reason(error)}") from error
        expected = KINDS[kind]
        fits = isinstance(target, expected) if kind == "model" else _is_subclass(target, expected)
        if not fits:
            raise PluginError(f"{what} is no alignkit.interfaces.{expected.__name__}")
        if inspect.isabstract(target):
            raise PluginError(f"{what} lacks {', '.join(sorted(target.__abstractmethods__))}")
        return target


@functools.cache
def default_registry() -> Registry:
    """The plugins installed here, without those that ALIGNKIT_DISABLE_PLUGINS lists (entry point names, by comma)."""
    disabled = {normalise(name) for name in os.environ.get(DISABLE, "").split(",")}
    return Registry(entry for entry in entry_points(group=GROUP) if normalise(entry.name) not in disabled)


def whose(error: BaseException) -> str:
    """The plugin in whose code `error` was raised, or through which it passed last; empty where there is none."""
    packages = {row.target.partition(":")[0].partition(".")[0]: row.origin for row in default_registry().components()}
    frames = traceback.walk_tb(error.__traceback__)
    found = [packages.get(str(frame.f_globals.get("__name__", "")).partition(".")[0]) for frame, _ in frames]
    return next((origin for origin in reversed(found) if origin), "")


def where(error: BaseException) -> str:
    """The line that raised `error`, as "reward.py, line 7": the last one that is no installed library's and not the
    core's, else the last one in code of a plugin, else the very last."""
    packages = {row.target.partition(":")[0].partition(".")[0] for row in default_registry().components()}
    frames = list(traceback.walk_tb(error.__traceback__))
    modules = [str(frame.f_globals.get("__name__", "")).partition(".")[0] for frame, _ in frames]
    files = [Path(frame.f_code.co_filename) for frame, _ in frames]
    own = [i for i, file in enumerate(files) if "site-packages" not in file.parts and modules[i] != "alignkit"]
    best = (own or [i for i, module in enumerate(modules) if module in packages] or range(len(frames)))[-1]
    return f"{files[best].name}, line {frames[best][1]}"


def _read(entry: EntryPoint) -> Iterator[Component]:
    """What one plugin registers, or the one row that says why it is broken."""
    distribution = (entry.dist.name, entry.dist.version) if entry.dist else ("an unknown distribution", "")
    rows: list[Component] = []
    try:
        # A manager of its own for each plugin, so that what one hook raises ends that plugin and no other.
        manager = pluggy.PluginManager("alignkit")
        manager.add_hookspecs(hookspecs)
        manager.register(entry.load(), name=entry.name)
        manager.check_pending()
        for kind in KINDS:

            def register(name: str, target: str, help: str, kind: str = kind) -> None:
                name = normalise(name)
                if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                    raise ValueError(f"{kind} name {name!r} is not snake_case")
                if not re.fullmatch(r"[\w.]+:\w+", target):
                    raise ValueError(f'{kind} {name}: found target {target!r}, expected "module:Attribute"')
                rows.append(Component(kind, name, help, target, entry.name, *distribution))

            getattr(manager.hook, f"register_{kind}s")(register=register)
    except (Exception, SystemExit) as error:
        rows = [Component("plugin", normalise(entry.name), "", entry.value, entry.name, *distribution, _reason(error))]
    yield from rows


def _reason(error: BaseException) -> str:
    """One line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _is_subclass(target: object, expected: type) -> bool:
    return isinstance(target, type) and issubclass(target, expected)
