"""Decode image files to RGB tensors."""

from __future__ import annotations

import io
import struct

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for a file that is no whole picture."""


def as_rgb(picture: Image.Image) -> Image.Image:
    """Upright by its EXIF orientation, what is transparent on white, 16-bit grey as 8-bit, in RGB.

    Raises ValueError for floating-point pixels, whose range nothing tells.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if picture.mode.startswith("I"):  # 16 bits; Pillow would clip them at 255
        picture = Image.fromarray((np.asarray(picture).astype(np.uint32).clip(0, 65535) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def middle_square(picture: Image.Image, size: int) -> Tensor:
    """The middle square of an RGB picture at `size` pixels, (3, size, size) float32 in [0, 1]."""
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    square = picture.crop((left, top, left + edge, top + edge)).resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 255


def read_picture(data: bytes, size: int) -> Tensor:
    """The middle square of a picture file, (3, size, size) float32 in [0, 1]. Raises one of `UNREADABLE`."""
    with Image.open(io.BytesIO(data)) as opened:
        return middle_square(as_rgb(opened), size)
