"""A promise of a regulariser that is broken is found, and reported in one line; one test a promise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from alignkit.interfaces import Context, Regulariser
from alignkit.records import Batch, Prediction, Rows
from alignkit.testing import check_regulariser
from alignkit_samplers.ddim import DDIM


@dataclass(frozen=True)
class Noises(Rows):
    values: Tensor


@dataclass
class Small(Regulariser[None, Noises]):
    """Keep predictions small; every promise is kept."""

    needs: ClassVar[frozenset[str]] = frozenset({"predictions"})

    def rows(self, collected: None, count: int, ctx: Context) -> Noises | None:
        return Noises(ctx.noise(count))

    def loss(
        self, rows: Noises | None, predictions: Sequence[Prediction], ctx: Context
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert rows is not None
        value = (torch.cat([p.clean for p in predictions]) - rows.values).square().mean()
        return value, {"small_loss": value}


@dataclass
class SumsTerms(Small):
    def loss(
        self, rows: Noises | None, predictions: Sequence[Prediction], ctx: Context
    ) -> tuple[Tensor, dict[str, Tensor]]:
        value, metrics = super().loss(rows, predictions, ctx)
        return value * sum(map(len, predictions)), metrics


@dataclass
class SamplesInTheLoss(Small):
    def loss(
        self, rows: Noises | None, predictions: Sequence[Prediction], ctx: Context
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return super().loss(self.rows(None, sum(map(len, predictions)), ctx), predictions, ctx)


@dataclass
class SamplesGlobally(Small):
    def rows(self, collected: None, count: int, ctx: Context) -> Noises | None:
        return Noises(torch.randn(count, *ctx.policy.latent_shape))


@dataclass
class OneRow(Small):
    def rows(self, collected: None, count: int, ctx: Context) -> Noises | None:
        return Noises(ctx.noise(1))


@dataclass
class NoGradient(Small):
    def loss(
        self, rows: Noises | None, predictions: Sequence[Prediction], ctx: Context
    ) -> tuple[Tensor, dict[str, Tensor]]:
        value, metrics = super().loss(rows, predictions, ctx)
        return value.detach(), metrics


@dataclass
class WantsAReward(Small):
    needs = frozenset({"reward"})


@dataclass
class ForgetsItsPace(Small):
    pace: float = 1.0

    def after_update(self, ctx: Context) -> None:
        self.pace *= 2

    def loss(
        self, rows: Noises | None, predictions: Sequence[Prediction], ctx: Context
    ) -> tuple[Tensor, dict[str, Tensor]]:
        value, metrics = super().loss(rows, predictions, ctx)
        return self.pace * value, metrics


@dataclass
class DarkensImages(Small):
    needs: ClassVar[frozenset[str]] = frozenset({"predictions", "images"})

    def collect(self, batch: Batch, ctx: Context) -> None:
        assert batch.images is not None
        batch.images.mul_(0.5)


def test_a_regulariser_that_keeps_its_promises_passes() -> None:
    check_regulariser(Small())
    check_regulariser(Small(), DDIM(num_steps=2), form="teacher")


@pytest.mark.parametrize(
    ("regulariser", "message"),
    [
        (SumsTerms, "loss: found .* in one pass and .* in several, expected a mean over rows"),
        (SamplesInTheLoss, "loss used ctx.generator; sample where the rows are made, into the rows"),
        (SamplesGlobally, "in rows the global random generator of torch was used"),
        (OneRow, "regulariser OneRow: rows returned 1 rows, expected 4 or None"),
        (NoGradient, "loss: found a gradient to the policy of size 0.0, expected one above 0"),
        (WantsAReward, r"needs: found \['reward'\], expected only images, predictions, teacher"),
        (ForgetsItsPace, r"a run that went on from its checkpoint had other metrics \("),
        (DarkensImages, "collect changed the batch that it was given, expected it unchanged"),
    ],
)
def test_a_regulariser(regulariser: type[Small], message: str) -> None:
    with pytest.raises(AssertionError, match=rf"^regulariser {regulariser.__name__} with .* on lcm: {message}"):
        check_regulariser(regulariser())
