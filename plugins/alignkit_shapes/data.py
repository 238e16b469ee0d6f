"""Endless captioned drawings, as `[data] images = "alignkit_shapes.data:Drawings"`, and pairs of drawings of which
one is right, as `[data] pairs = "alignkit_shapes.data:DrawingPairs"`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from alignkit.data.sources import Images, Preferences
from alignkit.records import PreferencePairs
from alignkit_shapes.build.questions import spoiled
from alignkit_shapes.scenes import SIZE, Scene, caption, draw, sample_scene


class Drawings(Images):
    """Image `i` of the stream of a seed is drawn from (seed, i) alone."""

    def __init__(self, size: int) -> None:
        _expect(size)

    def batch(self, start: int, size: int, seed: int) -> tuple[Tensor, list[str]]:
        drawn, captions = [], []
        for position in range(start, start + size):
            rng = np.random.default_rng([seed, position])
            scene = sample_scene(rng)
            drawn.append(draw(scene))
            captions.append(caption(scene, rng))
        return _images(drawn), captions


class DrawingPairs(Preferences):
    """A true drawing of each caption, and one of the same places that is wrong: colours exchanged, or things melted,
    half another shape or of two colours, as few-step models draw them. Pair `i` of a seed depends on (seed, i) alone.
    """

    def __init__(self, size: int) -> None:
        _expect(size)

    def batch(self, start: int, size: int, seed: int) -> PreferencePairs:
        winners, losers, captions = [], [], []
        for position in range(start, start + size):
            rng = np.random.default_rng([seed, position, 1])  # not those of `Drawings`
            scene = sample_scene(rng)
            winners.append(draw(scene))
            losers.append(wrong(scene, rng))
            captions.append(caption(scene, rng))
        return PreferencePairs(_images(winners), _images(losers), captions)


def wrong(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A drawing, uint8 (SIZE, SIZE, 3), that shows something else than the scene: at even chance things with each
    other's colours, where they have two, or some of them spoiled."""
    first, *others = scene.things
    other = next((thing for thing in others if thing.color != first.color), None)
    if other is not None and rng.random() < 0.5:
        exchanged = {first: replace(first, color=other.color), other: replace(other, color=first.color)}
        return draw(replace(scene, things=tuple(exchanged.get(thing, thing) for thing in scene.things)))
    while True:
        image, truth, _ = spoiled(scene, rng)
        if truth.things != scene.things:
            return image


def _expect(size: int) -> None:
    if size != SIZE:
        raise ValueError(f"the drawings have {SIZE} pixels, the model {size}")


def _images(drawn: list[np.ndarray]) -> Tensor:
    """(N, 3, SIZE, SIZE) in [0, 1]."""
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 255
