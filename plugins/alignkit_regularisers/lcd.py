"""The regulariser `lcd`: stay a latent consistency model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from alignkit import Batch, Context, PolicyFacts, Prediction, Prompt, Regulariser, Rows, Sampler, check_ranges
from alignkit.distillation import Distance, Distillation, Noised
from alignkit.rollout import encode_examples


@dataclass(frozen=True)
class Captioned(Rows):
    """Latents of images with their captions, N rows."""

    latents: Tensor
    """(N, *S)."""
    prompt: Prompt


@dataclass
class LatentConsistency(Regulariser[Captioned, Noised]):
    """Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378) on captioned images.

    This is the distillation term of LaSRO (Eq. 11) and of its baselines: it keeps the policy a latent consistency model
    while a reward moves it. Every update has one captioned image for each row, noised anew.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"teacher", "images"})

    ode_steps: Annotated[int, Ge(1)] = 50
    """Solver steps; must be what the model was distilled with."""
    guidance_scale_min: float = 6.0
    """Smallest guidance scale of the teacher (w + 1 of the LCM paper)."""
    guidance_scale_max: float = 16.0
    """Largest guidance scale of the teacher."""
    huber_c: Annotated[float, Gt(0)] = 1e-3
    """Difference at which the pseudo-Huber distance turns from quadratic to linear."""
    distance: Distance = "huber"
    """Distance between prediction and target: pseudo-Huber, as in the LCM paper, or l2, the square, the default of
    diffusers' script."""

    def __post_init__(self) -> None:
        check_ranges(self)
        self._distillation = Distillation(
            self.ode_steps, self.guidance_scale_min, self.guidance_scale_max, self.huber_c, self.distance
        )

    def check(self, sampler: Sampler, facts: PolicyFacts) -> None:
        self._distillation.check(sampler, facts, "regulariser.lcd")

    def collect(self, batch: Batch, ctx: Context) -> Captioned:
        assert batch.images is not None  # needs "images"
        return Captioned(ctx.policy.encode_images(batch.images), encode_examples(ctx.policy, batch.captions))

    def rows(self, collected: Captioned | None, count: int, ctx: Context) -> Noised:
        assert collected is not None  # `collect` returns it
        chosen = collected.select(torch.arange(count) % len(collected))
        return self._distillation.sample(chosen.latents, chosen.prompt, ctx)

    def loss(
        self, rows: Noised | None, predictions: Sequence[Prediction], ctx: Context
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert rows is not None and ctx.teacher is not None  # `rows` returns them; needs "teacher"
        value = self._distillation.loss(ctx.policy, ctx.teacher, rows).mean()
        return value, {"distillation_loss": value}
