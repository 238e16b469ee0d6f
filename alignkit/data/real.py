"""Real images without captions, to compare generated ones with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from alignkit.data.image_files import METADATA, SUFFIXES, StoredImage
from alignkit.data.images import ImageFiles, ImageSet, open_images
from alignkit.errors import ConfigError

MOST = 2000
"""Images that are read at most; a distance changes little with more."""


def real_images(source: str, size: int) -> Tensor:
    """Return up to `MOST` images of `size` pixels, (M, 3, size, size) float32 in [0, 1].

    `source` is what data.images takes, or a folder of images without captions. Raises ConfigError, in one line, if
    there are none or one cannot be read.
    """
    folder = Path(source)
    if folder.is_dir() and not (folder / METADATA).is_file():
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not files:
            raise ConfigError(f"{source}: contains no image; expected {', '.join(sorted(SUFFIXES))}")
        found = ImageFiles([StoredImage(str(path), path.stem, {}, path) for path in files[:MOST]], size)
        return torch.stack([image for image, _ in found.at(0, len(found), 0)])
    images = open_images(source, size)
    count = min(MOST, len(images)) if isinstance(images, ImageSet) else MOST  # others have no end
    return images.batch(0, count, 0)[0]
