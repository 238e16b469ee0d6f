"""Latent consistency distillation as a method of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from alignkit.interfaces import Algorithm, Batch, Context, Sampler
from alignkit_lcd.distillation import Distance, Distillation, Noised


@dataclass
class LCD(Algorithm[Noised, Noised]):
    """Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378), without any reward.

    Also the control run for methods that use the same loss as a regulariser. As in LCM-LoRA, the target is the student
    itself without gradient.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"teacher", "pictures"})
    draws: ClassVar[bool] = False

    ode_steps: int = 50
    """Solver steps; must be what the student's sampler counts as original steps."""
    w_min: float = 5.0
    """Smallest guidance of the teacher, on the scale where 0 is the conditional prediction."""
    w_max: float = 15.0
    """Largest guidance of the teacher."""
    huber_c: float = 1e-3
    """Where the pseudo-Huber distance turns from quadratic to linear."""
    distance: Distance = "huber"
    """Between prediction and target: pseudo-Huber, as in the LCM paper, or l2, the square, the default of diffusers'
    script."""

    def __post_init__(self) -> None:
        self._distillation = Distillation(self.ode_steps, self.w_min, self.w_max, self.huber_c, self.distance)

    def check(self, sampler: Sampler) -> None:
        self._distillation.check(sampler)

    def collect(self, batch: Batch, ctx: Context) -> Noised:
        assert batch.pictures is not None  # needs "pictures"
        latents = ctx.policy.encode_images(batch.pictures)
        return self._distillation.draw(latents, ctx.policy.encode(batch.captions), ctx)

    def updates(self, collected: Noised, ctx: Context) -> Iterator[Noised]:
        yield from collected.split(ctx.rows_per_update)

    def loss(self, rows: Noised, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        assert ctx.teacher is not None  # needs "teacher"
        value = self._distillation.loss(ctx.policy, ctx.teacher, rows).mean()
        return value, {"distillation_loss": value}
