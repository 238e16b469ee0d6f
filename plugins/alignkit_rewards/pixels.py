"""Image preprocessing for vision towers: Pillow's bicubic resize, bit-exact but with a gradient, and normalisation.

The image processors of transformers are deliberately not used: their pixels depend on whether torchvision is installed,
and they have no gradient.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_PRECISION = 1 << 22
"""Pillow rounds filter weights of 8-bit images to 22 binary digits (libImaging/Resample.c)."""


@lru_cache(maxsize=16)
def bicubic_matrix(size: int, target: int) -> Tensor:
    """Return Pillow's bicubic weights (a = -0.5, widened when shrinking) as a float64 matrix (target, size)."""
    scale = size / target
    width = max(scale, 1.0)
    center = (torch.arange(target, dtype=torch.float64) + 0.5)[:, None] * scale
    # A tap counts if its index lies in [int(center - support + .5), int(center + support + .5)), as in Pillow.
    first, last = (center - 2 * width + 0.5).trunc(), (center + 2 * width + 0.5).trunc()
    taps = torch.arange(size, dtype=torch.float64)[None]
    x = ((taps - center + 0.5) / width).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, -0.5 * (((x - 5) * x + 8) * x - 4)
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0)) * ((taps >= first) & (taps < last))
    weights = weights / weights.sum(1, keepdim=True) * _PRECISION
    return (weights.abs() + 0.5).floor() * weights.sign() / _PRECISION


def _along_last(x: Tensor, target: int, levels: bool) -> Tensor:
    """Resize the last axis: levels 0..255 in and out; rounding has a straight-through gradient."""
    if x.shape[-1] == target:
        return x
    smooth = x @ bicubic_matrix(x.shape[-1], target).to(x).T
    if not levels:
        return smooth
    smooth = smooth.clamp(0, 255)
    return smooth + ((smooth + 0.5).floor() - smooth).detach()


def resize(images: Tensor, height: int, width: int, levels: bool = True) -> Tensor:
    """Resize (N, 3, H, W) in [0, 1] to float32 (N, 3, height, width) in [0, 1], like Pillow's `resize(..., BICUBIC)`.

    Equal to Pillow for 8-bit images: the width is resized first, then the height, and each pass is rounded. (For some
    images whose height shrinks, Pillow 13 resizes the height first; rounding and clamping between the passes then
    differ, by 2 levels on smooth images and up to 25 on noise. Older versions never do.) All sums are exact in float64,
    so they agree on every device. Differentiable; rounding counts as the identity. With `levels=False` nothing is
    rounded or clamped, as in torch's antialiased bicubic resize of a tensor; values may then slightly exceed [0, 1].
    """
    exact = torch.float32 if images.device.type == "mps" else torch.float64  # MPS has no float64: a level may differ
    x = images.to(exact) * 255
    if levels:
        x = x + (x.round() - x).detach()
    across = _along_last(x, width, levels)
    down = _along_last(across.transpose(-1, -2), height, levels).transpose(-1, -2)
    return (down / 255).float()


def resize_and_crop(images: Tensor, size: int, levels: bool = True) -> Tensor:
    """Resize (N, 3, H, W) in [0, 1] so that the shorter side is `size`, and crop the centre: (N, 3, size, size).

    Lengths and offsets are rounded down, as in transformers; torchvision's crop may be shifted by one pixel.
    """
    height, width = images.shape[-2:]
    shorter = min(height, width)
    height, width = size * height // shorter, size * width // shorter
    top, left = (height - size) // 2, (width - size) // 2
    return resize(images, height, width, levels)[..., top : top + size, left : left + size]


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Normalise (N, 3, H, W) in [0, 1] to zero mean and unit standard deviation per channel."""
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]
