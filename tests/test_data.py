"""Prompts and pictures: what is read, what is refused, and streams that a resumed run enters anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from alignkit.data import Stream, examples_at, read_examples, slice_of
from alignkit.errors import AlignkitError, ConfigError
from alignkit.interfaces import Example
from alignkit.pictures import open_pictures


def test_every_pass_of_a_stream_is_a_permutation_and_no_two_passes_are_equal() -> None:
    found = Stream(10, seed=0).indices(0, 40)
    passes = [found[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len({tuple(one) for one in passes}) == 4


def test_a_stream_is_the_same_from_whatever_position_it_is_read() -> None:
    whole = Stream(7, seed=3).indices(0, 50)
    assert [Stream(7, seed=3).indices(i, 1)[0] for i in range(50)] == whole
    assert Stream(7, seed=3).indices(5, 20) == whole[5:25]
    assert Stream(7, seed=4).indices(0, 50) != whole


def test_processes_read_what_one_process_would_read() -> None:
    parts = [slice_of(batch, 3, rank, 2) for batch in range(4) for rank in range(2)]
    assert [i for start, size in parts for i in range(start, start + size)] == list(range(24))
    examples = [Example(str(i)) for i in range(5)]
    texts = [e.text for start, size in parts for e in examples_at(examples, Stream(5, 0), start, size)]
    assert texts == [e.text for e in examples_at(examples, Stream(5, 0), 0, 24)]


def test_prompts_are_read_from_lines_and_from_objects(tmp_path: Path) -> None:
    plain, rich = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_text("\ufeffa red circle\r\n\n  a café  \n", encoding="utf-8")
    assert read_examples(plain) == [Example("a red circle"), Example("a café")]
    # U+2028 ends a line for Python's splitlines, but not in JSON lines.
    records = [{"text": "a sign\u2028below", "target": "OPEN"}, {"text": "a red circle"}]
    rich.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records), encoding="utf-8")
    assert read_examples(rich) == [Example("a sign\u2028below", {"target": "OPEN"}), Example("a red circle")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "", "holds no prompt"),
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.jsonl", '{"text": "a"}\n{"prompt": "b"}', "line 2"),
        ("p.jsonl", '{"text": "a"}\n\n{"text": ', "line 3"),
        ("p.jsonl", '["a"]', "line 1"),
        ("p.jsonl", '"a"', "line 1"),
        ("p.jsonl", '{"text": 5}', "line 1"),
    ],
)
def test_a_prompt_file_that_cannot_be_used_is_refused_by_line(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_examples(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_a_prompt_file_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "nowhere.txt", tmp_path, tmp_path / "p.txt"):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_examples(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size in (("a.png", (64, 32)), ("b.png", (32, 32)), ("c.png", (16, 48))):
        picture = Image.new("RGB", size, (255, 0, 0))
        picture.paste((0, 0, 255), (0, 0, 4, 4))
        picture.save(tmp_path / name)
    records = [{"file_name": f"{n}.png", "text": f"picture {n}"} for n in "abc"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)))
    return tmp_path


def test_a_picture_folder_gives_middle_squares_with_their_captions(folder: Path) -> None:
    pictures, captions = open_pictures(str(folder), 32).batch(0, 6, seed=0)
    assert pictures.shape == (6, 3, 32, 32) and pictures.dtype == torch.float32
    assert sorted(captions) == [f"picture {n}" for n in "aabbcc"]
    for picture, text in zip(pictures, captions, strict=True):
        blue = bool((picture[2] > 0.9).any())
        assert blue == (text == "picture b")  # of the others the blue corner is cropped away
        assert float(picture.min()) == 0 and float(picture.max()) == 1


def test_a_picture_folder_is_addressed_by_position(folder: Path) -> None:
    whole = open_pictures(str(folder), 32).batch(0, 9, seed=1)[1]
    assert open_pictures(str(folder), 32).batch(4, 3, seed=1)[1] == whole[4:7]


def test_a_picture_folder_without_its_table_or_with_a_missing_picture_is_refused(folder: Path) -> None:
    (folder / "b.png").unlink()
    with pytest.raises(ConfigError, match=r"b\.png"):
        open_pictures(str(folder), 32)
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"metadata\.jsonl is missing"):
        open_pictures(str(folder), 32)


def test_a_picture_that_is_cut_short_is_named(folder: Path) -> None:
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:60])
    with pytest.raises(AlignkitError, match=r"b\.png"):
        open_pictures(str(folder), 32).batch(0, 3, seed=0)


@pytest.mark.parametrize(
    "source", ["", "nowhere", "no.such.module:Thing", "alignkit.data:Nothing", "alignkit.data:Stream", "./x:Y", ":Y"]
)
def test_a_source_of_pictures_that_is_none_is_refused(source: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.pictures"):
        open_pictures(source or "nowhere/at/all", 32)


def test_drawings_of_another_size_are_refused() -> None:
    with pytest.raises(ConfigError, match="64 pixels"):
        open_pictures("alignkit_shapes.data:Drawings", 512)
