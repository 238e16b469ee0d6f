"""A broken promise is found, and reported in one line; one test a promise: sources of images and pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from torch import Tensor

from alignkit.records import Example, PreferencePairs
from alignkit.testing import (
    check_images,
    check_pairs,
)
from alignkit.testing.world import TinyImages, TinyPairs

Batch = tuple[Tensor, Sequence[str | Example]]


class CountsCalls(TinyImages):
    calls = 0

    def batch(self, start: int, size: int, seed: int) -> Batch:
        self.calls += 1
        return super().batch(start, size, seed + self.calls)


class DrawsImagesGlobally(TinyImages):
    def batch(self, start: int, size: int, seed: int) -> Batch:
        np.random.rand()
        return super().batch(start, size, seed)


class LooksAtTheBatch(TinyImages):
    def batch(self, start: int, size: int, seed: int) -> Batch:
        images, captions = super().batch(start, size, seed)
        return images / images.max(), captions


class Levels(TinyImages):
    def batch(self, start: int, size: int, seed: int) -> Batch:
        images, captions = super().batch(start, size, seed)
        return images * 255, captions


class ForgetsACaption(TinyImages):
    def batch(self, start: int, size: int, seed: int) -> Batch:
        images, captions = super().batch(start, size, seed)
        return images, captions[1:]


class NoCaption(TinyImages):
    def batch(self, start: int, size: int, seed: int) -> Batch:
        images, captions = super().batch(start, size, seed)
        return images, [*captions[1:], None]  # type: ignore[list-item]


class OneOrder(TinyImages):
    def batch(self, start: int, size: int, seed: int) -> Batch:
        return super().batch(start, size, 0)


class Ends(TinyImages):
    def batch(self, start: int, size: int, seed: int) -> Batch:
        return super().batch(range(100)[start], size, seed)


class HandsOutItsOwn(TinyImages):
    kept: dict[tuple[int, int, int], Batch]

    def __init__(self) -> None:
        self.kept = {}

    def batch(self, start: int, size: int, seed: int) -> Batch:
        return self.kept.setdefault((start, size, seed), super().batch(start, size, seed))


class Doubles(TinyImages):
    def batch(self, start: int, size: int, seed: int) -> Batch:
        images, captions = super().batch(start, size, seed)
        return images.double(), captions


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (CountsCalls, "the same positions a second time: found other items"),
        (DrawsImagesGlobally, "while reading the global random generator of NumPy was used"),
        (LooksAtTheBatch, r"(from the third position on|position \d alone): found other items"),
        (Levels, r"found images from .* to 2.., expected values in \[0, 1\]"),
        (ForgetsACaption, "found 5 captions at 6 positions, expected one each"),
        (NoCaption, "found None as a caption, expected a string or an Example"),
        (OneOrder, "seed 1 gives the items of seed 0 in the same order, expected another order"),
        (Ends, "raised IndexError"),
        (HandsOutItsOwn, "the same positions a second time"),
        (Doubles, r"found images torch.float64 of shape \(6, 3, 64, 64\), expected float32"),
    ],
)
def test_a_source_of_images(source: type[TinyImages], message: str) -> None:
    with pytest.raises(AssertionError, match=rf"^images {source.__name__}: {message}"):
        check_images(source(), 64)  # type: ignore[arg-type]


def test_a_source_of_images_of_another_size() -> None:
    with pytest.raises(AssertionError, match=r"found images of \(64, 64\) pixels, expected 32 x 32"):
        check_images(TinyImages(), 32)  # type: ignore[arg-type]


class Signs(TinyImages):
    """One text for all images; what differs is their metadata."""

    def batch(self, start: int, size: int, seed: int) -> Batch:
        images, captions = super().batch(start, size, seed)
        return images, [Example("a sign", {"target": f"{seed} {caption}"}) for caption in captions]


class ForgetsItsMetadata(Signs):
    calls = 0

    def batch(self, start: int, size: int, seed: int) -> Batch:
        self.calls += 1
        images, captions = super().batch(start, size, seed)
        return images, captions if self.calls == 1 else ["a sign"] * len(captions)


def test_a_caption_may_be_an_example_whose_metadata_belongs_to_its_position() -> None:
    check_images(Signs(), 64)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="the same positions a second time: found other items"):
        check_images(ForgetsItsMetadata(), 64)  # type: ignore[arg-type]


class PrefersNothing(TinyPairs):
    def batch(self, start: int, size: int, seed: int) -> PreferencePairs:
        pairs = super().batch(start, size, seed)
        return replace(pairs, losers=pairs.winners.clone())


class UnequalPairs(TinyPairs):
    def batch(self, start: int, size: int, seed: int) -> PreferencePairs:
        pairs = super().batch(start, size, seed)
        return replace(pairs, losers=pairs.losers[..., :32])


class CaptionsAsExamples(TinyPairs):
    def batch(self, start: int, size: int, seed: int) -> PreferencePairs:
        pairs = super().batch(start, size, seed)
        return replace(pairs, captions=[Example(caption) for caption in pairs.captions])  # type: ignore[misc]


class NotesAsText(TinyPairs):
    notes = "two were left out"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (PrefersNothing, "at position 0 winner and loser are the same image"),
        (UnequalPairs, r"found winners \(6, 3, 64, 64\) and losers \(6, 3, 64, 32\), expected equal shapes"),
        (CaptionsAsExamples, r"found Example\(.*\) as a caption, expected a string$"),
        (NotesAsText, "notes: found 'two were left out', expected a list of lines"),
    ],
)
def test_a_source_of_pairs(source: type[TinyPairs], message: str) -> None:
    with pytest.raises(AssertionError, match=rf"^pairs {source.__name__}: {message}"):
        check_pairs(source())  # type: ignore[arg-type]
