"""Captioned pictures, opened and made fit for a model: of files, and of data sets of the datasets library.

Each is a finite set whose pictures are found by number, so a stream over it is entered anywhere, by one number.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from alignkit.data.decode import read_picture
from alignkit.data.image_files import CAPTION_KEY, KEY, StoredPicture, read_folder, read_shard, read_table, shards
from alignkit.data.items import Items
from alignkit.data.sources import Pictures, find_class, open_class
from alignkit.data.text import choose_column
from alignkit.errors import ConfigError

EXPECTED = "no folder, .jsonl or .tar file, no datasets:NAME"


class PictureSet(Items[tuple[Tensor, str]], Pictures):
    """Captioned pictures, cropped to the middle square and resized to `size` pixels."""

    key = KEY

    def __init__(self, size: int, skipped: list[str] | None = None) -> None:
        super().__init__(skipped)
        self.size = size

    @abstractmethod
    def stored(self, index: int) -> tuple[bytes, str]:
        """The file of a picture, and its caption. Raises OSError or ValueError if that cannot be had."""

    def load(self, index: int) -> tuple[Tensor, str]:
        data, caption = self.stored(index)
        return read_picture(data, self.size), caption

    def batch(self, start: int, size: int, seed: int) -> tuple[Tensor, list[str]]:
        pictures, captions = zip(*self.at(start, size, seed), strict=True)
        return torch.stack(pictures), list(captions)


class PictureFiles(PictureSet):
    """Captioned pictures that are files, or parts of files."""

    def __init__(self, pictures: Sequence[StoredPicture], size: int, skipped: list[str] | None = None) -> None:
        super().__init__(size, skipped)
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def name(self, index: int) -> str:
        return self._pictures[index].name

    def stored(self, index: int) -> tuple[bytes, str]:
        picture = self._pictures[index]
        with picture.path.open("rb") as file:
            file.seek(picture.start)
            return file.read(-1 if picture.length is None else picture.length), picture.caption


class DatasetPictures(PictureSet):
    """Rows of a data set of the datasets library, with one column of pictures."""

    def __init__(self, source: str, size: int, column: str = "", skipped: list[str] | None = None) -> None:
        """`source` is a folder that `save_to_disk` wrote, or `datasets:NAME` or `datasets:NAME:SPLIT`."""
        super().__init__(size, skipped)
        self._source = source
        try:
            import datasets
        except ImportError:
            raise ConfigError(f"{KEY}: {source} is read by datasets; pip install 'alignkit[datasets]'") from None
        try:
            if source.startswith("datasets:"):
                name, _, split = source.removeprefix("datasets:").partition(":")
                data = datasets.load_dataset(name, split=split or "train")
            else:
                data = datasets.load_from_disk(source)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"{KEY}: {source} cannot be loaded as a data set ({reason})") from error
        if isinstance(data, datasets.DatasetDict):
            raise ConfigError(
                f"{KEY}: {source} holds the splits {', '.join(data)}; name one, as {source}/{next(iter(data))}"
            )
        found = [name for name, feature in data.features.items() if isinstance(feature, datasets.Image)]
        if len(found) != 1:
            raise ConfigError(f"{KEY}: {source} has {len(found)} columns of pictures; expected one")
        self._picture, self._text = found[0], choose_column(data.column_names, column, CAPTION_KEY, source)
        self._rows = data.with_format("arrow", columns=[self._picture, self._text])  # pictures as stored, not decoded

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        return f"{self._source}, row {index}"

    def stored(self, index: int) -> tuple[bytes, str]:
        (row,) = self._rows[index].to_pylist()
        picture, caption = row[self._picture], row[self._text]
        if not (isinstance(caption, str) and caption.strip()):
            raise ValueError(f"expected a string that is not empty as {self._text}, found {caption!r}")
        if picture is None:
            raise ValueError("there is no picture")
        return picture["bytes"] if picture["bytes"] is not None else Path(picture["path"]).read_bytes(), caption


def open_pictures(source: str, size: int, column: str = "", skipped: list[str] | None = None) -> Pictures:
    """What `[data] pictures` names, at `size` pixels.

    `column` names the caption where there are several to choose from. What is broken is a ConfigError, or, given a
    list `skipped`, left out and noted there: what is missing now, and what cannot be read when it comes up.
    """
    path = Path(source)
    if source.startswith("datasets:") or any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        pictures: PictureSet = DatasetPictures(source, size, column, skipped)
    elif (path / "metadata.jsonl").is_file():
        pictures = PictureFiles(list(read_table(path / "metadata.jsonl", column, skipped)), size, skipped)
    elif path.is_dir():
        pictures = PictureFiles(list(read_folder(path, skipped)), size, skipped)
    elif path.suffix == ".jsonl":
        pictures = PictureFiles(list(read_table(path, column, skipped)), size, skipped)
    elif path.suffix == ".tar":
        stored = [picture for shard in shards(source) for picture in read_shard(shard, column, skipped)]
        pictures = PictureFiles(stored, size, skipped)
    else:
        return open_class(source, size, Pictures, KEY, EXPECTED)  # type: ignore[type-abstract]
    if not len(pictures):
        raise ConfigError(f"{KEY}: {source} holds no captioned picture" + "".join(f"; {s}" for s in skipped or ()))
    return pictures


def check_pictures(source: str, column: str = "", skipped: list[str] | None = None) -> None:
    """Raise ConfigError for what is missing, as `open_pictures` would; reads no picture, and looks nothing up."""
    if Path(source).exists() or ":" not in source:
        open_pictures(source, 1, column, skipped)
    elif not source.startswith("datasets:"):
        find_class(source, Pictures, KEY, EXPECTED)  # type: ignore[type-abstract]
