from __future__ import annotations

import tomllib
from importlib.metadata import entry_points, version
from pathlib import Path

import alignkit
from alignkit.page.template import TEMPLATES
from alignkit.registry import default_registry
from alignkit.serving.chooser import TEMPLATES as PREFER

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {path.name for path in (ROOT / "plugins").glob("alignkit_*") if path.is_dir()}


def test_each_plugin_folder_is_a_package_of_the_wheel() -> None:
    packages = set(PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    assert packages == {"alignkit"} | {f"plugins/{name}" for name in FOLDERS}


def test_each_plugin_folder_is_an_entry_point() -> None:
    assert PYPROJECT["project"]["entry-points"]["alignkit"] == {name: name for name in FOLDERS}


def test_the_installed_entry_points_are_those_of_the_project_file() -> None:
    ours = {entry.name for entry in entry_points(group="alignkit") if entry.dist and entry.dist.name == "alignkit"}
    assert ours == FOLDERS


def test_a_recipe_lies_in_the_package_of_its_plugin_and_so_in_the_wheel() -> None:
    ours = [row for row in default_registry().components("recipe") if row.distribution == "alignkit"]
    assert ours
    for row in ours:
        assert Path(row.target).is_relative_to(ROOT / "plugins" / row.plugin), row.target


def test_the_templates_of_pages_lie_in_their_packages_and_so_in_the_wheel() -> None:
    assert TEMPLATES.is_relative_to(ROOT / "alignkit")
    names = {"page.html", "macros.html", "style.css", "script.js", "cells.html", "plot.svg"}
    assert {path.name for path in TEMPLATES.iterdir()} == names
    assert PREFER.is_relative_to(ROOT / "alignkit")
    assert {path.name for path in PREFER.iterdir()} == {"prefer.html", "prefer.css", "prefer.js"}


def test_the_installed_version_is_that_of_the_package() -> None:
    assert version("alignkit") == alignkit.__version__


def test_the_core_imports_no_plugin() -> None:
    for path in (ROOT / "alignkit").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert "import alignkit_" not in source and "from alignkit_" not in source, path
