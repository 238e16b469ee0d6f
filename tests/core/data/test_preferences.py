"""Preference pairs: supported tables, the winner of each pair, and rows that are refused or left out with a note."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from alignkit.data.preferences import check_pairs, open_pairs
from alignkit.data.sources import Preferences
from alignkit.errors import AlignkitError, ConfigError
from alignkit.runs.run import Run
from method_checks import assert_a_stopped_run_ends_with_the_same_bits

SIZE = 16
WINNER, LOSER = (0, 255, 0), (255, 0, 0)


def image(color: tuple[int, int, int], number: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    """A plain image whose blue channel encodes `number`."""
    return Image.new("RGB", size, (*color[:2], number * 10))


def file_bytes(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pairs: the winner is green, the loser red, and the blue channel encodes the number in the caption."""
    path = tmp_path / "pairs"
    path.mkdir()
    lines = []
    for number in range(5):
        image(WINNER, number).save(path / f"{number}_w.png")
        image(LOSER, number).save(path / f"{number}_l.png")
        lines.append({"text": f"number {number}", "winner": f"{number}_w.png", "loser": f"{number}_l.png", "seed": 3})
    (path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return path


def numbers(pairs: Preferences, start: int, size: int, seed: int = 0) -> list[int]:
    """The numbers of the pairs in a batch, after checking that images and captions agree."""
    batch = pairs.batch(start, size, seed)
    assert batch.winners.shape == batch.losers.shape == (size, 3, SIZE, SIZE)
    assert batch.winners.dtype == torch.float32
    assert bool((batch.winners[:, 1] == 1).all()) and bool((batch.losers[:, 0] == 1).all())
    assert not batch.winners[:, 0].any() and not batch.losers[:, 1].any()
    found = [round(float(w[2].mean()) * 255 / 10) for w in batch.winners]
    assert found == [round(float(x[2].mean()) * 255 / 10) for x in batch.losers]
    assert list(batch.captions) == [f"number {n}" for n in found]
    return found


@pytest.mark.parametrize("name", ["", "pairs.jsonl"])
def test_a_folder_and_its_table_are_the_same_pairs_in_an_order_of_the_seed_alone(folder: Path, name: str) -> None:
    pairs = open_pairs(str(folder / name), SIZE)
    whole = numbers(pairs, 0, 20)
    assert all(sorted(whole[i : i + 5]) == [0, 1, 2, 3, 4] for i in range(0, 20, 5))
    assert numbers(open_pairs(str(folder), SIZE), 7, 6) == whole[7:13]
    assert numbers(pairs, 0, 20, seed=1) != whole
    assert list(pairs.notes) == []


def test_the_text_of_a_pair_may_have_another_of_the_usual_names(folder: Path) -> None:
    table = folder / "pairs.jsonl"
    before = numbers(open_pairs(str(folder), SIZE), 0, 5)
    table.write_text(table.read_text().replace('"text"', '"prompt"'))
    assert numbers(open_pairs(str(folder), SIZE), 0, 5) == before


def test_lines_that_prefer_neither_image_are_left_out_and_counted(folder: Path) -> None:
    table = folder / "pairs.jsonl"
    before = numbers(open_pairs(str(folder), SIZE), 0, 5)
    with table.open("a") as lines:
        lines.write(
            '\n{"text": "a", "winner": null, "loser": null, "answer": "tie"}\n{"winner": null, "loser": null}\n'
        )
    pairs = open_pairs(str(folder), SIZE)
    assert numbers(pairs, 0, 5) == before
    assert list(pairs.notes) == [f"data.pairs: 2 of 7 rows of {table} prefer neither image and were left out"]
    table.write_text('{"text": "a", "winner": null, "loser": null}\n')
    with pytest.raises(ConfigError, match="contains no readable pair with a preferred image"):
        open_pairs(str(folder), SIZE)


def test_check_refuses_a_class_of_pairs_that_does_not_exist() -> None:
    check_pairs("alignkit_shapes.data:DrawingPairs")
    with pytest.raises(ConfigError, match=r"^data\.pairs: .*no attribute 'Nope'"):
        check_pairs("alignkit_shapes.data:Nope")


BROKEN_LINES = [
    ('{"text": "a", "winner": "0_w.png", "loser": null}', "expected a JSON object"),
    ('{"text": "a", "winner": null}', "expected a JSON object"),
    ('{"text": "a", "winner": "0_w.png"}', 'expected a JSON object with "text", "winner" and "loser"'),
    ('{"text": 3, "winner": "0_w.png", "loser": "0_l.png"}', "expected a JSON object"),
    ('["a"]', "expected a JSON object"),
    ('{"text": "a", ', "expected a JSON object"),
    ('{"text": "a", "winner": "0_w.png", "loser": "gone.png"}', r"there is no file .*gone\.png"),
    ('{"text": "", "winner": "0_w.png", "loser": "0_l.png"}', "expected a JSON object .*non-empty"),
    ('{"text": "a", "winner": "0_w.png", "loser": "0_w.png"}', "winner and loser are the same file"),
]


@pytest.mark.parametrize(("line", "message"), BROKEN_LINES)
def test_a_line_without_a_pair_is_refused_or_left_out_with_its_number(folder: Path, line: str, message: str) -> None:
    table = folder / "pairs.jsonl"
    table.write_text(table.read_text() + line + "\n")
    for read in (lambda: open_pairs(str(folder), SIZE), lambda: check_pairs(str(folder))):
        with pytest.raises(ConfigError, match=rf"pairs\.jsonl, line 6: {message}") as caught:
            read()
        assert str(caught.value).endswith('fix it, or set data.on_error = "skip"')
    skipped: list[str] = []
    pairs = open_pairs(str(folder), SIZE, skipped)
    assert sorted(numbers(pairs, 0, 5)) == [0, 1, 2, 3, 4]
    assert len(skipped) == 1 and "line 6: " in skipped[0]


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:50])


def test_a_truncated_image_raises_an_error_or_is_replaced_by_the_next(folder: Path) -> None:
    cut_short(folder / "2_l.png")
    with pytest.raises(AlignkitError, match=r"pairs\.jsonl, line 3 cannot be read \(2_l\.png: "):
        numbers(open_pairs(str(folder), SIZE), 0, 5)
    skipped: list[str] = []
    pairs = open_pairs(str(folder), SIZE, skipped)
    assert skipped == []
    whole = numbers(pairs, 0, 10)
    assert sorted(whole) == [0, 0, 1, 1, 3, 3, 3, 3, 4, 4]
    assert numbers(pairs, 0, 10) == whole  # an item that is known to be broken is not reported again
    assert len(skipped) == 1 and "line 3 cannot be read (2_l.png: " in skipped[0]
    assert numbers(open_pairs(str(folder), SIZE, []), 6, 4) == whole[6:]  # a resumed run reads the same


def test_skipping_fails_if_no_image_can_be_read(folder: Path) -> None:
    for file in folder.glob("*_w.png"):
        cut_short(file)
    with pytest.raises(AlignkitError, match="none of the 5 items can be read"):
        open_pairs(str(folder), SIZE, []).batch(0, 2, 0)


def test_images_are_cropped_and_resized_to_the_size_of_the_model(folder: Path) -> None:
    wide = Image.new("RGB", (48, 16), LOSER)
    wide.paste((0, 255, 0), (16, 0, 32, 16))
    wide.save(folder / "0_w.png")
    batch = open_pairs(str(folder), 8).batch(0, 5, 0)
    found = batch.winners[list(batch.captions).index("number 0")]
    assert found.shape == (3, 8, 8) and bool((found[1] == 1).all())


@pytest.mark.parametrize(
    "source", ["nowhere/at/all", "no.such.module:Thing", "alignkit.data.stream:Stream", "alignkit.data.sources:X"]
)
def test_a_source_that_does_not_exist_or_has_no_pairs_is_refused(source: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.pairs"):
        open_pairs(source, SIZE)


def test_a_folder_without_pairs_and_a_table_without_lines_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="contains no preference pairs; expected a folder with pairs"):
        open_pairs(str(tmp_path), SIZE)
    (tmp_path / "pairs.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="contains no readable pair"):
        open_pairs(str(tmp_path), SIZE)


# parquet


def write_parquet(path: Path, records: list[dict[str, Any]], row_group_size: int = 2) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow, which reads parquet, is an extra")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=row_group_size)
    return path


def record(number: int, label: float | None, **changes: Any) -> dict[str, Any]:
    """A row in Pick-a-Pic's columns; the preferred image is the green one."""
    first, second = (LOSER, WINNER) if label == 0 else (WINNER, LOSER)
    return {
        "caption": f"number {number}", "jpg_0": file_bytes(image(first, number)),
        "jpg_1": file_bytes(image(second, number)), "label_0": label,
        "label_1": None if label is None else 1 - label, "has_label": True, "model_0": "a",
    } | changes  # fmt: skip


def test_parquet_in_pick_a_pics_columns_puts_the_preferred_image_first_and_drops_ties(tmp_path: Path) -> None:
    records = [record(0, 1.0), record(1, 0.0), record(2, 0.5), record(3, 1.0), record(4, None), record(5, 0.0)]
    records.append(record(6, 1.0, has_label=False))
    pairs = open_pairs(str(write_parquet(tmp_path / "p.parquet", records)), SIZE)
    assert sorted(numbers(pairs, 0, 4)) == [0, 1, 3, 5]
    assert numbers(pairs, 3, 6) == numbers(pairs, 0, 9)[3:]
    (note,) = pairs.notes
    assert "3 of 7 rows" in note and "prefer neither image" in note


def test_a_folder_of_shards_is_one_set_and_images_may_be_as_the_datasets_library_keeps_them(tmp_path: Path) -> None:
    kept = {name: {"bytes": record(1, 0.0)[name], "path": "x.png"} for name in ("jpg_0", "jpg_1")}
    write_parquet(tmp_path / "train-0.parquet", [record(0, 1.0), record(2, 0.0)])
    write_parquet(tmp_path / "train-1.parquet", [record(1, 0.0) | kept])
    assert sorted(numbers(open_pairs(str(tmp_path), SIZE), 0, 3)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_0": 0.7, "label_1": 0.3}, "label_0 is 0.7"),
        ({"label_1": 1.0}, "label_0 is 1.0 and label_1 1.0"),
        ({"caption": None}, "expected a non-empty string as caption, found None"),
        ({"caption": ""}, "expected a non-empty string as caption, found ''"),
    ],
)
def test_a_row_without_a_pair_is_refused_or_left_out_with_its_number(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = str(write_parquet(tmp_path / "p.parquet", [record(0, 1.0), record(1, 0.0), record(2, 1.0, **changes)]))
    with pytest.raises(ConfigError, match=rf"p\.parquet, row 2: {message}"):
        open_pairs(path, SIZE)
    skipped: list[str] = []
    pairs = open_pairs(path, SIZE, skipped)
    assert sorted(numbers(pairs, 0, 2)) == [0, 1] and len(skipped) == 1 and "row 2: " in skipped[0]


def test_an_image_in_parquet_that_is_broken_or_missing_is_named(tmp_path: Path) -> None:
    records = [record(0, 1.0), record(1, 0.0, jpg_1=b"no image"), record(2, 1.0, jpg_0=None)]
    path = str(write_parquet(tmp_path / "p.parquet", records))
    with pytest.raises(AlignkitError, match=r"row 1 cannot be read \(jpg_1: it is no image"):
        open_pairs(path, SIZE).batch(0, 3, 0)
    skipped: list[str] = []
    assert numbers(open_pairs(path, SIZE, skipped), 0, 3) == [0, 0, 0]
    assert len(skipped) == 2 and "row 2 cannot be read (jpg_0: found NoneType, expected the bytes of an" in skipped[1]


def test_a_file_that_is_not_parquet_or_lacks_a_column_is_refused(tmp_path: Path) -> None:
    lacking = {name: value for name, value in record(0, 1.0).items() if name not in ("caption", "jpg_1")}
    with pytest.raises(ConfigError, match="has no column caption, jpg_1; expected"):
        open_pairs(str(write_parquet(tmp_path / "a.parquet", [lacking])), SIZE)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 this is none")
    with pytest.raises(ConfigError, match=r"b\.parquet cannot be read as parquet"):
        open_pairs(str(tmp_path / "b.parquet"), SIZE)


def test_without_pyarrow_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.parquet").write_bytes(b"")
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r'needs pyarrow.*pip install "alignkit\[parquet\]"') as caught:
        open_pairs(str(tmp_path / "p.parquet"), SIZE)
    assert "\n" not in str(caught.value)


# in a run

DPO = {"algorithm.name": "diffusion_dpo", "train.updates": 3, "evaluate.prompts": "", "data.images": ""}


def test_a_run_without_pairs_or_with_broken_ones_is_refused_before_any_weight_loads(
    tiny_run: Callable[..., Run], folder: Path
) -> None:
    with pytest.raises(ConfigError, match=r"data\.pairs: missing; algorithm diffusion_dpo needs preference pairs"):
        tiny_run(overrides=DPO).check()
    (folder / "1_w.png").unlink()
    with pytest.raises(ConfigError, match=r"line 2: there is no file"):
        tiny_run(overrides=DPO | {"data.pairs": str(folder)}).check()


def test_prompts_may_be_missing_because_pairs_bring_their_own_texts(tiny_run: Callable[..., Run], folder: Path) -> None:
    run = tiny_run(overrides=DPO | {"data.pairs": str(folder), "data.prompts": "", "train.updates": 1})
    run.check()
    assert [update.step for update in run.train()] == [1]


def test_pairs_that_were_left_out_are_in_the_record_of_the_run(tiny_run: Callable[..., Run], folder: Path) -> None:
    cut_short(folder / "4_w.png")
    (folder / "1_w.png").unlink()
    settings = DPO | {"data.pairs": str(folder), "data.on_error": "skip", "train.rows_per_update": 5}
    run = tiny_run(overrides=settings)
    list(run.train())
    record = (run.folder / "metrics.jsonl").read_text()
    for message in ("line 2: there is no file", "line 5 cannot be read (4_w.png: "):
        assert record.count(message) == 1


def test_a_resumed_run_continues_with_the_next_pairs(tiny_run: Callable[..., Run], folder: Path) -> None:
    cut_short(folder / "4_w.png")
    settings = DPO | {"data.pairs": str(folder), "data.on_error": "skip", "train.rows_per_update": 2}
    assert_a_stopped_run_ends_with_the_same_bits(tiny_run, settings)
