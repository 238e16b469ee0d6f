"""The view of a run in the cell of a notebook."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from alignkit.page import notebook as module
from alignkit.runs.cell import CellDisplay
from page_fixtures import EVIL, Elements, plain, rows

Outputs = list[list[dict[str, str]]]


def update(display: CellDisplay, step: int, **metrics: float) -> None:
    display.update(step, {"reward": 0.5, "loss": -0.25, "reward/part": 0.1, "seconds": 1.0} | metrics, 1.0)


def last(outputs: Outputs) -> str:
    return plain(outputs[-1][-1]["text/html"])


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Displays that are replaced as often as possible."""
    monkeypatch.setattr(module, "INTERVAL", 0.0)


def test_one_output_is_replaced_in_place_from_loading_to_the_end(notebook: Outputs, always: None) -> None:
    with CellDisplay("draft on shapes", Path("runs/one"), 2, warmup=1) as display:
        assert "draft on shapes in runs/one loading" in last(notebook)
        display.stage("measuring 8 held-out prompts before training")
        display.record({"step": 0, "evaluation": rows(0)})
        assert "measuring 8" in last(notebook) and "shine 1 0.500" in last(notebook)
        update(display, 0)
        assert "warm-up 1/1, 0:00:" in last(notebook)
        update(display, 1, reward=0.25)
        assert "update 1 of 2, 0:00:" in last(notebook) and notebook[0][-1]["text/plain"].endswith("reward 0.25")
        assert "reward 0.250 0.375 █▁ loss" in last(notebook) and "reward/part" not in last(notebook)
        assert 'value="0.5000"' in notebook[0][-1]["text/html"]
        update(display, 2)
        display.record({"step": 2, "exported": 2, "weights": "last", "text": "exports the weights of update 2"})
        display.record({"step": 2, "evaluation": rows(20)})
        display.record({"step": 2, "verdict": "no sign", "text": "no sign of reward hacking"})
        display.results({"report": Path("runs/one/report.html")}, ["alignkit", "sample"])
    assert len(notebook) == 1
    for part in ("finished in 0:00: 2 updates", "no sign of reward hacking", "report: runs/one/report.html"):
        assert part in last(notebook)
    assert "shine 2 0.500 0.700 +0.200 [+0.150, +0.250]" in last(notebook)


def test_updates_that_follow_fast_are_shown_a_few_times_a_second(notebook: Outputs) -> None:
    with CellDisplay("draft", Path("run"), 1000) as display:
        for step in range(1, 900):
            update(display, step)
    assert len(notebook[0]) < 100 and "stopped after 0:0" in last(notebook)
    assert "at update 899 of 1000" in last(notebook) and 'alignkit.load(resume="run")' in last(notebook)


def test_an_error_or_an_interrupt_ends_the_view_as_stopped(notebook: Outputs) -> None:
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), CellDisplay("draft", Path("run"), 2):
            raise error
        assert "stopped after 0:00 at update 0 of 2" in last(notebook) and "resume" not in last(notebook)


def test_values_that_are_not_finite_and_many_warnings_have_a_place(notebook: Outputs, always: None) -> None:
    with CellDisplay("draft", Path("run"), 2) as display:
        update(display, 1, loss=math.nan)
        for number in range(8):
            display.record({"step": 1, "warning": f"odd {number}"})
    assert "loss n/a n/a" in last(notebook)
    assert "3 earlier warnings" in last(notebook) and "odd 2" not in last(notebook) and "odd 3" in last(notebook)


@pytest.mark.parametrize("text", EVIL)
def test_texts_inject_no_element(text: str, notebook: Outputs, always: None) -> None:
    row: dict[str, Any] = {"reward": text, "num_steps": 1, "count": 9, "before": 0.5, "held_out": True}
    with CellDisplay(text, Path("folder"), 4) as display:
        update(display, 1, **{f"{text}_loss": 0.1})
        display.record({"step": 1, "point": [row]})
        display.record({"step": 1, "verdict": "hacking", "text": text})
        display.record({"step": 1, "warning": text})
        display.stage(text)
        cell = notebook[0][-1]["text/html"]
    found = Elements(cell).found
    assert {tag for tag, _ in found} <= {
        "b", "bdi", "code", "div", "progress", "small", "table", "tbody", "td", "th", "thead", "tr",
    }  # fmt: skip
    assert {name for _, attributes in found for name in attributes} <= {"max", "style", "title", "value"}
    assert len(cell.encode()) < 40_000 and plain(cell).count(" ".join(text[:20].split()).replace("\ud83c", "?")) >= 5
