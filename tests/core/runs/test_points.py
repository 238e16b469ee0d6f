"""Points of a run: what is measured and kept at them."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import alignkit
from alignkit.errors import AlignkitError, TransientError
from alignkit.evaluation.measure import Measurement
from alignkit.records import Example
from alignkit.runs.points import Points, planned, write_point
from alignkit.runs.run import Run
from alignkit.training import checkpoint
from points_fixtures import LCD, LORA, choice_of, points, prefer
from run_fixtures import PROMPTS, assert_same, assert_same_but_surroundings, metrics

MakeRun = Callable[..., Run]


def points_of(folder: Path) -> dict[int, list[dict[str, Any]]]:
    return {record["step"]: record["point"] for record in metrics(folder) if "point" in record}


@pytest.mark.parametrize(
    ("count", "updates", "expected"),
    [
        (10, 100, [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]),
        (10, 128, [13, 26, 39, 52, 64, 77, 90, 103, 116, 128]),
        (3, 10, [4, 7, 10]),
        (10, 4, [1, 2, 3, 4]),
        (1, 7, [7]),
        (10, 0, []),
        (0, 9, []),
    ],
)
def test_points_are_evenly_spaced_and_end_with_the_run(count: int, updates: int, expected: list[int]) -> None:
    assert planned(count, updates) == expected


def test_a_point_keeps_images_scores_and_weights(tiny_run: MakeRun, steady: Any) -> None:
    run = tiny_run(overrides=points())
    console = Console(file=StringIO(), width=200)
    list(run.train(console))
    folder = run.folder / "points"
    assert sorted(p.name for p in folder.iterdir()) == ["000000", "000002", "000004"]
    names = {f"{p:03d}_{k}steps.png" for p in range(len(PROMPTS)) for k in (1, 2)}
    assert {p.name for p in (folder / "000000").iterdir()} == {*names, "scores.json"}
    assert {p.name for p in (folder / "000002").iterdir()} == {*names, "scores.json", LORA}
    found = points_of(run.folder)
    assert list(found) == [0, 2, 4]
    for step, rows in found.items():
        scores = json.loads((folder / f"{step:06d}" / "scores.json").read_text())
        assert {entry["file"] for entry in scores} == names
        assert [entry["prompt"] for entry in scores[::2]] == PROMPTS
        assert {name for entry in scores for name in entry["scores"]} == {"reward", "brightness", "steady"}
        for row in rows:
            values = [entry["scores"][row["reward"]] for entry in scores if entry["steps"] == row["num_steps"]]
            mean = row["after"] if step else row["before"]
            assert row["count"] == 5 and np.mean(values) == pytest.approx(mean, abs=1e-6)
            assert (row["difference"] is None) == (step == 0)
            assert row["held_out"] == (row["reward"] == "steady")
    for entry in json.loads((folder / "000004" / "scores.json").read_text()):
        with Image.open(folder / "000004" / entry["file"]) as image:
            brightness = np.asarray(image).mean() / 255
        assert brightness == pytest.approx(entry["scores"]["brightness"], abs=1e-5)
    assert isinstance(console.file, StringIO)
    shown = [line for line in console.file.getvalue().splitlines() if line.startswith("point ")]
    assert len(shown) == 3 and shown[0].startswith("point 0/4  reward 0.") and "(" not in shown[0]
    assert shown[-1].startswith("point 4/4  reward 0.") and shown[-1].endswith(
        "; steady 0.500 (+0.000), 0.500 (+0.000) at 1, 2 steps"
    )


def test_the_prompts_of_points_are_those_at_the_end_of_the_file(tiny_run: MakeRun) -> None:
    def texts(overrides: dict[str, Any]) -> list[str]:
        return [example.text for example in tiny_run(overrides=overrides).point_examples()]

    assert texts({"evaluate.points": 1, "evaluate.points_limit": 3}) == PROMPTS[-3:]
    assert texts({"evaluate.points": 1}) == PROMPTS
    assert texts({"evaluate.points": 0}) == texts({"evaluate.points": 1, "train.updates": 0}) == []
    assert texts({"evaluate.points": 1, "evaluate.prompts": ""}) == []


@pytest.mark.parametrize(
    "overrides",
    [
        {"evaluate.points": 0},
        {"evaluate.prompts": ""},
        {**LCD, "reward": [], "evaluate.rewards": []},
        {"train.updates": 0},
    ],
    ids=["off", "no prompts", "no rewards", "no updates"],
)
def test_without_prompts_or_rewards_there_are_quietly_no_points(
    tiny_run: MakeRun, steady: Any, overrides: dict[str, Any]
) -> None:
    run = tiny_run(overrides=points({"train.updates": 1, **overrides}))
    list(run.train())
    assert not (run.folder / "points").exists() and not points_of(run.folder)
    assert choice_of(run.folder)["weights"] == "average"


@pytest.mark.parametrize("stopped", [2, 3])
def test_a_stopped_run_has_the_points_of_an_unbroken_one(
    tiny_run: MakeRun, steady: Any, stopped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer(2, monkeypatch)
    unbroken, broken = tiny_run("unbroken", points()), tiny_run("broken", points())
    list(unbroken.train())
    for update in broken.train():
        if update.step == stopped:
            broken.stop()
    list(alignkit.load(resume=broken.folder).train())
    assert list(points_of(broken.folder)) == [0, 2, 4] and choice_of(broken.folder)["exported"] == 2
    assert_same(unbroken.folder, broken.folder)


@pytest.mark.parametrize(
    ("point", "error"),
    [(1, TransientError("no server")), (2, TransientError("no server")), (2, KeyboardInterrupt())],
    ids=["server, in the middle", "server, at the end", "Ctrl-C twice, at the end"],
)
def test_a_run_that_breaks_off_in_a_point_goes_on_to_the_same_end(
    tiny_run: MakeRun, steady: Any, point: int, error: BaseException
) -> None:
    settings = points({"evaluate.every": 2, "evaluate.batch_size": 4})
    unbroken, broken = tiny_run("unbroken", settings), tiny_run("broken", settings)
    list(unbroken.train())
    of_evaluation, of_point = 2 * 1, 2 * 2  # calls: numbers of steps, times batches
    steady.ERROR = error
    steady.CALLS = of_evaluation + of_point + (point - 1) * (of_point + of_evaluation) + 1
    with pytest.raises(type(error)):
        list(broken.train())
    assert list(points_of(broken.folder)) == [0, 2, 4][:point]
    saved = checkpoint.latest(broken.folder / "checkpoints")
    if isinstance(error, AlignkitError):
        assert saved is not None and int(saved.name) == 2 * point
    steady.ERROR = None
    list(alignkit.load(resume=broken.folder).train())
    assert_same_but_surroundings(unbroken.folder, broken.folder)


def test_an_evaluation_that_breaks_off_after_a_point_does_not_repeat_the_point(tiny_run: MakeRun, steady: Any) -> None:
    settings = points({"evaluate.every": 2})
    unbroken, broken = tiny_run("unbroken", settings), tiny_run("broken", settings)
    list(unbroken.train())
    steady.ERROR, steady.CALLS = TransientError("no server"), 2 + 2 + 2
    with pytest.raises(TransientError):
        list(broken.train())
    assert list(points_of(broken.folder)) == [0, 2]
    steady.ERROR, steady.CALLS = None, 0
    list(alignkit.load(resume=broken.folder).train())
    assert steady.CALLS == -(2 + 2 + 2)  # the evaluation after update 2, the point of update 4 and the last evaluation
    assert_same_but_surroundings(unbroken.folder, broken.folder)


def made_up(rise: float, held_out: float = 0.0, size: int = 8) -> Measurement:
    values = {(1, "reward"): torch.linspace(0, 1, 6) + rise, (1, "exact"): torch.linspace(0, 1, 6) + held_out}
    return Measurement(values, torch.zeros(6, 1, 3, size, size, dtype=torch.uint8))


def test_the_best_weights_so_far_are_a_copy_and_survive_a_checkpoint() -> None:
    kept = Points([1, 2, 3], ["exact"])
    average = {"layer": torch.zeros(2)}
    for update, found in enumerate([made_up(0), made_up(0.1), made_up(0.3, -0.2), made_up(0.05)]):
        assert kept.due(update - 1, update)
        average["layer"].fill_(update)
        kept.add(update, found, kept.compare(found), average)
        assert not kept.due(update - 1, update)
        restored = Points([1, 2, 3], ["exact"])
        restored.load_state_dict(kept.state_dict())
        kept = restored
    assert kept.best is not None and kept.best["layer"].tolist() == [1, 1]
    assert [row.difference for row in kept.rows[2]] == pytest.approx([0.3, -0.2])


@pytest.mark.parametrize(("size", "ending"), [(256, "png"), (264, "jpg")])
def test_large_images_are_kept_as_jpeg_and_scores_that_are_missing_as_null(
    tmp_path: Path, size: int, ending: str
) -> None:
    found = made_up(0, size=size)
    found.values[1, "exact"][1] = torch.nan
    (tmp_path / "000001").mkdir()
    (tmp_path / "000001" / "earlier.txt").write_text("of a run that was killed")
    write_point(tmp_path / "000001", found, [Example(text) for text in "abcdef"], [1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000001"]
    names = [f"{p:03d}_1steps.{ending}" for p in range(6)]
    assert sorted(p.name for p in (tmp_path / "000001").iterdir()) == [*names, "scores.json"]
    scores = json.loads((tmp_path / "000001" / "scores.json").read_text())
    assert scores[1] == {
        "file": names[1], "prompt": "b", "steps": 1, "scores": {"reward": pytest.approx(0.2), "exact": None}
    }  # fmt: skip


def test_a_point_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "points").write_text("no folder")
    with pytest.raises(AlignkitError, match=r"points/000001: could not be written \(.*\); make room"):
        write_point(tmp_path / "points" / "000001", made_up(0), [Example(text) for text in "abcdef"], [1])
