"""A broken promise is found, and reported in one line; one test a promise: rewards."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.records import Example, Scores
from alignkit.testing import (
    check_reward,
)
from alignkit.testing.world import Brightness


def brightness(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


class LooksAtItsNeighbours(Brightness):
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        return brightness(images) - brightness(images).mean().detach()


class RanksItsNeighbours(Brightness):
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Scores:  # type: ignore[override]
        values = brightness(images)
        return Scores(values, torch.ones(len(values), dtype=torch.bool), {"rank": values.argsort().argsort().float()})


class LeavesItsBoundsOnWhite(Brightness):
    bounds = (0.0, 0.99)


class Restless(Brightness):
    calls = 0

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        self.calls += 1
        return brightness(images) + self.calls


class DrawsGlobally(Brightness):
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        torch.rand(1)
        return brightness(images)


class DrawsWithNumPy(Brightness):
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        np.random.rand()
        return brightness(images)


class DrawsWithPython(Brightness):
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        random.random()
        return brightness(images)


class Prints(Brightness):
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        print("scoring")
        return brightness(images)


class ChangesPrompts(Brightness):
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        for example in examples:
            example.metadata["seen"] = True  # type: ignore[index]
        return brightness(images)


class InvertsWhatItIsGiven(Brightness):
    differentiable = False

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        value = brightness(images).detach()
        images.detach().mul_(-1).add_(1)
        return value


class SortsPrompts(Brightness):
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        examples.sort(key=lambda example: example.text)  # type: ignore[attr-defined]
        return brightness(images)


class SaysItHasAGradient(Brightness):
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        return brightness(images).detach()


class HidesItsGradient(Brightness):
    differentiable = False


class HasTheWrongGradient(Brightness):
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        value = brightness(images)
        return value.detach() + 2 * (value - value.detach())


class LeadsOverToOthers(Brightness):
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        value = brightness(images)
        return value + value.sum() - value.sum().detach()


class OutOfBounds(Brightness):
    bounds = (0.9, 1.0)


class FailsOnTheEmptyPrompt(Brightness):
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        return brightness(images) / torch.tensor([float(bool(example.text)) for example in examples])


class WantsSquares(Brightness):
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        if images.shape[2] != images.shape[3]:
            raise ValueError("not square")
        return brightness(images)


class ForgetsWhatItIs(Restless):
    deterministic = False

    def fingerprint(self) -> str:
        return f"call {self.calls}"


class OneTooMany(Brightness):
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        return torch.ones(len(images) + 1)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (LooksAtItsNeighbours, "image 0 alone and in a batch of 4: found a difference of"),
        (RanksItsNeighbours, "the part 'rank' of image [0-9] alone and in a batch of 4: found a difference"),
        (LeavesItsBoundsOnWhite, r"found a score of 1, expected it within bounds = \(0.0, 0.99\)"),
        (Restless, "the same call twice: found other scores, expected the same, or deterministic = False"),
        (ForgetsWhatItIs, r"fingerprint\(\): found 'call 2' after two calls, 'call 0' before"),
        (DrawsGlobally, "while scoring the global random generator of torch was used"),
        (DrawsWithNumPy, "the global random generator of NumPy was used"),
        (DrawsWithPython, "the global random generator of Python was used"),
        (Prints, "while scoring it printed 'scoring"),
        (InvertsWhatItIsGiven, "the images passed in were changed, expected them unchanged"),
        (ChangesPrompts, "the examples passed in were changed"),
        (SortsPrompts, "the examples passed in were changed"),
        (SaysItHasAGradient, "differentiable = True, but the scores lack a gradient to the pixels"),
        (HidesItsGradient, "differentiable = False, but the scores have a gradient to the pixels; detach them"),
        (HasTheWrongGradient, "the gradient against finite differences: found a difference of"),
        (LeadsOverToOthers, "the score of one image has a gradient to another"),
        (OutOfBounds, r"expected it within bounds = \(0.9, 1.0\)"),
        (FailsOnTheEmptyPrompt, "returned (inf|nan) for image 0, '', expected a finite number"),
        (WantsSquares, "images of 48 x 80 pixels .* failed while scoring image 0, 'a red circle': ValueError"),
        (OneTooMany, r"returned values of shape \(5,\), expected shape \(4,\)"),
    ],
)
def test_a_reward(reward: type[Brightness], message: str) -> None:
    with pytest.raises(AssertionError, match=rf"^reward {reward.__name__}: .*{message}") as caught:
        check_reward(reward())
    assert "\n" not in str(caught.value)


def test_a_reward_may_refuse_odd_prompts_and_sizes_mark_images_and_be_random() -> None:
    class Careful(Brightness):
        deterministic = False
        differentiable = False

        def check(self, examples: Any) -> None:
            if not all(example.text.startswith("a") for example in examples):
                raise ConfigError("careful: expected prompts that begin with a")

        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Scores:
            if images.shape[2] != images.shape[3]:
                raise ConfigError("careful: expected square images")
            valid = torch.arange(len(images)) > 0
            return Scores(torch.full((len(images),), random.Random().random()), valid)

    check_reward(Careful())
