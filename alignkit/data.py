"""Prompts and captioned pictures, as streams whose position is a single number."""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from alignkit.errors import AlignkitError, ConfigError
from alignkit.interfaces import Example


def read_examples(path: str | Path) -> list[Example]:
    """One text a line (.txt), or one JSON object a line with "text" and any metadata (.jsonl)."""
    path = Path(path)
    try:
        # Not splitlines, which also ends lines at characters that JSON strings may hold.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts: {path} cannot be read ({error}); expected a .txt or .jsonl file") from error
    examples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            examples.append(Example(line.strip()))
            continue
        try:
            record = json.loads(line)
            text = record.pop("text")
            if not isinstance(text, str):
                raise TypeError(f"text is {text!r}")
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ConfigError(
                f'prompts: {path}, line {number}: expected a JSON object with "text", a string, found {line[:60]!r}'
            ) from error
        examples.append(Example(text, record))
    if not examples:
        raise ConfigError(f"prompts: {path} holds no prompt; expected at least one line of text")
    return examples


class Stream:
    """Endless shuffled passes over a number of items. Item `i` of the stream depends on the seed and `i` alone."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def indices(self, start: int, size: int) -> list[int]:
        """Which items stand at positions start .. start + size."""
        order: dict[int, np.ndarray] = {}
        found = []
        for position in range(start, start + size):
            epoch, place = divmod(position, self.count)
            if epoch not in order:
                order[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            found.append(int(order[epoch][place]))
        return found


class Pictures(ABC):
    """Captioned pictures. `[data] pictures` names a folder, or a subclass of this as "package.module:Class"."""

    @abstractmethod
    def batch(self, start: int, size: int, seed: int) -> tuple[Tensor, list[str]]:
        """Pictures (size, 3, H, W) float32 in [0, 1] and captions at positions start .. of the stream of `seed`."""


class PictureFolder(Pictures):
    """A folder of pictures with `metadata.jsonl` ("file_name", "text"), as the datasets library's imagefolder reads it.

    Pictures are cropped to the middle square and resized to `size` pixels.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        table = folder / "metadata.jsonl"
        if not table.is_file():
            raise ConfigError(
                f'data.pictures: {table} is missing; expected one JSON object a line with "file_name" and "text"'
            )
        self.records: list[tuple[str, str]] = []
        for example in read_examples(table):
            name = example.metadata.get("file_name")
            if not isinstance(name, str) or not (folder / name).is_file():
                raise ConfigError(f"data.pictures: {table} names {name!r}, which is no file in {folder}")
            self.records.append((name, example.text))

    def batch(self, start: int, size: int, seed: int) -> tuple[Tensor, list[str]]:
        chosen = [self.records[i] for i in Stream(len(self.records), seed).indices(start, size)]
        return torch.stack([self._read(name) for name, _ in chosen]), [text for _, text in chosen]

    def _read(self, name: str) -> Tensor:
        try:
            with Image.open(self.folder / name) as opened:
                picture = opened.convert("RGB")
        except OSError as error:
            raise AlignkitError(f"data.pictures: {self.folder / name} cannot be read as a picture ({error})") from error
        return middle_square(picture, self.size)


def middle_square(picture: Image.Image, size: int) -> Tensor:
    """The middle square of an RGB picture, resized: (3, size, size) float32 in [0, 1]."""
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    square = picture.crop((left, top, left + edge, top + edge)).resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 255


def open_pictures(source: str, size: int) -> Pictures:
    """What `[data] pictures` names, at `size` pixels."""
    if Path(source).is_dir():
        return PictureFolder(Path(source), size)
    module, _, name = source.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)(size)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(
            f'data.pictures: {source!r} is no folder and no "package.module:Class" of captioned pictures ({error})'
        ) from error
    if not isinstance(found, Pictures):
        raise ConfigError(f"data.pictures: {source} is no alignkit.data.Pictures")
    return found


def slice_of(position: int, size: int, rank: int, processes: int) -> tuple[int, int]:
    """Where process `rank` reads when each of `processes` takes `size` items a batch: (start, size)."""
    return (position * processes + rank) * size, size


def examples_at(examples: Sequence[Example], stream: Stream, start: int, size: int) -> list[Example]:
    """The examples at positions start .. start + size of a stream over them."""
    return [examples[i] for i in stream.indices(start, size)]
