"""Broken captioned images: messages give their location, and they are refused or skipped."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from alignkit.data.decode import FORMATS, open_image
from alignkit.data.image_files import shards
from alignkit.data.images import check_images, open_images
from alignkit.errors import AlignkitError, ConfigError
from alignkit.records import Example
from image_fixtures import COLOURS, EXPECTED, dataset, png, seen, write_shard


def test_a_missing_image_or_table_is_refused_by_line(folder: Path) -> None:
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
        ("[]", "line 2: not a JSON object"),
        ('{"text": "a"}', 'line 2: expected the image\'s path as "image" or "file_name"'),
        ('{"image": "a.png"}', "line 2: .*has no prompt, caption or text"),
        ('{"image": "a.png", "text": 5}', "line 2: expected a non-empty string as the caption, found 5"),
        ('{"image": "a.png", "text": " "}', "line 2: expected a non-empty string as the caption, found ' '"),
    ],
)
def test_a_line_without_a_captioned_image_is_refused_or_skipped(folder: Path, line: str, message: str) -> None:
    table = folder / "metadata.jsonl"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], line, lines[2]]))
    with pytest.raises(ConfigError, match=message) as caught:
        seen(folder)
    assert "\n" not in str(caught.value)
    skipped: list[str] = []
    assert set(seen(folder, skipped)) == {"image a", "image c"}
    assert len(skipped) == 1 and f"{table}, line 2" in skipped[0]


def test_an_image_without_a_text_is_refused_or_skipped(captioned: Path) -> None:
    (captioned / "b.txt").unlink()
    with pytest.raises(ConfigError, match=r"b\.png: its caption b\.txt cannot be read"):
        seen(captioned)
    skipped: list[str] = []
    assert set(seen(captioned, skipped)) == {"image a", "image c"} and len(skipped) == 1
    (captioned / "b.txt").write_text("\n")
    with pytest.raises(ConfigError, match=r"b\.png: its caption b\.txt is empty"):
        seen(captioned)
    assert set(seen(captioned, skipped)) == {"image a", "image c"} and "is empty" in skipped[1]


def test_check_refuses_a_class_of_images_that_does_not_exist() -> None:
    check_images("alignkit_shapes.data:Drawings")
    for source, message in (
        ("alignkit_shapes.data:Nope", "no attribute 'Nope'"),
        ("nowhere:Drawings", "No module named 'nowhere'"),
        ("alignkit_shapes.data:DrawingPairs", "is not an alignkit.data.sources.Images"),
    ):
        with pytest.raises(ConfigError, match=f"^data.images: .*{message}"):
            check_images(source)


def test_a_text_without_an_image_is_refused_or_skipped(captioned: Path) -> None:
    (captioned / "b.png").rename(captioned / "b.avif")
    with pytest.raises(ConfigError, match=r"b\.txt: there is no image of this name; expected \.bmp, .*\.webp"):
        seen(captioned)
    skipped: list[str] = []
    assert set(seen(captioned, skipped)) == {"image a", "image c"} and len(skipped) == 1


@pytest.mark.parametrize("damage", [lambda b: b[:45], lambda b: b"", lambda b: b"no image", lambda b: b[:50] + b[60:]])
def test_an_image_that_cannot_be_read_is_refused_or_replaced_by_the_next(folder: Path, damage: Any) -> None:
    whole = open_images(str(folder), 4).batch(0, 30, seed=0)[1]
    (folder / "b.png").write_bytes(damage((folder / "b.png").read_bytes()))
    with pytest.raises(AlignkitError, match=r'line 2: b\.png cannot be read .*data\.on_error = "skip"') as caught:
        open_images(str(folder), 4).batch(0, 3, seed=0)
    assert "\n" not in str(caught.value)
    skipped: list[str] = []
    images = open_images(str(folder), 4, skipped=skipped)
    expected = [Example("image c") if caption == Example("image b") else caption for caption in whole]
    assert Example("image b") in whole
    assert images.batch(0, 30, seed=0)[1] == expected
    assert len(skipped) == 1 and "b.png" in skipped[0]
    for start in (3, 17):  # whatever was read before
        assert open_images(str(folder), 4, skipped=[]).batch(start, 5, seed=0)[1] == expected[start : start + 5]


def test_a_set_without_a_readable_image_is_refused_even_when_skipping(folder: Path) -> None:
    for name in COLOURS:
        (folder / f"{name}.png").write_bytes(b"")
    with pytest.raises(AlignkitError, match=r"none of the 3 items can be read; the first is .*a\.png"):
        open_images(str(folder), 4, skipped=[]).batch(0, 1, seed=0)
    for name in COLOURS:
        (folder / f"{name}.png").unlink()
    with pytest.raises(ConfigError, match=r"contains no captioned image; .*line 1"):
        open_images(str(folder), 4, skipped=[])


def test_broken_samples_of_a_shard_are_named_by_member(tmp_path: Path) -> None:
    red = png(COLOURS["a"])
    members = {
        "a.png": red, "a.txt": b"image a",
        "lost.png": red, "void.png": red, "void.txt": b" ",
        "bare.txt": b"no image", "two.png": red, "two.jpg": red, "two.txt": b"which?",
        "odd.png": red, "odd.json": b"[1]", "latin.png": red, "latin.txt": b"\xff\xfe",
    }  # fmt: skip
    shard = write_shard(tmp_path / "s.tar", members)
    with pytest.raises(ConfigError, match=r"s\.tar, member lost: expected a caption as \.txt or \.json"):
        seen(shard)
    skipped: list[str] = []
    assert seen(shard, skipped) == {"image a": COLOURS["a"]}
    assert [
        f"member {name}:" in line
        for name, line in zip(("lost", "void", "bare", "two", "odd", "latin"), skipped, strict=True)
    ]


def test_a_duplicate_member_is_refused_or_skipped(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "s.tar", {"a.png": png(COLOURS["a"]), "a.txt": b"image a"})
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("a.txt")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"other"))
    with pytest.raises(ConfigError, match=r"s\.tar, member a\.txt: a duplicate name"):
        seen(path)
    skipped: list[str] = []
    assert set(seen(path, skipped)) == {"image a"} and len(skipped) == 1


@pytest.mark.parametrize("left", [0.05, 0.3, 0.5, 0.62, 0.75])
def test_a_truncated_shard_never_passes_as_complete(tmp_path: Path, left: float) -> None:
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


def test_a_shard_with_a_damaged_header_never_passes_as_complete(shard: Path) -> None:
    first = shard.with_name("s-00.tar")
    content = bytearray(first.read_bytes())
    place = content.index(b"b.json")
    content[place + 148 : place + 156] = b"garbage!"
    first.write_bytes(content)
    with pytest.raises(ConfigError, match=r"cut short or damaged after member x/a"):
        seen(first)
    skipped: list[str] = []
    assert set(seen(shard.with_name("s-*.tar"), skipped)) == {"image a", "image c"} and len(skipped) == 1


def test_a_shard_that_is_missing_or_compressed_is_refused_or_skipped(shard: Path) -> None:
    with pytest.raises(ConfigError, match=r"s-02\.tar cannot be read as an uncompressed tar file"):
        seen(shard.with_name("s-{00..02}.tar"))
    skipped: list[str] = []
    assert seen(shard.with_name("s-{00..02}.tar"), skipped) == EXPECTED and len(skipped) == 1
    with tarfile.open(shard.with_name("z.tar"), "w:gz") as tar:
        tar.add(shard, "s.tar")
    with pytest.raises(ConfigError, match=r"z\.tar cannot be read as an uncompressed tar file"):
        seen(shard.with_name("z.tar"))
    with pytest.raises(ConfigError, match="contains no captioned image"):
        seen(shard.with_name("q-*.tar"))


def test_a_broken_row_of_a_data_set_is_named_by_its_number(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the extra datasets")
    images = [{"bytes": png(COLOURS["a"]), "path": None}, {"bytes": b"none", "path": None}, None]
    dataset(tmp_path, image=images).save_to_disk(tmp_path / "saved")
    with pytest.raises(AlignkitError, match=r"saved, row 1 cannot be read"):
        seen(tmp_path / "saved")
    skipped: list[str] = []
    assert seen(tmp_path / "saved", skipped) == {"image a": COLOURS["a"]}
    assert ["row 1" in skipped[0], "row 2" in skipped[1], len(skipped)] == [True, True, 2]


@pytest.mark.parametrize("name", ["a.png", "a.eps"])
def test_a_file_in_another_format_is_refused_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    # Pillow would hand PostScript to Ghostscript.
    file = tmp_path / name
    Image.new("RGB", (8, 8)).save(file, "EPS")
    with Image.open(file) as opened:
        assert opened.format == "EPS"
    for source in (file, file.read_bytes()):
        with pytest.raises(ValueError, match="it is no image; expected PNG or JPEG or"):
            open_image(source)


@pytest.mark.parametrize("image_format", FORMATS)
def test_every_named_format_is_opened(tmp_path: Path, image_format: str) -> None:
    Image.new("RGB", (8, 6)).save(tmp_path / "image", image_format)
    with open_image(tmp_path / "image") as opened:
        assert opened.size == (8, 6)


@pytest.mark.parametrize("pattern", ["{0..99999999999}.tar", "{0..9}" * 8 + ".tar", "{a,b}" * 40 + ".tar"])
def test_braces_that_stand_for_too_many_files_are_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"stands for more than 100,000 files; correct the numbers in its braces"):
        shards(pattern)


def test_a_caption_of_megabytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png((255, 0, 0)))
    (tmp_path / "metadata.jsonl").write_text('{"image": "a.png", "text": "' + "a " * 1_300_000 + '"}')
    with pytest.raises(ConfigError, match="the text has 2,600,000 characters, expected 10,000 or fewer") as caught:
        check_images(str(tmp_path))
    assert len(str(caught.value)) < 400
