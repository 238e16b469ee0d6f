"""Rewards that need no network: the size of the image as a JPEG file (Black et al., DDPO, 2305.13301)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Le
from PIL import Image
from torch import Tensor

from alignkit import Example, Reward, check_ranges
from alignkit.data.decode import to_uint8


@dataclass
class JpegIncompressibility(Reward):
    """Size of the image as a JPEG file in kilobytes (1000 bytes): more detail scores higher. No gradient."""

    quality: Annotated[int, Ge(1), Le(100)] = 95
    """JPEG quality; colours are stored at half resolution, Pillow's default."""

    bounds: ClassVar[tuple[float | None, float | None]] = (0.0, None)
    name: ClassVar[str] = "jpeg_incompressibility"

    def __post_init__(self) -> None:
        check_ranges(self)

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        levels = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
        return torch.tensor([self._bytes(Image.fromarray(one)) / 1000 for one in levels], device=images.device)

    def _bytes(self, image: Image.Image) -> int:
        file = io.BytesIO()
        image.save(file, format="JPEG", quality=self.quality)
        return file.tell()


@dataclass
class JpegCompressibility(JpegIncompressibility):
    """Minus the size of the image as a JPEG file in kilobytes (1000 bytes): less detail scores higher. No gradient."""

    bounds: ClassVar[tuple[float | None, float | None]] = (None, 0.0)
    name: ClassVar[str] = "jpeg_compressibility"

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        return -super().__call__(images, examples)
