"""Endless captioned drawings, and pairs of a correct and an incorrect drawing.

Use them as `[data] images = "alignkit_shapes.data:Drawings"` and `[data] pairs = "alignkit_shapes.data:DrawingPairs"`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from alignkit.data.sources import Images, Preferences
from alignkit.records import PreferencePairs
from alignkit_shapes.build.questions import corrupted
from alignkit_shapes.scenes import SIZE, Scene, caption, draw, sample_scene


class Drawings(Images):
    """Endless stream of captioned drawings; drawing `i` depends only on (seed, i)."""

    def __init__(self, size: int) -> None:
        _expect(size)

    def batch(self, start: int, size: int, seed: int) -> tuple[Tensor, list[str]]:
        drawings, captions = [], []
        for position in range(start, start + size):
            rng = np.random.default_rng([seed, position])
            scene = sample_scene(rng)
            drawings.append(draw(scene))
            captions.append(caption(scene, rng))
        return _images(drawings), captions


class DrawingPairs(Preferences):
    """Endless stream of pairs: a correct drawing of a caption, and an incorrect one with the same layout.

    The incorrect one has swapped colours, or the typical errors of few-step models: melted objects, objects between two
    shapes or of two colours. Pair `i` depends only on (seed, i).
    """

    def __init__(self, size: int) -> None:
        _expect(size)

    def batch(self, start: int, size: int, seed: int) -> PreferencePairs:
        winners, losers, captions = [], [], []
        for position in range(start, start + size):
            rng = np.random.default_rng([seed, position, 1])  # differs from the scenes of `Drawings`
            scene = sample_scene(rng)
            winners.append(draw(scene))
            losers.append(wrong(scene, rng))
            captions.append(caption(scene, rng))
        return PreferencePairs(_images(winners), _images(losers), captions)


def wrong(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Return a drawing, uint8 (SIZE, SIZE, 3), that does not show the scene.

    With probability .5 two objects have swapped colours, if there are two colours; otherwise some are corrupted.
    """
    first, *others = scene.things
    other = next((thing for thing in others if thing.color != first.color), None)
    if other is not None and rng.random() < 0.5:
        swapped = {first: replace(first, color=other.color), other: replace(other, color=first.color)}
        return draw(replace(scene, things=tuple(swapped.get(thing, thing) for thing in scene.things)))
    while True:
        image, truth, _ = corrupted(scene, rng)
        if truth.things != scene.things:
            return image


def _expect(size: int) -> None:
    if size != SIZE:
        raise ValueError(f"the drawings have {SIZE} pixels, the model {size}")


def _images(drawings: list[np.ndarray]) -> Tensor:
    """Stack drawings into images (N, 3, SIZE, SIZE) in [0, 1]."""
    return torch.from_numpy(np.stack(drawings)).permute(0, 3, 1, 2).float() / 255
