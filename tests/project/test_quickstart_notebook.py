"""The notebook of examples/: its cells run, and it is committed with what they show."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import alignkit
from alignkit.runs.run import Run
from page_fixtures import plain

PATH = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"
TEXT = PATH.read_text(encoding="utf-8")
CELLS = [cell for cell in json.loads(TEXT)["cells"] if cell["cell_type"] == "code"]


def outputs(cells: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return the outputs of cells by MIME type; fails for an error or anything printed on stderr."""
    found = []
    for cell in cells:
        for output in cell["outputs"]:
            assert output["output_type"] in ("display_data", "execute_result"), output
            found.append({kind: "".join(text) for kind, text in output["data"].items()})
    return found


def check(cells: list[dict[str, Any]]) -> None:
    """Fail unless every cell has the output that belongs to it."""
    assert all(cell["outputs"] for cell in cells)
    shown = outputs(cells)
    html = [plain(data["text/html"]) for data in shown]
    for part in ("Not trained yet", "finished in", "updates 24 of 24", "done in", "95 % interval", "a green heart"):
        assert any(part in text for text in html), part
    images = [data["text/html"].count("data:image/") for data in shown]
    assert sum(images) == 1 + 3


def test_the_committed_notebook_has_its_outputs_and_no_path_of_a_machine() -> None:
    check(CELLS)
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    assert len(TEXT.encode()) < 1_000_000
    for text in [plain(data.get("text/html", "")) + data["text/plain"] for data in outputs(CELLS)]:
        assert not re.search(r"/(home|root|tmp|usr|work|Users)/|[A-Z]:\\", text), text


def test_its_cells_run_on_a_tiny_model(tiny_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    small = {"algorithm.name": "ddpo", "algorithm.samples": 2, "algorithm.baseline": "batch", "train.updates": 1}

    run = tiny_run(overrides=small | {"evaluate.steps": [1, 2]})

    def load(overrides: dict[str, Any]) -> Run:
        given.append(overrides)
        return run

    real = alignkit.load
    monkeypatch.setattr(alignkit, "load", load)
    scope: dict[str, Any] = {}
    for cell in CELLS:
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, PATH.name, "exec"), scope)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), PATH.name, "eval"), scope)
            assert hasattr(value, "_repr_html_")
    assert scope["update"].step == 1 and len(scope["images"]) == 3 and scope["rows"]
    assert [real(overrides=settings).config.train.updates for settings in given] == [24]


@pytest.mark.long
@pytest.mark.filterwarnings("default")  # those of the kernel's client are not ours
def test_it_runs_in_a_kernel_and_shows_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (extra dev)")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (extra dev)")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed (extra dev)")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")
    notebook = nbformat.reads(TEXT, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbclient.NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    check([cell for cell in notebook.cells if cell.cell_type == "code"])
