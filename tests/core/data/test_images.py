"""Captioned images: supported sources, cropping and conversion to RGB."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alignkit.data.decode import as_rgb
from alignkit.data.image_files import shards
from alignkit.data.images import ImageSet, open_images
from alignkit.errors import ConfigError
from alignkit.records import Example
from image_fixtures import EXPECTED, dataset, seen

# sources


def test_a_folder_with_a_table_is_read(folder: Path) -> None:
    assert seen(folder) == EXPECTED


def test_a_folder_with_a_text_file_per_image_is_read_recursively(captioned: Path) -> None:
    assert seen(captioned) == EXPECTED


def test_a_table_may_name_images_by_relative_or_absolute_path(folder: Path, tmp_path: Path) -> None:
    paths = {"a": "images/a.png", "b": str(folder / "b.png"), "c": "images/../images/c.png"}
    records = [{"image": path, "caption": f"image {name}"} for name, path in paths.items()]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert seen(tmp_path / "t.jsonl") == EXPECTED


def test_the_caption_column_must_be_named_if_there_are_several(tmp_path: Path, folder: Path) -> None:
    line = {"image": "images/a.png", "text": "short", "caption": "long"}
    (tmp_path / "t.jsonl").write_text(json.dumps(line))
    with pytest.raises(ConfigError, match=r"line 1: data\.caption_column: it has caption and text; name the one"):
        seen(tmp_path / "t.jsonl")
    assert set(seen(tmp_path / "t.jsonl", column="text")) == {"short"}


@pytest.mark.parametrize("pattern", ["s-{00..01}.tar", "s-{00,01}.tar", "s-*.tar", "{s,t}-0[01].tar"])
def test_tar_shards_are_read_by_pattern(shard: Path, pattern: str) -> None:
    assert seen(shard.with_name(pattern)) == EXPECTED


def test_braces_keep_their_zeros_and_their_order() -> None:
    assert [str(p) for p in shards("{b,a}/{08..11}.tar")[:5]] == [
        "b/08.tar", "b/09.tar", "b/10.tar", "b/11.tar", "a/08.tar"
    ]  # fmt: skip


def test_members_of_a_shard_are_read_at_their_offsets(shard: Path) -> None:
    """Offsets come from the headers alone; the bytes equal those that tarfile extracts."""
    images = open_images(str(shard.with_name("s-00.tar")), 4)
    assert isinstance(images, ImageSet)
    with tarfile.open(shard.with_name("s-00.tar")) as tar:
        for index, name in enumerate(("x/a.png", "b.png")):
            member = tar.extractfile(name)
            assert member is not None and images.stored(index)[0] == member.read()


def test_a_data_set_on_disk_is_read(tmp_path: Path) -> None:
    dataset(tmp_path).save_to_disk(tmp_path / "saved")
    assert seen(tmp_path / "saved") == EXPECTED


def test_one_split_of_a_data_set_must_be_named(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    sys.modules["datasets"].DatasetDict(train=data, test=data).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ConfigError, match=r"has the splits train, test; choose one, for example .*saved/train"):
        seen(tmp_path / "saved")
    assert seen(tmp_path / "saved" / "test") == EXPECTED


def test_a_data_set_by_name_is_loaded_by_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, datasets = dataset(tmp_path), sys.modules["datasets"]
    calls: list[tuple[str, str]] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: calls.append((name, split)) or data)
    assert seen("datasets:acme/images") == seen("datasets:acme/images:test[:10]") == EXPECTED
    assert calls == [("acme/images", "train"), ("acme/images", "test[:10]")]


def test_a_data_set_from_files_is_loaded_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, datasets = dataset(tmp_path), sys.modules["datasets"]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "files").mkdir()
    data.to_parquet(tmp_path / "files" / "train.parquet")
    assert seen(f"datasets:{tmp_path / 'files'}") == EXPECTED
    with pytest.raises(ConfigError, match="cannot be loaded as a data set") as caught:
        seen(f"datasets:{tmp_path / 'files'}:nowhere")
    assert "\n" not in str(caught.value)


def test_a_message_names_what_a_data_set_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset(tmp_path, caption=["1", "2", "3"]).save_to_disk(tmp_path / "two")
    with pytest.raises(ConfigError, match=r"data\.caption_column: .*has caption and text"):
        seen(tmp_path / "two")
    dataset(tmp_path).select_columns("text").save_to_disk(tmp_path / "none")
    with pytest.raises(ConfigError, match="has 0 columns of images"):
        seen(tmp_path / "none")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'alignkit\[datasets\]'"):
        seen(tmp_path / "two")


@pytest.mark.parametrize(
    "source",
    [
        "",
        "nowhere",
        "no.such.module:Thing",
        "alignkit.data.sources:Nothing",
        "alignkit.data.stream:Stream",
        "./x:Y",
        ":Y",
    ],
)
def test_a_source_that_does_not_exist_or_has_no_images_is_refused(source: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.images"):
        open_images(source or "nowhere/at/all", 32)


def test_drawings_of_another_size_are_refused() -> None:
    with pytest.raises(ConfigError, match="64 pixels"):
        open_images("alignkit_shapes.data:Drawings", 512)


# the stream


def test_the_stream_is_addressed_by_position_and_differs_by_seed(folder: Path) -> None:
    whole, captions = open_images(str(folder), 32).batch(0, 9, seed=1)
    part, their = open_images(str(folder), 32).batch(4, 3, seed=1)
    assert their == captions[4:7] and torch.equal(part, whole[4:7])
    texts = [Example.of(caption).text for caption in captions]
    assert all(sorted(texts[i : i + 3]) == sorted(EXPECTED) for i in (0, 3, 6))
    assert open_images(str(folder), 32).batch(0, 9, seed=2)[1] != captions


# cropping and conversion


def test_the_middle_square_is_kept(tmp_path: Path) -> None:
    for name, size in (("wide", (64, 32)), ("high", (16, 48))):
        image = Image.new("RGB", size, (255, 0, 0))
        image.paste((0, 0, 255), (0, 0, 4, 4))
        image.save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    images, _ = open_images(str(tmp_path), 32).batch(0, 2, seed=0)
    assert images.shape == (2, 3, 32, 32) and images.dtype == torch.float32
    assert bool((images[:, 0] == 1).all()) and bool((images[:, 1:] == 0).all())  # the blue corner is cropped away


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_upright_by_its_exif_orientation(orientation: int) -> None:
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


def test_transparent_pixels_are_put_on_white() -> None:
    clear, half = (0, 0, 0, 0), (255, 0, 0, 128)
    image = Image.new("RGBA", (2, 1))
    image.putpixel((0, 0), clear)
    image.putpixel((1, 0), half)
    found = np.asarray(as_rgb(image))[0]
    assert found[0].tolist() == [255, 255, 255] and found[1].tolist() == [255, 127, 127]
    grey = Image.new("LA", (1, 1), (0, 0))
    assert as_rgb(grey).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([10, 20, 30])
    assert as_rgb(palette).getpixel((0, 0)) == (10, 20, 30)
    palette.info["transparency"] = 0
    assert as_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


def test_grey_and_cmyk_images_become_rgb(tmp_path: Path) -> None:
    assert as_rgb(Image.new("L", (1, 1), 77)).getpixel((0, 0)) == (77, 77, 77)
    assert as_rgb(Image.new("1", (1, 1), 1)).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    file = io.BytesIO()
    deep.save(file, "png")
    for image in (deep, Image.open(file)):
        assert np.asarray(as_rgb(image))[0, :, 0].tolist() == [0, 128, 255]
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    file = io.BytesIO()
    ink.save(file, "jpeg", quality=100)
    assert np.allclose(np.asarray(as_rgb(Image.open(file))), (255, 0, 0), atol=4)
    with pytest.raises(ValueError, match="floating-point"):
        as_rgb(Image.new("F", (1, 1)))
