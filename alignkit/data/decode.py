"""Convert between image files and tensors."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""Exceptions that Pillow raises for a file that is not a complete image."""


FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""Formats of images that are read, as Pillow names them. Others, whatever a file is called, are never tried: Pillow
would start Ghostscript for PostScript."""


def open_image(source: Path | bytes, formats: Sequence[str] = FORMATS) -> Image.Image:
    """Open an image file, or the bytes of one, as a context; its pixels are decoded later.

    Raises one of `UNREADABLE` for a file in none of the `formats`.
    """
    try:
        return Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=list(formats))
    except UnidentifiedImageError as error:
        raise ValueError(f"it is no image; expected {' or '.join(formats)}") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB: apply the EXIF orientation, put transparency on white, scale 16-bit grey down to 8 bits.

    Raises ValueError for floating-point pixels, because their range is unknown.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if image.mode.startswith("I"):  # 16 bits; Pillow would clip them at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint32).clip(0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def middle_square(image: Image.Image, size: int) -> Tensor:
    """Crop an RGB image to its middle square and resize it: (3, size, size) float32 in [0, 1]."""
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    square = image.crop((left, top, left + edge, top + edge)).resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 255


def read_image(data: bytes, size: int) -> Tensor:
    """Decode an image file to its middle square, (3, size, size) float32 in [0, 1]. Raises one of `UNREADABLE`."""
    with open_image(data) as opened:
        return middle_square(as_rgb(opened), size)


def to_uint8(images: Tensor) -> Tensor:
    """Return the 8-bit levels that an image file stores: uint8, same shape and device, for values in [0, 1].

    Values outside [0, 1] are clamped. There is no gradient.
    """
    return (images.detach().clamp(0, 1) * 255).round().byte()
