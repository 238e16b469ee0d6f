from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from alignkit.errors import AlignkitError
from alignkit.evaluation.rows import Row
from alignkit.runs.display import Display
from alignkit.runs.grid import comparison, draw_grid
from alignkit.runs.report import Report

ROW = Row("attribute_binding", 2, 64, 0.5, 0.75, 0.25, 0.1, 0.4)

TIMES = ("seconds", "images_per_second", "memory_gib")


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in TIMES} for record in found]


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def plain() -> Console:
    return Console(file=io.StringIO(), width=80)


def a_few_updates(report: Report, first: int, last: int) -> None:
    for step in range(first, last + 1):
        if step > 2:
            report.warn("the surrogate and the reward part")
        report.update(step, {"reward": step / 8, "loss": 0.5})
        if step == 2:
            report.evaluation(step, [ROW])


def test_each_event_is_one_json_line_on_disk_at_once(tmp_path: Path) -> None:
    with Report(tmp_path, Display(None, total=10)) as report:
        report.update(1, {"reward": 0.5, "loss": float("nan")}, images=16)
        first = json.loads((tmp_path / "metrics.jsonl").read_text())
        assert first["reward"] == 0.5 and first["loss"] is None
        assert first["images_per_second"] == pytest.approx(16 / first["seconds"])
        report.warn("careful")
        report.evaluation(1, [ROW])
        assert report.lines == 3
    assert lines(tmp_path)[1:] == [
        {"step": 1, "warning": "careful"},
        {"step": 1, "evaluation": [ROW.__dict__]},
    ]


@pytest.mark.parametrize("killed_at", [2, 3, 6])
def test_a_resumed_run_writes_the_lines_of_an_unbroken_one(tmp_path: Path, killed_at: int) -> None:
    (tmp_path / "unbroken").mkdir()
    (tmp_path / "broken").mkdir()
    with Report(tmp_path / "unbroken", Display(None, total=6)) as report:
        a_few_updates(report, 1, 6)
    with Report(tmp_path / "broken", Display(None, total=6)) as report:
        a_few_updates(report, 1, 2)
        saved = report.lines
        a_few_updates(report, 3, killed_at)
    with (tmp_path / "broken" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "rew')  # what a kill may leave
    with Report(tmp_path / "broken", Display(None, total=6), lines=saved) as report:
        assert report.step == 2
        a_few_updates(report, 3, 6)
    assert lines(tmp_path / "broken") == lines(tmp_path / "unbroken")


def test_metrics_that_end_before_the_checkpoint_are_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(AlignkitError, match="found 1 lines, expected the 4 of the checkpoint"):
        Report(tmp_path, Display(None, total=6), lines=4)
    assert lines(tmp_path) == [{"step": 1}]


def test_a_warning_is_shown_once_a_run_even_across_a_resume(tmp_path: Path) -> None:
    console = plain()
    with Report(tmp_path, Display(console, total=6)) as report:
        report.warn("careful [sic]")
        report.warn("careful [sic]")
    with Report(tmp_path, Display(console, total=6), lines=1) as report:
        report.warn("careful [sic]")
    assert shown(console).count("warning: careful [sic]") == 1


def test_a_folder_that_cannot_be_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AlignkitError, match=r"metrics\.jsonl: could not be written"):
        Report(tmp_path / "file", Display(None, total=1))


def test_a_process_that_does_not_write_leaves_no_trace(tmp_path: Path) -> None:
    with Report(tmp_path, Display(None, total=6), writes=False) as report:
        a_few_updates(report, 1, 6)
        report.grid(6, draw_grid(torch.rand(1, 1, 3, 8, 8), ["a red circle"], ["1 step"]))
    assert list(tmp_path.iterdir()) == []


def test_a_grid_is_saved_under_its_step(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 3, 64, 64)
    with Report(tmp_path, Display(None, total=100)) as report:
        sheet = draw_grid(images, ["a red circle", "a blue square"], ["1 step", "2 steps", "4 steps"])
        path = report.grid(100, sheet)
    assert path == tmp_path / "samples" / "000100.png"
    assert [other.name for other in path.parent.iterdir()] == ["000100.png"]
    with Image.open(path) as image:
        assert image.size[0] > 3 * 128 and image.size[1] > 2 * 128


def test_images_before_and_after_stand_side_by_side_with_their_scores() -> None:
    before, after = torch.zeros(2, 2, 3, 64, 64), torch.ones(2, 2, 3, 64, 64)
    scores = [[{"reward": place / 4, "reward/part": 1.0} for place in range(4)], [{}] * 4]
    sheet = comparison([before, after], ["a", "b"], [1, 2], scores)
    assert sheet.size == (4 + 4 * 132, 18 + 2 * 168 + 18 + 4)
    centres = [[sheet.getpixel((4 + c * 132 + 64, 18 + r * 168 + 18 + 64)) for c in range(4)] for r in range(2)]
    assert centres == [[(0, 0, 0), (255, 255, 255)] * 2] * 2

    def written(column: int, row: int) -> bool:
        left, top = 4 + column * 132, 18 + row * 168 + 18 + 128
        return sheet.crop((left, top, left + 128, top + 18)).getextrema() != ((255, 255),) * 3

    assert [[written(c, r) for c in range(4)] for r in range(2)] == [[True, False] * 2] * 2
    assert comparison([before], ["a", "b"], [1, 2]).size == (4 + 2 * 132, 18 + 2 * 150)


def test_the_images_of_a_grid_are_enlarged_and_otherwise_unchanged() -> None:
    images = torch.randint(0, 256, (2, 2, 3, 64, 64), dtype=torch.uint8)
    sheet = draw_grid(images, ["a " * 400, "\u03b1\n\u00e9"], ["before", "after"])
    assert sheet.size == (4 + 2 * 132, 18 + 2 * 150)
    for row in range(2):
        for column in range(2):
            left, top = 4 + column * 132, 18 + row * 150 + 18
            small = sheet.crop((left, top, left + 128, top + 128)).resize((64, 64), Image.Resampling.NEAREST)
            expected = Image.fromarray(images[row, column].permute(1, 2, 0).numpy())
            assert small.tobytes() == expected.tobytes()
    assert draw_grid(images.float() / 255, ["a " * 400, "\u03b1\n\u00e9"], ["before", "after"]) == sheet


def test_captions_stand_under_the_images_of_a_grid_and_notes_under_all_of_them() -> None:
    images = torch.zeros(2, 2, 3, 64, 64, dtype=torch.uint8)
    captions = [["reward 0.50", "reward 0.75"], ["", "reward 1.00 " * 9]]
    sheet = draw_grid(images, ["a", "b"], ["before\nmodel", "after"], captions=captions, notes=["one " * 30, "two"])
    lines = (sheet.height - 2 * 18 - 2 * (150 + 18) - 4) // 18
    assert sheet.width == 4 + 2 * 132 and lines >= 4  # the first note takes several lines

    def written(left: int, top: int, width: int) -> bool:
        return sheet.crop((left, top, left + width, top + 18)).getextrema() != ((255, 255),) * 3

    under = 2 * 18 + 18 + 128
    assert written(4, 18, 128) and not written(136, 18, 128)  # the second line of the first title
    assert written(4, under, 128) and written(136, under, 128)
    assert not written(4, under + 168, 128) and written(136, under + 168, 128)
    assert not written(132, under + 168, 4) and not written(264, under + 168, 4)
    assert all(written(4, 2 * 18 + 2 * 168 + line * 18, 264) for line in range(lines))
