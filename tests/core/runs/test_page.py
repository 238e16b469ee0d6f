"""The page that a run writes when it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from alignkit.cli.app import app
from alignkit.errors import AlignkitError
from alignkit.runs.run import Run

MakeRun = Callable[..., Run]
SMALL: dict[str, Any] = {
    "algorithm.name": "ddpo", "algorithm.samples": 2, "algorithm.baseline": "batch", "train.updates": 2,
}  # fmt: skip
POINTS = {"evaluate.points": 1, "evaluate.points_limit": 2}

pytestmark = pytest.mark.usefixtures("pages")


def test_a_run_writes_its_page_when_it_ends(tiny_run: MakeRun) -> None:
    run = tiny_run(overrides=SMALL | POINTS)
    list(run.train())
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    for part in ("2 of 2 updates", "Exports the average weights", "a black heart", "brightness"):
        assert part in page
    assert page.count("<img src") >= 2 * 2 * 2
    assert "Not on this page" not in page


def test_a_run_that_is_stopped_writes_a_page_of_what_there_is_and_another_when_it_has_gone_on(
    tiny_run: MakeRun,
) -> None:
    import alignkit

    run = tiny_run(overrides=SMALL | POINTS)
    for _ in run.train():
        run.stop()
    page, samples = run.folder / "report.html", run.folder / "samples"
    assert "The run has not ended: 1 of 2 updates" in page.read_text(encoding="utf-8")
    assert [path.name for path in sorted(samples.iterdir())] == ["000000.png", "stopped.png"]
    list(alignkit.load(resume=run.folder).train())
    assert "2 of 2 updates" in page.read_text(encoding="utf-8")
    assert [path.name for path in sorted(samples.iterdir())] == ["000000.png", "000002.png"]


@pytest.mark.parametrize("points", [0, 2])
def test_a_run_that_is_stopped_has_images_of_then_and_now_and_its_page_shows_images(
    tiny_run: MakeRun, points: int
) -> None:
    run = tiny_run(overrides=SMALL | {"train.learning_rate": 0.05, "evaluate.points": points, "evaluate.steps": [1]})
    next(updates := run.train())
    updates.close()  # as a stop
    with Image.open(run.folder / "samples" / "stopped.png") as grid:
        assert grid.size == (4 + 2 * 132, 18 + (5 if points else 2) * 168 + 18 + 4)
        before, after = (grid.crop((left, 36, left + 128, 164)).tobytes() for left in (4, 136))
    assert before != after
    if points:
        first = run.folder / "points" / "000000" / "000_1steps.png"
        with Image.open(first) as image:
            assert image.resize((128, 128), Image.Resampling.NEAREST).tobytes() == before
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert ("The newest image grid of the run" in page) == (points == 0) and "<img" in page


def test_a_run_that_an_error_ends_writes_a_page_of_what_there_is(
    tiny_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(overrides=SMALL)

    def fails(*_: object, **__: object) -> None:
        raise AlignkitError("no room")

    with pytest.raises(AlignkitError, match="no room"):
        for _ in run.train():
            monkeypatch.setattr("alignkit.training.trainer.Trainer.round", fails)
    assert "1 of 2 updates" in (run.folder / "report.html").read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_is_a_warning_of_the_run(
    tiny_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(records: object) -> str:
        raise MemoryError("too large")

    monkeypatch.setattr("alignkit.page.page.render", fails)
    console = Console(file=StringIO(), width=200)
    run = tiny_run(overrides=SMALL)
    assert len(list(run.train(console))) == 2
    text = "report.html was not written (MemoryError: too large); try again with: alignkit report"
    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [text in record.get("warning", "") for record in records].count(True) == 1
    assert console.file.getvalue().count(text) == 1  # type: ignore[attr-defined]


def test_the_command_writes_a_page_of_several_runs(tiny_run: MakeRun, tmp_path: Path) -> None:
    runs = [tiny_run(name, SMALL | POINTS | {"seed": seed}) for seed, name in enumerate(("one", "two"))]
    for run in runs:
        list(run.train())
    out = tmp_path / "both.html"
    arguments = ["report", *(str(run.folder) for run in runs), "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and result.stdout.strip() == str(out)
    page = out.read_text(encoding="utf-8")
    assert "Win rates" in page and page.count("one before training") and page.count("two before training")
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 1 and "no metrics.jsonl here" in result.stderr
