from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from alignkit.interfaces import Reward
from alignkit.records import Example
from alignkit_rewards.jpeg import JpegCompressibility, JpegIncompressibility


@pytest.mark.parametrize("kind", [JpegCompressibility, JpegIncompressibility])
def test_both_hold_the_contract(
    kind: type[JpegIncompressibility], holds_the_contract: Callable[[Reward], None]
) -> None:
    holds_the_contract(kind())


@pytest.mark.parametrize("quality", [95, 50])
def test_it_is_the_size_of_the_file_in_kilobytes(quality: int, images: Tensor, examples: list[Example]) -> None:
    sizes = []
    for image in images:
        file = io.BytesIO()
        levels = np.rint(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        Image.fromarray(levels).save(file, "jpeg", quality=quality)
        sizes.append(len(file.getvalue()) / 1000)
    assert JpegIncompressibility(quality)(images, examples).tolist() == pytest.approx(sizes)
    assert JpegCompressibility(quality)(images, examples).tolist() == pytest.approx([-size for size in sizes])


def test_noise_is_larger_than_a_plain_image() -> None:
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plain, rough = JpegIncompressibility()(torch.cat([torch.full_like(noise, 0.5), noise]), [Example("")] * 2)
    assert rough > 5 * plain > 0


def test_a_quality_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^quality: found 0, expected at least 1 and at most 100$"):
        JpegCompressibility(quality=0)
