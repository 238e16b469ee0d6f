"""Endless captioned drawings, as `[data] pictures = "alignkit_shapes.data:Drawings"`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from alignkit.data import Pictures
from alignkit_shapes.scenes import SIZE, caption, draw, sample_scene


class Drawings(Pictures):
    """Picture `i` of the stream of a seed is drawn from (seed, i) alone."""

    def __init__(self, size: int) -> None:
        if size != SIZE:
            raise ValueError(f"the drawings have {SIZE} pixels, the model {size}")

    def batch(self, start: int, size: int, seed: int) -> tuple[Tensor, list[str]]:
        pictures, captions = [], []
        for position in range(start, start + size):
            rng = np.random.default_rng([seed, position])
            scene = sample_scene(rng)
            pictures.append(draw(scene))
            captions.append(caption(scene, rng))
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255, captions
