"""Import the code that a setting names as "package.module:Name", and find the place that it would come from.

A field says that it names code, or a variable with a token, by its annotation, so that a run file from a stranger can
be looked through before anything is imported or sent.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import site
import sys
import sysconfig
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.metadata import distributions
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

from alignkit.files import parse_json

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


@dataclass(frozen=True)
class Code:
    """Annotation of a field that names code, as "package.module:Name"."""


@dataclass(frozen=True)
class Token:
    """Annotation of a field that names the environment variable of a token, which is sent to an address."""

    url: str
    """The field with that address."""


CodeName = Annotated[str, Code()]


@dataclass(frozen=True)
class Origin:
    """The place that code would be imported from."""

    place: str
    """The file, or a note that there is none."""
    installed: bool
    """Whether it is part of an installed distribution."""


def is_name(text: str) -> bool:
    """Whether `text` has the form "package.module:Name"."""
    return _NAME.fullmatch(text) is not None


def import_name(text: str) -> Any:
    """Import what `text` names as "package.module:Name", from installed distributions or the working folder.

    Raises ValueError for another form, and whatever the module raises while it is imported.
    """
    if not is_name(text):
        raise ValueError(f'found {text[:100]!r}, expected "package.module:Name"')
    _search_working_folder()
    module, _, name = text.partition(":")
    return getattr(importlib.import_module(module), name)


def origin(text: str) -> Origin:
    """Return the place that `import_name` would import from. Imports nothing."""
    _search_working_folder()
    module = text.partition(":")[0]
    spec = _find(module)
    file = spec.origin if spec else None
    if file is None or not Path(file).is_absolute():
        return Origin("no file" if spec is None else f"Python itself ({file})", False)
    path = Path(os.path.realpath(file))
    top = module.partition(".")[0]
    declared = any(path.is_relative_to(folder) and top in names for folder, names in _editable())
    return Origin(str(path), declared or any(path.is_relative_to(folder) for folder in _installed()))


def _search_working_folder() -> None:
    """Let Python look into the working folder, after everything else: the command `alignkit` does not add it."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _find(module: str) -> ModuleSpec | None:
    """Find a module without importing it or the packages around it."""
    if (loaded := sys.modules.get(module)) is not None:
        return getattr(loaded, "__spec__", None)
    importlib.invalidate_caches()
    path: Any = None
    spec = None
    for end in [*(match.start() for match in re.finditer(r"\.", module)), len(module)]:
        try:
            found = (finder.find_spec(module[:end], path) for finder in sys.meta_path)
            spec = next((one for one in found if one is not None), None)
        except KeyError:  # a namespace within one, which Python finds only once the outer one is imported
            spec = ModuleSpec(module[:end], None, is_package=True)
        if spec is None:
            return None
        if spec.origin is None:  # a namespace: the folders of this name in all places
            name = module[:end].rpartition(".")[2]
            path = [place for entry in path or sys.path if os.path.isdir(place := os.path.join(entry, name))]
        else:
            path = spec.submodule_search_locations
    return spec


@functools.cache
def _installed() -> list[Path]:
    """Return the folders into which distributions are installed."""
    paths = sysconfig.get_paths()
    found = {paths["purelib"], paths["platlib"], *site.getsitepackages()}
    if site.ENABLE_USER_SITE:
        found.add(site.getusersitepackages())
    # One environment may borrow the distributions of another. The working folder is on the path too, and not one.
    further = [Path(os.path.realpath(entry)) for entry in sys.path if entry]
    borrowed = [one for one in further if one.name in ("site-packages", "dist-packages") and one != Path.cwd()]
    return [*(Path(os.path.realpath(path)) for path in found), *borrowed]


@functools.cache
def _editable() -> list[tuple[Path, set[str]]]:
    """Return the folder of each distribution that is installed in place, with the packages that it declares."""
    found = []
    for one in distributions():
        try:
            url = parse_json(one.read_text("direct_url.json") or "null")
            edited = isinstance(url, dict) and url.get("dir_info", {}).get("editable")
        except ValueError:
            continue
        if edited:
            names = {entry.value.partition(":")[0].partition(".")[0] for entry in one.entry_points}
            names |= set((one.read_text("top_level.txt") or "").split())
            folder = unquote(urlsplit(str(url.get("url", ""))).path)
            found.append((Path(os.path.realpath(folder)), names))
    return found
