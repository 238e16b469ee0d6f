"""Captioned images for a model, read from files or from a data set of the `datasets` library.

Each source is a finite, indexed set, so a stream over it can resume at any position, which is a single number.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from alignkit.data.decode import read_image
from alignkit.data.image_files import (
    CAPTION_KEY,
    KEY,
    METADATA,
    StoredImage,
    read_folder,
    read_shard,
    read_table,
    shards,
)
from alignkit.data.items import Items
from alignkit.data.sources import Images, find_class, open_class
from alignkit.data.text import choose_column, plain_columns
from alignkit.errors import ConfigError
from alignkit.records import Example

EXPECTED = "a folder, a .jsonl or .tar file, datasets:NAME"


class ImageSet(Items[tuple[Tensor, Example]], Images):
    """Captioned images, cropped to the middle square and resized to `size` pixels."""

    key = KEY

    def __init__(self, size: int, skipped: list[str] | None = None) -> None:
        super().__init__(skipped)
        self.size = size

    @abstractmethod
    def stored(self, index: int) -> tuple[bytes, Example]:
        """Return the bytes of an image file, and its caption. Raises OSError or ValueError if either is missing."""

    def load(self, index: int) -> tuple[Tensor, Example]:
        data, caption = self.stored(index)
        return read_image(data, self.size), caption

    def batch(self, start: int, size: int, seed: int) -> tuple[Tensor, list[Example]]:
        images, captions = zip(*self.at(start, size, seed), strict=True)
        return torch.stack(images), list(captions)


class ImageFiles(ImageSet):
    """Captioned images stored as files or as parts of files."""

    def __init__(self, images: Sequence[StoredImage], size: int, skipped: list[str] | None = None) -> None:
        super().__init__(size, skipped)
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return self._images[index].name

    def stored(self, index: int) -> tuple[bytes, Example]:
        image = self._images[index]
        with image.path.open("rb") as file:
            file.seek(image.start)
            data = file.read(-1 if image.length is None else image.length)
        return data, Example(image.caption, image.metadata, image.name)


class DatasetImages(ImageSet):
    """Rows of a data set of the `datasets` library that has one column of images.

    Its other columns of strings, numbers and booleans are metadata.
    """

    def __init__(self, source: str, size: int, column: str = "", skipped: list[str] | None = None) -> None:
        """Open `source`: a folder written by `save_to_disk`, or `datasets:NAME` or `datasets:NAME:SPLIT`."""
        super().__init__(size, skipped)
        self._source = source
        try:
            import datasets
        except ImportError:
            raise ConfigError(f"{KEY}: {source} needs the datasets library; pip install 'alignkit[datasets]'") from None
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
                f"{KEY}: {source} has the splits {', '.join(data)}; choose one, for example {source}/{next(iter(data))}"
            )
        found = [name for name, feature in data.features.items() if isinstance(feature, datasets.Image)]
        if len(found) != 1:
            raise ConfigError(f"{KEY}: {source} has {len(found)} columns of images; expected one")
        self._image, self._text = found[0], choose_column(data.column_names, column, CAPTION_KEY, source)
        columns = dict.fromkeys([self._image, self._text, *plain_columns(data.features.arrow_schema)])
        self._rows = data.with_format("arrow", columns=list(columns))  # images as stored, not decoded

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        return f"{self._source}, row {index}"

    def stored(self, index: int) -> tuple[bytes, Example]:
        (row,) = self._rows[index].to_pylist()
        image, caption = row.pop(self._image), row.pop(self._text)
        if not (isinstance(caption, str) and caption.strip()):
            raise ValueError(f"expected a non-empty string as {self._text}, found {caption!r}")
        if image is None:
            raise ValueError("the image is missing")
        data = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        return data, Example(caption, row, self.name(index))


def open_images(source: str, size: int, column: str = "", skipped: list[str] | None = None) -> Images:
    """Open the captioned images that `[data] images` names, at `size` pixels.

    `column` names the caption column; it is needed only if there are several candidates. A missing or unreadable item
    raises ConfigError, or is left out and noted in `skipped` if that list is given: a missing file is found here, an
    unreadable one when it is loaded.
    """
    path = Path(source)
    if source.startswith("datasets:") or any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        images: ImageSet = DatasetImages(source, size, column, skipped)
    elif (path / METADATA).is_file():
        images = ImageFiles(list(read_table(path / METADATA, column, skipped)), size, skipped)
    elif path.is_dir():
        images = ImageFiles(list(read_folder(path, skipped)), size, skipped)
    elif path.suffix == ".jsonl":
        images = ImageFiles(list(read_table(path, column, skipped)), size, skipped)
    elif path.suffix == ".tar":
        stored = [image for shard in shards(source) for image in read_shard(shard, column, skipped)]
        images = ImageFiles(stored, size, skipped)
    else:
        return open_class(source, size, Images, KEY, EXPECTED)  # type: ignore[type-abstract]
    if not len(images):
        raise ConfigError(f"{KEY}: {source} contains no captioned image" + "".join(f"; {s}" for s in skipped or ()))
    return images


def check_images(source: str, column: str = "", skipped: list[str] | None = None) -> None:
    """Raise ConfigError for missing files or captions, as `open_images` would. Reads no image; uses no network."""
    if Path(source).exists() or ":" not in source:
        open_images(source, 1, column, skipped)
    elif not source.startswith("datasets:"):
        find_class(source, Images, KEY, EXPECTED)  # type: ignore[type-abstract]
