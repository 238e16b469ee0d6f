"""A reward on images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from alignkit import Example, Reward


@dataclass
class Rightness(Reward):
    """The horizontal centre of brightness, from -1 at the left edge to 1 at the right; 0 for a black image."""

    differentiable: ClassVar[bool] = True
    bounds: ClassVar[tuple[float | None, float | None]] = (-1.0, 1.0)

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        bright = images.mean((1, 2))
        places = torch.linspace(-1, 1, images.shape[3], device=images.device)
        centre: Tensor = (bright * places).sum(1) / (bright.sum(1) + 1e-6)
        return centre
