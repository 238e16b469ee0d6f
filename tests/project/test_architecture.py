"""Check the arrows between modules, read from the imports of the code itself."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "alignkit"

FLOORS = (
    ("errors", "records"),
    ("files", "interfaces", "hookspecs"),
    ("imports", "registry", "diffusion", "rollout", "advantage", "groups"),
    ("data", "distillation"),
    ("config",),
    ("models",),
    ("rewards",),
    ("training", "evaluation"),
    ("page",),
    ("runs",),
    ("testing",),
    ("commands", "serving"),
    ("cli",),
)
"""Rooms of the core from the ground up. A module imports from its own room and from lower floors alone."""
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
DOORS = {"", "__main__"}
"""The package itself, which forwards its public names, those above `interfaces` lazily, and `python -m alignkit`."""


def name_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path, ROOT): path for path in CORE.rglob("*.py")}
PLUGINS = sorted(path.name for path in (ROOT / "plugins").glob("alignkit_*") if path.is_dir())


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, anywhere in it: inside of functions and for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            for alias in node.names:  # `from package import module` is an arrow to that module
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


@functools.cache
def arrows() -> dict[str, list[str]]:
    """Return the modules of the core that each of them imports."""
    return {name: sorted({i for i in imports(path) if i in MODULES} - {name}) for name, path in MODULES.items()}


def room(module: str) -> str:
    return module.removeprefix("alignkit").removeprefix(".").partition(".")[0]


def test_the_top_of_the_core_stays_small() -> None:
    assert len(list(CORE.glob("*.py"))) <= 14


def test_every_module_belongs_to_a_floor() -> None:
    assert {room(name) for name in MODULES} - DOORS == set(FLOOR)


@pytest.mark.parametrize("module", [name for name in sorted(MODULES) if room(name) not in DOORS])
def test_no_arrow_runs_up(module: str) -> None:
    own = FLOOR[room(module)]
    up = [to for to in arrows()[module] if room(to) and FLOOR[room(to)] > own]
    across = [to for to in arrows()[module] if room(to) and FLOOR[room(to)] == own and room(to) != room(module)]
    assert not up + across, f"{module} (floor {own}) imports {up + across}"


def test_the_core_takes_only_the_version_from_the_package_itself() -> None:
    # Its other names stand for modules of every floor.
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "alignkit" and room(name) not in DOORS:
                names = {alias.name for alias in node.names if f"alignkit.{alias.name}" not in MODULES}
                assert names <= {"__version__"}, f"{path}: {names}"


def test_there_is_no_circle_of_imports() -> None:
    TopologicalSorter({name: [to for to in to_names] for name, to_names in arrows().items() if room(name)}).prepare()


def test_only_the_models_folder_knows_a_class_of_policy() -> None:
    # The rest of the core finds it in the registry, so that a plugin can bring another.
    named = [name for name, path in MODULES.items() if "DiffusersPolicy" in path.read_text(encoding="utf-8")]
    assert named == ["alignkit.models.diffusers_policy"]


@pytest.mark.parametrize("plugin", PLUGINS)
def test_no_plugin_imports_another(plugin: str) -> None:
    for path in (ROOT / "plugins" / plugin).rglob("*.py"):
        others = {module.partition(".")[0] for module in imports(path)} & (set(PLUGINS) - {plugin})
        # The tools that made the embedded world are no part of its plugin.
        assert not others or "build" in path.parts, f"{path.relative_to(ROOT)} imports {others}"


@pytest.mark.parametrize(
    ("call", "file"),
    [
        (r"\bImage\.open\(", "alignkit/data/decode.py"),
        (r"\btomllib\.loads?\(", "alignkit/files.py"),
        (r"\bhttpx2\.(Async)?Client\(|\burlopen\(|\brequests\.", "plugins/alignkit_rewards/endpoint.py"),
        (r"\bimport_module\(module", "alignkit/imports.py"),
    ],
)
def test_what_strangers_send_enters_through_one_door(call: str, file: str) -> None:
    paths = [path for folder in ("alignkit", "plugins") for path in (ROOT / folder).rglob("*.py")]
    found = [p.relative_to(ROOT).as_posix() for p in paths if re.search(call, p.read_text(encoding="utf-8"))]
    assert [name for name in found if name != "alignkit/registry.py"] == [file]
