"""Runs in a notebook: progress in the cell, and what runs, samples and evaluations show."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import alignkit
from alignkit.commands.evaluate import evaluate
from alignkit.errors import AlignkitError
from alignkit.evaluation.rows import Row
from alignkit.runs.run import Run
from page_fixtures import EVIL, plain

MakeRun = Callable[..., Run]
Outputs = list[list[dict[str, str]]]
SMALL: dict[str, Any] = {
    "algorithm.name": "ddpo", "algorithm.samples": 2, "algorithm.baseline": "batch", "train.updates": 2,
    "evaluate.steps": [1],
}  # fmt: skip


def test_training_and_evaluation_show_their_progress_in_the_cell(tiny_run: MakeRun, notebook: Outputs) -> None:
    run = tiny_run(overrides=SMALL)
    assert repr(run) == f"<Run {run.folder}: {run.title}, update 0 of 2>"
    assert run.title.startswith("ddpo on ") and run.title.endswith(" for brightness")
    assert "Not trained yet." in plain(run._repr_html_())
    for update in run.train():
        assert repr(run).endswith(f"update {update.step} of 2>")
    (training,) = notebook
    assert "finished in" in plain(training[-1]["text/html"]) and len(training) > 3
    assert all(any(stage in one["text/plain"] for one in training) for stage in ("loading", "before training"))
    assert "updates 2 of 2" in plain(run._repr_html_()) and run.plot().charts[0].title == "reward"
    rows = evaluate([run])
    assert len(notebook) == 2 and "done in" in notebook[1][-1]["text/plain"]
    assert "prompts reward steps before after" in plain(rows._repr_html_())
    frame = rows.to_frame()
    assert list(frame["reward"]) == [row.reward for row in rows]
    assert frame["difference"].dtype == float and {"reward", "low", "high"} <= set(frame.columns)


def test_a_run_that_is_stopped_says_how_to_go_on_and_goes_on(tiny_run: MakeRun, notebook: Outputs) -> None:
    run = tiny_run(overrides=SMALL)
    for _ in run.train():
        run.stop()
    shown = plain(notebook[0][-1]["text/html"])
    assert "at update 1 of 2" in shown and f'resume with: alignkit.load(resume="{run.folder}")' in shown
    assert len(list(alignkit.load(resume=run.folder).train())) == 1
    assert "finished" in notebook[1][-1]["text/plain"] and "▁" in notebook[1][-1]["text/html"]


def test_progress_can_be_left_out_or_go_elsewhere(
    tiny_run: MakeRun, notebook: Outputs, capsys: pytest.CaptureFixture[str]
) -> None:
    (run := tiny_run(overrides=SMALL | {"train.updates": 1})).stop()
    list(run.train(progress=False))
    console = Console(file=io.StringIO())
    list(alignkit.load(resume=run.folder).train(console))
    assert notebook == [] and console.file.getvalue()  # type: ignore[attr-defined]
    evaluate([run], seen=False, progress=False)
    assert notebook == [] and capsys.readouterr().out == ""


def test_without_a_notebook_progress_is_shown_on_request_alone(
    tiny_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    list(tiny_run("one", SMALL).train())
    assert capsys.readouterr().out == ""
    list(tiny_run("two", SMALL).train(progress=True))
    assert "2/2" in capsys.readouterr().out


def test_samples_are_a_list_that_keeps_its_prompts_when_it_is_sorted(tiny_run: MakeRun) -> None:
    images = tiny_run().sample([EVIL[0], "a green heart"], steps=1)
    assert isinstance(images, list) and len(images) == 2
    assert "<script" not in images._repr_html_()
    assert plain(images._repr_html_()) == f"{EVIL[0]} a green heart"
    images.sort(key=lambda image: -float(np.asarray(image).mean()) * (image.info["prompt"] != EVIL[0]))
    assert plain(images._repr_html_()) == f"a green heart {EVIL[0]}"


def test_a_folder_of_another_run_is_not_this_run(tiny_run: MakeRun) -> None:
    list(tiny_run(overrides=SMALL).train())
    other = tiny_run(overrides=SMALL)
    assert repr(other).endswith("update 0 of 2>") and "Not trained yet." in plain(other._repr_html_())
    with pytest.raises(AlignkitError, match="has no update yet"):
        other.plot()


def test_a_data_frame_needs_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    from alignkit.commands.evaluate import Evaluation

    rows = Evaluation([Row("reward", 1, 9, 0.5)])
    assert rows == [Row("reward", 1, 9, 0.5)] and rows.to_frame().loc[0, "before"] == 0.5
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(AlignkitError, match="install it with: pip install pandas"):
        rows.to_frame()
