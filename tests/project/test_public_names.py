"""Templates, examples and the Python of the docs import the public names of alignkit and nothing else of it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import alignkit

ROOT = Path(__file__).parents[2]
MODULES = {
    f"alignkit.{name}" for name in ("testing", "rollout", "advantage", "groups", "diffusion", "distillation", "errors")
}
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def sources() -> Iterator[tuple[str, str]]:
    """(where it stands, Python source) of all that users copy from."""
    for path in sorted((ROOT / "alignkit" / "commands" / "templates").glob("*.template")):
        if path.name.endswith(".py.template"):
            yield path.name, re.sub(r"\$\{?(\w+)\}?", r"\1", path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "examples").glob("*.py")):
        yield path.name, path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]):
        for number, block in enumerate(FENCE.findall(path.read_text(encoding="utf-8")), start=1):
            yield f"{path.relative_to(ROOT)}, block {number}", block


SOURCES = dict(sources())


def private(source: str) -> list[str]:
    """Yield the imports from alignkit that are not public."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    names = {f"alignkit.{name}" for name in alignkit.__all__} | MODULES | {"alignkit"}
    inside = [name for name in found if name.partition(".")[0] == "alignkit"]
    return [name for name in inside if name not in names and name.rpartition(".")[0] not in MODULES]


@pytest.mark.parametrize("path", sorted((ROOT / "plugins").rglob("*.py")), ids=lambda path: path.stem)
def test_a_plugin_imports_public_names_from_the_top(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [
        f"{node.module}.{alias.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("alignkit.")
        for alias in node.names
        if alias.name in alignkit.__all__
    ]
    assert found == []


def test_there_are_sources_of_every_sort() -> None:
    for sort in (".template", ".py", ".md, block"):
        assert any(sort in place for place in SOURCES)


@pytest.mark.parametrize("place", SOURCES)
def test_only_public_names_are_imported(place: str) -> None:
    assert private(SOURCES[place]) == []


def test_a_name_that_is_not_public_is_found() -> None:
    source = "import alignkit.registry\nfrom alignkit.records import Example\nfrom alignkit import reward, config"
    assert private(source) == ["alignkit.registry", "alignkit.records.Example", "alignkit.config"]
    assert private("from alignkit import Reward, diffusion\nfrom alignkit.testing import check_reward") == []
