"""The gallery of runs: which images and numbers it shows, and which runs it rejects."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import alignkit
from alignkit.cli.app import app
from alignkit.errors import AlignkitError
from alignkit.evaluation.measure import Measurement, compare
from alignkit.records import Example
from alignkit.runs.display import Display
from alignkit.runs.folder import claim
from alignkit.runs.points import write_point
from alignkit.runs.report import Report
from alignkit.runs.run import Run

MakeRun = Callable[..., Run]
MakePoints = Callable[..., Path]
PROMPTS = [f"prompt {place}" for place in range(6)]
SCORES = [0.5, 0.1, 0.9, 0.5, 0.3, 0.7]
"""Trained rewards before training, by place."""
ORDER = [1, 4, 0, 3, 5, 2]
"""Places by these scores."""


@pytest.fixture
def ended(tiny_run: MakeRun) -> MakePoints:
    """A function that writes the folder of a run with points at updates 0, 2 and 4, without training.

    Before training all pixels of prompt p have the level 10 p at one step and 10 p + 5 at two; afterwards the reward is
    higher by `rise` / 2 at update 2 and `rise` at update 4, and the level by 1 and 2.
    """

    def make(
        name: str = "run",
        overrides: dict[str, Any] | None = None,
        exported: tuple[int, str] | None = (4, "average"),
        rise: float | Tensor = 0.1,
        scores: list[float] = SCORES,
        prompts: list[str] = PROMPTS,
        level: int = 0,
    ) -> Path:
        run = tiny_run(name, {"evaluate.points": 2, **(overrides or {})})
        claim(run.folder, run.config)
        levels = torch.arange(len(prompts))[:, None] * 10 + torch.tensor([0, 5])
        before: Measurement | None = None
        with Report(run.folder, Display(None, total=4)) as report:
            for update in (0, 2, 4):
                reward = torch.tensor(scores) + rise * update / 4
                values = {
                    (k, name): value
                    for k in (1, 2)
                    for name, value in (("reward", reward), ("pixel_check", reward / 2), ("pixel_check/exact", reward))
                }
                images = (levels + update // 2 + level).byte()[:, :, None, None, None].expand(-1, -1, 3, 8, 8)
                found = Measurement(values, images)
                write_point(run.folder / "points" / f"{update:06d}", found, [Example(p) for p in prompts], [1, 2])
                after = None if before is None else found
                report.point(update, compare(before or found, after, ["pixel_check"]))
                before = before or found
            if exported:
                report.exported(4, *exported, text="for the test")
        return run.folder

    return make


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the gallery passed to `draw_grid`."""
    kept: Any = SimpleNamespace()

    def draw_grid(images: Any, prompts: Any, columns: Any, smallest: int, captions: Any, notes: Any) -> Image.Image:
        vars(kept).update(images=images, prompts=prompts, columns=columns, captions=captions, notes=notes)
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr("alignkit.commands.gallery.draw_grid", draw_grid)
    return kept


@pytest.mark.parametrize(
    ("rows", "expected"), [(1, [3]), (2, [4, 5]), (3, [4, 3, 2]), (6, ORDER), (8, ORDER)], ids=lambda value: str(value)
)
def test_prompts_are_evenly_spaced_quantiles_of_the_reward_before_training(
    ended: MakePoints, drawn: Any, rows: int, expected: list[int]
) -> None:
    alignkit.gallery([ended()], rows=rows)
    assert drawn.prompts == [PROMPTS[place] for place in expected]
    assert drawn.images[:, 0, 0, 0, 0].tolist() == [10 * place for place in expected]


@pytest.mark.parametrize(("pick", "expected"), [("rise", [1, 5, 3]), ("fall", [4, 2, 0])])
def test_prompts_can_be_those_that_changed_most_on_average_over_the_runs(
    ended: MakePoints, drawn: Any, pick: Any, expected: list[int]
) -> None:
    one, two = torch.tensor([0.1, 0.3, 0.0, 0.2, -0.1, 0.1]), torch.tensor([0.1, 0.3, 0.0, 0.2, -0.1, 0.4])
    alignkit.gallery([ended("one", rise=one), ended("two", rise=two)], rows=3, pick=pick)
    assert drawn.prompts == [PROMPTS[place] for place in expected]
    word = {"rise": "rose", "fall": "fell"}[pick]
    assert f"those whose reward {word} most, mean of the runs: the extremes, and not typical." in drawn.notes[0]


def test_a_prompt_without_a_score_is_left_out(ended: MakePoints, drawn: Any) -> None:
    alignkit.gallery([ended(scores=[torch.nan, *SCORES[1:]])])
    assert drawn.prompts == [PROMPTS[place] for place in ORDER if place]


def test_the_images_are_those_of_the_exported_weights_at_the_first_number_of_steps_or_the_one_named(
    ended: MakePoints, drawn: Any
) -> None:
    runs = [ended("best", exported=(2, "best")), ended("average")]
    alignkit.gallery(runs)
    assert drawn.images.shape == (6, 3, 3, 8, 8) and drawn.images.dtype == torch.uint8
    assert drawn.images[:, :, 0, 0, 0].tolist() == [[10 * p, 10 * p + 1, 10 * p + 2] for p in ORDER]
    alignkit.gallery(runs, steps=2)
    assert drawn.images[:, :, 0, 0, 0].tolist() == [[10 * p + 5, 10 * p + 6, 10 * p + 7] for p in ORDER]
    assert drawn.notes[0].startswith("6 of 6 held-out prompts at 2 steps, the same noise in all columns: sorted by the")


@pytest.mark.parametrize(
    ("exported", "shown"),
    [
        ((2, "best"), "best point, update 2 of 4"),
        ((4, "average"), "average of the end, update 4 of 4"),
        ((4, "last"), "average of the end, not the exported last, update 4 of 4"),
    ],
    ids=["best", "average", "last"],
)
def test_a_column_is_titled_with_method_run_and_weights(
    ended: MakePoints, drawn: Any, exported: tuple[int, str], shown: str, tiny_lcm: Path
) -> None:
    alignkit.gallery([ended(exported=exported)])
    assert drawn.columns == [f"before\n{tiny_lcm.name}", f"lasro\nrun: {shown}"]


def test_what_is_not_the_papers_stands_in_the_title_and_if_it_is_long_in_the_notes_alone(
    ended: MakePoints, drawn: Any
) -> None:
    alignkit.gallery([ended("one", {"algorithm.purify": 0.1})])
    assert drawn.columns[1].startswith("lasro (algorithm.purify, not the paper's)\none: ")
    settings = {"algorithm.purify": 0.1, "algorithm.smoothing": 0.1, "algorithm.contrast": 0.1}
    alignkit.gallery([ended("many", settings)])
    assert drawn.columns[1].startswith("lasro (not the paper's)\nmany: ")
    assert "algorithm.smoothing" in drawn.notes[1]


def test_captions_have_scores_and_their_change_without_parts(ended: MakePoints, drawn: Any) -> None:
    alignkit.gallery([ended(rise=0.1), ended("worse", rise=-0.2)], rows=1)
    assert drawn.captions == [
        [
            "reward 0.50, pixel check 0.25",
            "reward 0.60 (+0.10), pixel check 0.30 (+0.05)",
            "reward 0.30 (-0.20), pixel check 0.15 (-0.10)",
        ]
    ]


def test_the_notes_have_the_changes_over_all_prompts_not_only_those_shown(ended: MakePoints, drawn: Any) -> None:
    alignkit.gallery([ended("first", exported=(2, "best")), ended("second")], rows=1)
    rule, first, second = drawn.notes
    assert rule.startswith("1 of 6 held-out prompts at 1 step, ") and "the reward before training (first)" in rule
    assert first == (
        "first: lasro, best point, update 2 of 4, reward: brightness. Means over all 6 prompts, with 95 % intervals of "
        "the change: reward 0.500 to 0.550, +0.050 [+0.050, +0.050]; pixel check 0.250 to 0.275, +0.025 [+0.025, "
        "+0.025]."
    )
    assert "update 4 of 4" in second and "reward 0.500 to 0.600, +0.100 [+0.100, +0.100]" in second


def test_runs_that_score_the_same_images_otherwise_are_noted(ended: MakePoints, drawn: Any) -> None:
    alignkit.gallery([ended("hard"), ended("soft", scores=[score * 0.9 for score in SCORES])])
    assert drawn.notes[-1].startswith("soft scores the images before training otherwise than hard")
    assert drawn.captions[0][0].startswith("reward 0.10") and drawn.captions[0][2].startswith("reward 0.19 (+0.10)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"prompts": [*PROMPTS[:2], "another", *PROMPTS[3:]]},
            "prompt 2 of its points is 'another', that of .*'prompt 2'",
        ),
        ({"prompts": PROMPTS[:5], "scores": SCORES[:5]}, "prompt 5 of its points is missing, that of .*'prompt 5'"),
        ({"overrides": {"evaluate.seed": 7}}, r"evaluate\.seed is 7, that of .* 1000"),
        ({"level": 5}, "its images before training differ from those of"),
    ],
    ids=["prompt", "number of prompts", "seed", "images"],
)
def test_runs_that_cannot_be_compared_are_one_line_that_says_what_differs(
    ended: MakePoints, change: dict[str, Any], message: str
) -> None:
    first, other = ended("first"), ended("other", **change)
    with pytest.raises(AlignkitError, match=f"^{other}: {message}") as raised:
        alignkit.gallery([first, other])
    assert "\n" not in str(raised.value)


def test_images_that_two_machines_rounded_differently_count_as_the_same(ended: MakePoints, drawn: Any) -> None:
    alignkit.gallery([ended("first"), ended("other", level=1)])
    assert len(drawn.columns) == 3


def test_a_run_without_points_or_one_that_has_not_ended_is_one_line(ended: MakePoints, tiny_run: MakeRun) -> None:
    running = ended("running", exported=None)
    with pytest.raises(
        AlignkitError, match=f"^{running}: the run has not ended; resume it with .* --resume {running}$"
    ):
        alignkit.gallery([running])
    without = ended("without")
    kept = [line for line in (without / "metrics.jsonl").read_text().splitlines() if '"point"' not in line]
    (without / "metrics.jsonl").write_text("\n".join(kept))
    with pytest.raises(AlignkitError, match=f"^{without}: the run has no points, .* evaluate.points above 0"):
        alignkit.gallery([without])
    with pytest.raises(AlignkitError, match=r"^shapes_lcm: no metrics\.jsonl here; expected the folder of a run "):
        alignkit.gallery(["shapes_lcm"])
    with pytest.raises(AlignkitError, match=r": found images of 1, 2 steps, expected 3; choose with --steps$"):
        alignkit.gallery([ended("steps")], steps=3)


def test_files_that_are_missing_or_broken_are_one_line(ended: MakePoints) -> None:
    run = ended()
    image, scores = (run / "points" / "000004" / name for name in ("002_1steps.png", "scores.json"))
    image.write_bytes(image.read_bytes()[:40])
    with pytest.raises(AlignkitError, match=f"^{image}: cannot be read "):
        alignkit.gallery([run])
    scores.write_text(json.dumps([{"file": "a.png"}]))
    with pytest.raises(
        AlignkitError, match=f"^{run}: found no images of updates 0 and 4 in points/, expected .* trained$"
    ):
        alignkit.gallery([run])
    shutil.rmtree(image.parent)
    with pytest.raises(AlignkitError, match=f"^{run}: found no images .*: points/000004/scores.json: missing, so"):
        alignkit.gallery([run])


def test_the_command_writes_a_png_and_overwrites_none(ended: MakePoints, tmp_path: Path) -> None:
    out = tmp_path / "new" / "both.png"
    arguments = ["gallery", str(ended("one")), str(ended("two")), "--rows", "3", "--steps", "2", "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stdout) == (0, f"{out}\n")
    written = out.read_bytes()
    with Image.open(out) as image:
        assert image.width == 4 + 3 * (256 + 4) and image.height > 3 * 256
    again = CliRunner().invoke(app, arguments)
    assert (again.exit_code, out.read_bytes()) == (1, written)
    assert again.stderr == f"error: --out {out}: exists already; choose another name\n"


def test_large_images_are_reduced(ended: MakePoints, drawn: Any) -> None:
    run = ended()
    for file in run.glob("points/*/*.png"):
        Image.new("RGB", (512, 512)).save(file)
    alignkit.gallery([run])
    assert drawn.images.shape[-2:] == (256, 256)
