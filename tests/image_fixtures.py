"""Small sets of captioned images: a folder, tar shards, a data set; and a function that reads one."""

from __future__ import annotations

import importlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from alignkit.data.images import ImageSet, open_images
from plugin_fixtures import PluginFolder

COLOURS = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255)}


def png(colour: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "png")
    return file.getvalue()


def seen(source: str | Path, skipped: list[str] | None = None, column: str = "") -> dict[str, tuple[int, ...]]:
    """Map the caption of every image of a set to the image's colour."""
    images = open_images(str(source), 4, column, skipped)
    assert isinstance(images, ImageSet)
    found = [images.read(index) for index in range(len(images))]
    return {one[1].text: tuple((255 * one[0][:, 0, 0]).round().int().tolist()) for one in found if one is not None}


EXPECTED = {f"image {name}": colour for name, colour in COLOURS.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of three images with a `metadata.jsonl`."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, colour in COLOURS.items():
        (folder / f"{name}.png").write_bytes(png(colour))
    records = [{"file_name": f"{n}.png", "text": f"image {n}"} for n in COLOURS]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


@pytest.fixture
def captioned(folder: Path) -> Path:
    """The same images, each with a text file; one is in a subfolder."""
    (folder / "metadata.jsonl").unlink()
    (folder / "more").mkdir()
    (folder / "c.png").rename(folder / "more" / "c.png")
    for name, place in (("a", folder), ("b", folder), ("c", folder / "more")):
        (place / f"{name}.txt").write_text(f"image {name}\n")
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
    """Two shards, a and b in the first and c in the second, with captions as .txt and as .json."""
    first = {"x/a.png": png(COLOURS["a"]), "x/a.txt": b"image a\n", "b.json": b'{"caption": "image b", "n": 1}'}
    write_shard(tmp_path / "s-00.tar", {**first, "b.png": png(COLOURS["b"])})
    return write_shard(tmp_path / "s-01.tar", {"c.txt": b"image c", "c.PNG": png(COLOURS["c"]), "c.cls": b"3"})


SIGNS = """
    from alignkit import hookimpl

    @hookimpl
    def register_rewards(register):
        register("signs", "signs.reward:Signs", "Bright signs that read OPEN, dark ones that read EXIT")
"""

SIGNS_REWARD = """
    import torch
    from alignkit.interfaces import Reward

    DIRECTION = {"OPEN": 1.0, "EXIT": -1.0}


    class Signs(Reward):
        differentiable = True

        def __call__(self, images, examples):
            wanted = torch.tensor([DIRECTION[example.metadata["target"]] for example in examples])
            return wanted * images.mean((1, 2, 3))
"""


@pytest.fixture
def signs(tmp_path: Path, plugins: PluginFolder) -> dict[str, Any]:
    """Settings of a run on two prompts and two captioned images of one text with the targets OPEN and EXIT.

    The reward `signs` is the mean of all pixels for OPEN and its negative for EXIT; it fails without a target.
    """
    plugins.install("signs", SIGNS, reward=SIGNS_REWARD)
    folder = tmp_path / "signs"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.png").write_bytes(png(COLOURS[name]))
    records = [{"text": "a sign", "target": target} for target in ("OPEN", "EXIT")]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, records)))
    images = [{"file_name": f"{name}.png", **record} for name, record in zip("ab", records, strict=True)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, images)))
    return {"data.images": str(folder), "data.prompts": str(prompts), "reward": ["signs"]}


def dataset(path: Path, **more: list[Any]) -> Any:
    datasets = pytest.importorskip("datasets", reason="needs the extra datasets")
    rows = {"image": [{"bytes": png(c), "path": None} for c in COLOURS.values()], "text": list(EXPECTED)} | more
    features = {"image": datasets.Image()} | {name: datasets.Value("string") for name in rows if name != "image"}
    table = importlib.import_module("pyarrow").table(rows, schema=datasets.Features(features).arrow_schema)
    return datasets.Dataset(table, fingerprint="test")
