"""HTML of rows, images and runs in the cells of a notebook."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from alignkit.evaluation.rows import Row
from alignkit.page.cells import images_cell, rows_cell, run_cell
from alignkit.page.record import Record, read_record
from page_fixtures import EVIL, Elements, Write, plain

TAGS = {
    "b", "bdi", "br", "code", "div", "img", "small", "table", "tbody", "td", "th", "thead", "tr",
}  # fmt: skip
ATTRIBUTES = {"alt", "colspan", "max", "src", "style", "title", "value", "width"}


def row(reward: str = "reward", steps: int = 1, low: float = 0.1, **others: object) -> Row:
    found = Row(reward, steps, 40, 0.5, 0.7, 0.2, low, 0.3)
    return replace(found, **others)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", EVIL)
def test_texts_inject_no_element(text: str) -> None:
    settings = {"algorithm": {"name": text}, "model": {"name": text}, "reward": [{"name": text}]}
    cells = [
        rows_cell([row(text, run=text, departure=text), row(text, run="other", held_out=True)]),
        images_cell([(Image.new("RGB", (8, 8)), text)]),
        images_cell([(Image.new("RGB", (8, 8)), text)] * 2),
        run_cell(Record(Path(text[:50]), text, settings, verdict=("hacking", text))),
    ]
    for cell in cells:
        found = Elements(cell).found
        assert {tag for tag, _ in found} <= TAGS
        assert {name for _, attributes in found for name in attributes} <= ATTRIBUTES
        assert len(cell.encode()) < 40_000
        assert " ".join(text[:20].split()).replace("\ud83c", "?") in plain(cell)


def test_rows_are_a_table_without_totals_that_repeat_their_only_part() -> None:
    cell = plain(rows_cell([row(), row("shine"), row("pixels", low=-0.1, held_out=True)]))
    assert "reward steps before after change 95 % interval shine 1 0.500 0.700 +0.200 [+0.100, +0.300]" in cell
    assert "pixels held out 1 0.500" in cell and "no sign of reward hacking" in cell
    assert cell.count("0.500") == 2 and "40 prompts that were not trained on" in cell
    assert "before training" not in plain(rows_cell([])) and plain(rows_cell([])) == "no rows"


def test_kinds_of_prompts_and_runs_have_columns_where_there_are_several() -> None:
    cell = plain(rows_cell([row(run="one"), row(run="two", prompts="seen")]))
    assert "prompts reward steps run before" in cell and "unseen reward 1 one" in cell and "seen reward 1 two" in cell


def test_before_training_there_is_no_comparison() -> None:
    assert "after" not in plain(rows_cell([Row("reward", 1, 40, 0.5)]))


def test_images_stand_over_their_prompts_and_several_of_one_prompt_in_one_line() -> None:
    images = [Image.new("RGB", (64, 64), (shade, 0, 0)) for shade in range(6)]
    cell = images_cell(list(zip(images, "abcdef", strict=True)))
    assert plain(cell) == "a b c d e f" and cell.count("<tr>") == 2 and cell.count("pixelated") == 6
    cell = images_cell(list(zip(images, "aabbbb", strict=True)))
    assert plain(cell) == "a b" and cell.count("<img") == 6 and cell.count("<tr>") == 4
    assert "and 36 more" in plain(images_cell([(images[0], "a")] * 100))


def test_a_large_image_is_embedded_small_and_left_as_it_is() -> None:
    image = Image.effect_noise((1024, 512), 90)
    cell = images_cell([(image, "noise")])
    assert image.size == (1024, 512) and len(cell) < 60_000
    assert 'width="256"' in cell and "pixelated" not in cell


def test_a_run_shows_its_settings_and_results(write_run: Write) -> None:
    cell = plain(run_cell(read_record(write_run())))
    for part in ("draft on shapes_lcm for shine in ", "Exports update 40: best", "updates 40 of 40", "all is well"):
        assert part in cell
    assert "Example 9000" not in cell  # the machine stands on the page
    assert "shine 2 0.500 0.900" in cell and "/" not in cell.partition("95 % interval")[2]


def test_a_run_before_training_shows_its_settings() -> None:
    settings = {"algorithm": {"name": "draft"}, "train": {"updates": 7}}
    cell = plain(run_cell(Record(Path("runs/new"), "new", settings)))
    assert "draft in runs/new Not trained yet." in cell and "updates 0 of 7" in cell
