"""Decode image files to RGB tensors."""

from __future__ import annotations

import io
import struct

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for a file that is no whole image."""


def as_rgb(image: Image.Image) -> Image.Image:
    """Upright by its EXIF orientation, what is transparent on white, 16-bit grey as 8-bit, in RGB.

    Raises ValueError for floating-point pixels, whose range nothing tells.
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
    """The middle square of an RGB image at `size` pixels, (3, size, size) float32 in [0, 1]."""
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    square = image.crop((left, top, left + edge, top + edge)).resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 255


def read_image(data: bytes, size: int) -> Tensor:
    """The middle square of an image file, (3, size, size) float32 in [0, 1]. Raises one of `UNREADABLE`."""
    with Image.open(io.BytesIO(data)) as opened:
        return middle_square(as_rgb(opened), size)
