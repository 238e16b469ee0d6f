"""Real images without captions, to compare generated ones with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from alignkit.data.image_files import KEY, METADATA, SUFFIXES, StoredImage
from alignkit.data.images import EXPECTED, ImageFiles, ImageSet, open_images
from alignkit.data.sources import Images, find_class
from alignkit.errors import ConfigError

MOST = 2000
"""Images that are read at most; a distance changes little with more."""


def count_real(source: str) -> int:
    """Return the number of images that `real_images` yields, without reading one. Raises ConfigError as it does."""
    if not Path(source).exists() and ":" in source and not source.startswith("datasets:"):
        find_class(source, Images, KEY, EXPECTED)  # type: ignore[type-abstract]
        return MOST
    return _open(source, 1)[1]


def real_images(source: str, size: int, batch_size: int) -> Iterator[Tensor]:
    """Yield up to `MOST` images of `size` pixels in batches (N, 3, size, size), float32 in [0, 1].

    `source` is what data.images takes, or a folder of images without captions. Raises ConfigError, in one line, if
    there are none or one cannot be read.
    """
    images, count = _open(source, size)
    for start in range(0, count, batch_size):
        yield images.batch(start, min(batch_size, count - start), 0)[0]


def _open(source: str, size: int) -> tuple[Images, int]:
    folder = Path(source)
    if folder.is_dir() and not (folder / METADATA).is_file():
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not files:
            raise ConfigError(f"{source}: contains no image; expected {', '.join(sorted(SUFFIXES))}")
        images: Images = ImageFiles([StoredImage(str(path), path.stem, {}, path) for path in files], size)
    else:
        images = open_images(source, size)
    return images, min(MOST, len(images)) if isinstance(images, ImageSet) else MOST  # others have no end
