"""Captioned pictures: where they may lie, how they are made fit, and what becomes of broken ones."""

from __future__ import annotations

import importlib
import io
import json
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from alignkit.errors import AlignkitError, ConfigError
from alignkit.picture_files import shards
from alignkit.pictures import PictureSet, as_rgb, check_pictures, open_pictures

COLOURS = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255)}


def png(colour: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "png")
    return file.getvalue()


def seen(source: str | Path, skipped: list[str] | None = None, column: str = "") -> dict[str, tuple[int, ...]]:
    """The caption of every picture of a set, and the picture's colour."""
    pictures = open_pictures(str(source), 4, column, skipped)
    assert isinstance(pictures, PictureSet)
    found = [pictures.read(index) for index in range(len(pictures))]
    return {one[1]: tuple((255 * one[0][:, 0, 0]).round().int().tolist()) for one in found if one is not None}


EXPECTED = {f"picture {name}": colour for name, colour in COLOURS.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, `metadata.jsonl` among them."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in COLOURS.items():
        (folder / f"{name}.png").write_bytes(png(colour))
    records = [{"file_name": f"{n}.png", "text": f"picture {n}"} for n in COLOURS]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


@pytest.fixture
def captioned(folder: Path) -> Path:
    """The same with a text beside each picture, one of them in a folder of its own."""
    (folder / "metadata.jsonl").unlink()
    (folder / "more").mkdir()
    (folder / "c.png").rename(folder / "more" / "c.png")
    for name, place in (("a", folder), ("b", folder), ("c", folder / "more")):
        (place / f"{name}.txt").write_text(f"picture {name}\n")
    return folder


def write_shard(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """a and b in the first shard, c in the second; captions as .txt and as .json."""
    first = {"x/a.png": png(COLOURS["a"]), "x/a.txt": b"picture a\n", "b.json": b'{"caption": "picture b", "n": 1}'}
    write_shard(tmp_path / "s-00.tar", {**first, "b.png": png(COLOURS["b"])})
    return write_shard(tmp_path / "s-01.tar", {"c.txt": b"picture c", "c.PNG": png(COLOURS["c"]), "c.cls": b"3"})


def dataset(path: Path, **more: list[Any]) -> Any:
    datasets = pytest.importorskip("datasets", reason="needs the extra datasets")
    rows = {"image": [{"bytes": png(c), "path": None} for c in COLOURS.values()], "text": list(EXPECTED)} | more
    features = {"image": datasets.Image()} | {name: datasets.Value("string") for name in rows if name != "image"}
    table = importlib.import_module("pyarrow").table(rows, schema=datasets.Features(features).arrow_schema)
    return datasets.Dataset(table, fingerprint="test")


# where they lie


def test_a_folder_with_a_table_is_read(folder: Path) -> None:
    assert seen(folder) == EXPECTED


def test_a_folder_with_a_text_beside_each_picture_is_read_to_its_depth(captioned: Path) -> None:
    assert seen(captioned) == EXPECTED


def test_a_table_names_pictures_from_its_own_folder_or_anywhere(folder: Path, tmp_path: Path) -> None:
    paths = {"a": "pictures/a.png", "b": str(folder / "b.png"), "c": "pictures/../pictures/c.png"}
    records = [{"image": path, "caption": f"picture {name}"} for name, path in paths.items()]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert seen(tmp_path / "t.jsonl") == EXPECTED


def test_a_caption_is_named_where_there_are_several(tmp_path: Path, folder: Path) -> None:
    line = {"image": "pictures/a.png", "text": "short", "caption": "long"}
    (tmp_path / "t.jsonl").write_text(json.dumps(line))
    with pytest.raises(ConfigError, match=r"line 1: data\.caption_column: it has caption and text; say which"):
        seen(tmp_path / "t.jsonl")
    assert set(seen(tmp_path / "t.jsonl", column="text")) == {"short"}


@pytest.mark.parametrize("pattern", ["s-{00..01}.tar", "s-{00,01}.tar", "s-*.tar", "{s,t}-0[01].tar"])
def test_tar_shards_are_read_by_pattern(shard: Path, pattern: str) -> None:
    assert seen(shard.with_name(pattern)) == EXPECTED


def test_braces_keep_their_zeros_and_their_order() -> None:
    assert [str(p) for p in shards("{b,a}/{08..11}.tar")[:5]] == [
        "b/08.tar", "b/09.tar", "b/10.tar", "b/11.tar", "a/08.tar"
    ]  # fmt: skip


def test_members_of_a_shard_are_read_where_they_lie(shard: Path) -> None:
    """Against the tarfile module's own reading, after positions were taken from headers alone."""
    pictures = open_pictures(str(shard.with_name("s-00.tar")), 4)
    assert isinstance(pictures, PictureSet)
    with tarfile.open(shard.with_name("s-00.tar")) as tar:
        for index, name in enumerate(("x/a.png", "b.png")):
            member = tar.extractfile(name)
            assert member is not None and pictures.stored(index)[0] == member.read()


def test_a_data_set_on_disk_is_read(tmp_path: Path) -> None:
    dataset(tmp_path).save_to_disk(tmp_path / "saved")
    assert seen(tmp_path / "saved") == EXPECTED


def test_of_a_data_set_with_splits_one_is_named(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    sys.modules["datasets"].DatasetDict(train=data, test=data).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ConfigError, match=r"holds the splits train, test; name one, as .*saved/train"):
        seen(tmp_path / "saved")
    assert seen(tmp_path / "saved" / "test") == EXPECTED


def test_a_data_set_by_name_is_loaded_by_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, datasets = dataset(tmp_path), sys.modules["datasets"]
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or data)
    assert seen("datasets:acme/pictures") == seen("datasets:acme/pictures:test[:10]") == EXPECTED
    assert asked == [("acme/pictures", "train"), ("acme/pictures", "test[:10]")]


def test_a_data_set_from_files_is_loaded_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, datasets = dataset(tmp_path), sys.modules["datasets"]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "files").mkdir()
    data.to_parquet(tmp_path / "files" / "train.parquet")
    assert seen(f"datasets:{tmp_path / 'files'}") == EXPECTED
    with pytest.raises(ConfigError, match="cannot be loaded as a data set") as caught:
        seen(f"datasets:{tmp_path / 'files'}:nowhere")
    assert "\n" not in str(caught.value)


def test_what_a_data_set_lacks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset(tmp_path, caption=["1", "2", "3"]).save_to_disk(tmp_path / "two")
    with pytest.raises(ConfigError, match=r"data\.caption_column: .*has caption and text"):
        seen(tmp_path / "two")
    dataset(tmp_path).select_columns("text").save_to_disk(tmp_path / "none")
    with pytest.raises(ConfigError, match="has 0 columns of pictures"):
        seen(tmp_path / "none")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'alignkit\[datasets\]'"):
        seen(tmp_path / "two")


@pytest.mark.parametrize(
    "source", ["", "nowhere", "no.such.module:Thing", "alignkit.data:Nothing", "alignkit.data:Stream", "./x:Y", ":Y"]
)
def test_a_source_of_pictures_that_is_none_is_refused(source: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.pictures"):
        open_pictures(source or "nowhere/at/all", 32)


def test_drawings_of_another_size_are_refused() -> None:
    with pytest.raises(ConfigError, match="64 pixels"):
        open_pictures("alignkit_shapes.data:Drawings", 512)


# the stream


def test_the_stream_is_addressed_by_position_and_differs_by_seed(folder: Path) -> None:
    whole, captions = open_pictures(str(folder), 32).batch(0, 9, seed=1)
    part, their = open_pictures(str(folder), 32).batch(4, 3, seed=1)
    assert their == captions[4:7] and torch.equal(part, whole[4:7])
    assert all(sorted(captions[i : i + 3]) == sorted(EXPECTED) for i in (0, 3, 6))
    assert open_pictures(str(folder), 32).batch(0, 9, seed=2)[1] != captions


# how they are made fit


def test_the_middle_square_is_kept(tmp_path: Path) -> None:
    for name, size in (("wide", (64, 32)), ("high", (16, 48))):
        picture = Image.new("RGB", size, (255, 0, 0))
        picture.paste((0, 0, 255), (0, 0, 4, 4))
        picture.save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    pictures, _ = open_pictures(str(tmp_path), 32).batch(0, 2, seed=0)
    assert pictures.shape == (2, 3, 32, 32) and pictures.dtype == torch.float32
    assert bool((pictures[:, 0] == 1).all()) and bool((pictures[:, 1:] == 0).all())  # the blue corner is cropped away


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_upright_as_its_exif_orientation_says(orientation: int) -> None:
    upright = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5)
    turned = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(turned[orientation]) if orientation in turned else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    stored.save(file, "png", exif=exif)
    assert np.array_equal(np.asarray(as_rgb(Image.open(file))), np.asarray(upright))


def test_what_is_transparent_lies_on_white() -> None:
    clear, half = (0, 0, 0, 0), (255, 0, 0, 128)
    picture = Image.new("RGBA", (2, 1))
    picture.putpixel((0, 0), clear)
    picture.putpixel((1, 0), half)
    found = np.asarray(as_rgb(picture))[0]
    assert found[0].tolist() == [255, 255, 255] and found[1].tolist() == [255, 127, 127]
    grey = Image.new("LA", (1, 1), (0, 0))
    assert as_rgb(grey).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([10, 20, 30])
    assert as_rgb(palette).getpixel((0, 0)) == (10, 20, 30)
    palette.info["transparency"] = 0
    assert as_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


def test_grey_and_ink_pictures_become_rgb(tmp_path: Path) -> None:
    assert as_rgb(Image.new("L", (1, 1), 77)).getpixel((0, 0)) == (77, 77, 77)
    assert as_rgb(Image.new("1", (1, 1), 1)).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    file = io.BytesIO()
    deep.save(file, "png")
    for picture in (deep, Image.open(file)):
        assert np.asarray(as_rgb(picture))[0, :, 0].tolist() == [0, 128, 255]
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    file = io.BytesIO()
    ink.save(file, "jpeg", quality=100)
    assert np.allclose(np.asarray(as_rgb(Image.open(file))), (255, 0, 0), atol=4)
    with pytest.raises(ValueError, match="floating-point"):
        as_rgb(Image.new("F", (1, 1)))


# broken ones


def test_a_missing_picture_or_table_is_refused_by_line(folder: Path) -> None:
    (folder / "b.png").unlink()
    with pytest.raises(ConfigError, match=r"metadata\.jsonl, line 2: there is no file .*b\.png"):
        seen(folder)
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"metadata\.jsonl is missing"):
        seen(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ("[]", "line 2: no JSON object"),
        ('{"text": "a"}', 'line 2: expected the picture\'s path as "image" or "file_name"'),
        ('{"image": "a.png"}', "line 2: .*has no prompt, caption or text"),
        ('{"image": "a.png", "text": 5}', "line 2: expected the caption as a string"),
        ('{"image": "a.png", "text": " "}', "line 2: expected the caption as a string that is not empty"),
    ],
)
def test_a_line_that_is_no_captioned_picture_is_refused_or_skipped(folder: Path, line: str, message: str) -> None:
    table = folder / "metadata.jsonl"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], line, lines[2]]))
    with pytest.raises(ConfigError, match=message) as caught:
        seen(folder)
    assert "\n" not in str(caught.value)
    skipped: list[str] = []
    assert set(seen(folder, skipped)) == {"picture a", "picture c"}
    assert len(skipped) == 1 and f"{table}, line 2" in skipped[0]


def test_a_picture_without_a_text_is_refused_or_skipped(captioned: Path) -> None:
    (captioned / "b.txt").unlink()
    with pytest.raises(ConfigError, match=r"b\.png: its caption b\.txt cannot be read"):
        seen(captioned)
    skipped: list[str] = []
    assert set(seen(captioned, skipped)) == {"picture a", "picture c"} and len(skipped) == 1
    (captioned / "b.txt").write_text("\n")
    with pytest.raises(ConfigError, match=r"b\.png: its caption b\.txt is empty"):
        seen(captioned)
    assert set(seen(captioned, skipped)) == {"picture a", "picture c"} and "is empty" in skipped[1]


def test_a_class_of_pictures_that_is_not_there_is_found_by_check() -> None:
    check_pictures("alignkit_shapes.data:Drawings")
    for source, message in (
        ("alignkit_shapes.data:Nope", "no attribute 'Nope'"),
        ("nowhere:Drawings", "No module named 'nowhere'"),
        ("alignkit_shapes.data:DrawingPairs", "is no alignkit.data.Pictures"),
    ):
        with pytest.raises(ConfigError, match=f"^data.pictures: .*{message}"):
            check_pictures(source)


def test_a_text_without_a_picture_is_refused_or_skipped(captioned: Path) -> None:
    (captioned / "b.png").rename(captioned / "b.avif")
    with pytest.raises(ConfigError, match=r"b\.txt: there is no picture of that name, expected \.bmp, .*\.webp"):
        seen(captioned)
    skipped: list[str] = []
    assert set(seen(captioned, skipped)) == {"picture a", "picture c"} and len(skipped) == 1


@pytest.mark.parametrize(
    "damage", [lambda b: b[:45], lambda b: b"", lambda b: b"no picture", lambda b: b[:50] + b[60:]]
)
def test_a_picture_that_cannot_be_read_is_refused_or_replaced_by_the_next(folder: Path, damage: Any) -> None:
    whole = open_pictures(str(folder), 4).batch(0, 30, seed=0)[1]
    (folder / "b.png").write_bytes(damage((folder / "b.png").read_bytes()))
    with pytest.raises(AlignkitError, match=r'line 2: b\.png cannot be read .*data\.broken = "skip"') as caught:
        open_pictures(str(folder), 4).batch(0, 3, seed=0)
    assert "\n" not in str(caught.value)
    skipped: list[str] = []
    pictures = open_pictures(str(folder), 4, skipped=skipped)
    expected = ["picture c" if caption == "picture b" else caption for caption in whole]
    assert pictures.batch(0, 30, seed=0)[1] == expected
    assert len(skipped) == 1 and "b.png" in skipped[0]
    for start in (3, 17):  # whatever was read before
        assert open_pictures(str(folder), 4, skipped=[]).batch(start, 5, seed=0)[1] == expected[start : start + 5]


def test_a_set_of_which_nothing_can_be_read_is_refused_all_the_same(folder: Path) -> None:
    for name in COLOURS:
        (folder / f"{name}.png").write_bytes(b"")
    with pytest.raises(AlignkitError, match=r"none of 3 can be read; the first is .*a\.png"):
        open_pictures(str(folder), 4, skipped=[]).batch(0, 1, seed=0)
    for name in COLOURS:
        (folder / f"{name}.png").unlink()
    with pytest.raises(ConfigError, match=r"holds no captioned picture; .*line 1"):
        open_pictures(str(folder), 4, skipped=[])


def test_broken_samples_of_a_shard_are_named_by_member(tmp_path: Path) -> None:
    red = png(COLOURS["a"])
    members = {
        "a.png": red, "a.txt": b"picture a",
        "lost.png": red, "void.png": red, "void.txt": b" ",
        "bare.txt": b"no picture", "two.png": red, "two.jpg": red, "two.txt": b"which?",
        "odd.png": red, "odd.json": b"[1]", "latin.png": red, "latin.txt": b"\xff\xfe",
    }  # fmt: skip
    shard = write_shard(tmp_path / "s.tar", members)
    with pytest.raises(ConfigError, match=r"s\.tar, member lost: expected a caption as \.txt or \.json"):
        seen(shard)
    skipped: list[str] = []
    assert seen(shard, skipped) == {"picture a": COLOURS["a"]}
    assert [
        f"member {name}:" in line
        for name, line in zip(("lost", "void", "bare", "two", "odd", "latin"), skipped, strict=True)
    ]


def test_a_second_member_of_one_name_is_refused_or_skipped(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "s.tar", {"a.png": png(COLOURS["a"]), "a.txt": b"picture a"})
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("a.txt")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"other"))
    with pytest.raises(ConfigError, match=r"s\.tar, member a\.txt: a second one of this name"):
        seen(path)
    skipped: list[str] = []
    assert set(seen(path, skipped)) == {"picture a"} and len(skipped) == 1


@pytest.mark.parametrize("left", [0.05, 0.3, 0.5, 0.62, 0.75])
def test_a_shard_that_was_cut_short_anywhere_never_passes_for_whole(tmp_path: Path, left: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "png")
    members = {f"{n}.{end}": c for n in COLOURS for end, c in (("png", file.getvalue()), ("txt", n.encode()))}
    shard = write_shard(tmp_path / "s.tar", members)
    content = shard.read_bytes()
    used = len(content.rstrip(b"\0"))
    shard.write_bytes(content[: int(used * left)])
    with pytest.raises(AlignkitError, match=r"s\.tar"):
        seen(shard)


def test_a_shard_with_a_damaged_header_never_passes_for_whole(shard: Path) -> None:
    first = shard.with_name("s-00.tar")
    content = bytearray(first.read_bytes())
    place = content.index(b"b.json")
    content[place + 148 : place + 156] = b"garbage!"
    first.write_bytes(content)
    with pytest.raises(ConfigError, match=r"cut short or damaged behind member x/a"):
        seen(first)
    skipped: list[str] = []
    assert set(seen(shard.with_name("s-*.tar"), skipped)) == {"picture a", "picture c"} and len(skipped) == 1


def test_a_shard_that_is_missing_or_compressed_is_refused_or_skipped(shard: Path) -> None:
    with pytest.raises(ConfigError, match=r"s-02\.tar cannot be read as an uncompressed tar file"):
        seen(shard.with_name("s-{00..02}.tar"))
    skipped: list[str] = []
    assert seen(shard.with_name("s-{00..02}.tar"), skipped) == EXPECTED and len(skipped) == 1
    with tarfile.open(shard.with_name("z.tar"), "w:gz") as tar:
        tar.add(shard, "s.tar")
    with pytest.raises(ConfigError, match=r"z\.tar cannot be read as an uncompressed tar file"):
        seen(shard.with_name("z.tar"))
    with pytest.raises(ConfigError, match="holds no captioned picture"):
        seen(shard.with_name("q-*.tar"))


def test_a_broken_row_of_a_data_set_is_named_by_its_number(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the extra datasets")
    images = [{"bytes": png(COLOURS["a"]), "path": None}, {"bytes": b"none", "path": None}, None]
    dataset(tmp_path, image=images).save_to_disk(tmp_path / "saved")
    with pytest.raises(AlignkitError, match=r"saved, row 1 cannot be read"):
        seen(tmp_path / "saved")
    skipped: list[str] = []
    assert seen(tmp_path / "saved", skipped) == {"picture a": COLOURS["a"]}
    assert ["row 1" in skipped[0], "row 2" in skipped[1], len(skipped)] == [True, True, 2]
