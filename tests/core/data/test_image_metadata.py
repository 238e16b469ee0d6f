"""Metadata of captioned images: the other keys of an image's record come with its caption, from every source."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from alignkit.data.image_files import read_shard
from alignkit.data.images import ImageSet, open_images
from alignkit.errors import ConfigError
from alignkit.records import Example
from image_fixtures import COLOURS, dataset, png, seen, write_shard

PHRASES = [{"head": "sign", "attributes": ["red"]}]


def captions(source: str | Path, column: str = "") -> list[Example]:
    """Return the captions of a set in the order of its files."""
    images = open_images(str(source), 4, column)
    assert isinstance(images, ImageSet)
    return [images.load(index)[1] for index in range(len(images))]


def signs(folder: Path, name: str, key: str) -> Path:
    """Write a table of two images with one text and different targets."""
    records: list[dict[str, Any]] = [
        {key: "a.png", "text": "a sign", "target": "OPEN", "phrases": PHRASES},
        {key: "b.png", "text": "a sign", "target": "EXIT", "weight": 0.5, "lit": True},
    ]
    (folder / name).write_text("\n".join(map(json.dumps, records)))
    return folder / name


@pytest.mark.parametrize("key", ["file_name", "image"])
@pytest.mark.parametrize("name", ["metadata.jsonl", "other.jsonl"])
def test_the_other_keys_of_a_line_are_metadata(folder: Path, name: str, key: str) -> None:
    table = signs(folder, name, key)
    found = captions(folder if name == "metadata.jsonl" else table)
    assert found == [
        Example("a sign", {"target": "OPEN", "phrases": PHRASES}),
        Example("a sign", {"target": "EXIT", "weight": 0.5, "lit": True}),
    ]
    assert [caption.place for caption in found] == [f"{table}, line 1: a.png", f"{table}, line 2: b.png"]


def test_a_text_column_that_is_not_the_caption_is_metadata(folder: Path) -> None:
    (folder / "t.jsonl").write_text(json.dumps({"image": "a.png", "text": "short", "caption": "long"}))
    assert captions(folder / "t.jsonl", "text") == [Example("short", {"caption": "long"})]
    assert captions(folder / "t.jsonl", "caption") == [Example("long", {"text": "short"})]


def test_an_image_with_a_text_file_has_no_metadata_but_its_place(captioned: Path) -> None:
    found = captions(captioned)
    assert found == [Example(f"image {name}") for name in COLOURS]
    assert [caption.place for caption in found] == [str(captioned / name) for name in ("a.png", "b.png", "more/c.png")]


def test_the_json_member_of_a_shard_is_metadata_but_for_the_caption(tmp_path: Path) -> None:
    image = png(COLOURS["a"])
    both = b'{"caption": "a shop sign", "target": "EXIT", "n": 1}'
    shard = write_shard(tmp_path / "s.tar", {
        "a.png": image, "a.json": b'{"caption": "a sign", "target": "OPEN"}',
        "b.png": image, "b.txt": b"a sign\n", "b.json": both,
        "c.png": image, "c.txt": b"a sign",
    })  # fmt: skip
    found = captions(shard)
    assert found == [
        Example("a sign", {"target": "OPEN"}),
        Example("a sign", {"caption": "a shop sign", "target": "EXIT", "n": 1}),
        Example("a sign"),
    ]
    assert [caption.place for caption in found] == [f"{shard}, member {name}.png" for name in "abc"]
    assert captions(shard, "caption")[1] == Example("a shop sign", {"target": "EXIT", "n": 1})


def test_a_damaged_json_member_is_broken_data_also_where_the_caption_is_a_text_member(tmp_path: Path) -> None:
    image = png(COLOURS["a"])
    members = {"a.png": image, "a.txt": b"a sign", "a.json": b'{"target": ', "b.png": image, "b.txt": b"another"}
    shard = write_shard(tmp_path / "s.tar", members)
    with pytest.raises(ConfigError, match=r"s\.tar, member a: not JSON"):
        captions(shard)
    skipped: list[str] = []
    assert set(seen(shard, skipped)) == {"another"} and len(skipped) == 1


def test_each_member_of_a_shard_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = png(COLOURS["a"])
    members = {"a.png": image, "a.json": b'{"text": "a sign", "n": 1}', "b.txt": b"a sign", "b.json": b"{}"}
    shard = write_shard(tmp_path / "s.tar", {**members, "b.png": image})
    read: list[str] = []
    extract = tarfile.TarFile.extractfile
    monkeypatch.setattr(tarfile.TarFile, "extractfile", lambda self, m: read.append(m.name) or extract(self, m))
    images = list(read_shard(shard))
    assert sorted(read) == ["a.json", "b.json", "b.txt"] and [image.metadata for image in images] == [{"n": 1}, {}]


def test_the_plain_columns_of_a_data_set_are_metadata(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    data = dataset(saved, target=["OPEN", None, "EXIT"]).add_column("number", [1, 2, 3])
    data = data.add_column("lit", [True, False, True]).add_column("boxes", [[1.0], [], [2.0]])
    data.save_to_disk(saved)
    found = captions(saved)
    assert found == [
        Example("image a", {"target": "OPEN", "number": 1, "lit": True}),
        Example("image b", {"target": None, "number": 2, "lit": False}),
        Example("image c", {"target": "EXIT", "number": 3, "lit": True}),
    ]
    assert [caption.place for caption in found] == [f"{saved}, row {row}" for row in range(3)]
