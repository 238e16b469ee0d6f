"""Latent consistency distillation as a method of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Lt
from torch import Tensor

from alignkit import Algorithm, Batch, Context, PolicyFacts, Sampler, check_ranges
from alignkit.distillation import Average, Distance, Distillation, Noised
from alignkit.rollout import encode_examples


@dataclass
class LCD(Algorithm[Noised, Noised]):
    """Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378), without any reward.

    It is also the control for methods that use the same loss as a regulariser.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"teacher", "images"})
    samples_images: ClassVar[bool] = False
    uses_rewards: ClassVar[bool] = False

    ode_steps: Annotated[int, Ge(1)] = 50
    """Solver steps; must be what the student's sampler counts as original steps."""
    guidance_scale_min: float = 6.0
    """Smallest guidance scale of the teacher (w + 1 of the LCM paper)."""
    guidance_scale_max: float = 16.0
    """Largest guidance scale of the teacher."""
    huber_c: Annotated[float, Gt(0)] = 1e-3
    """Difference at which the pseudo-Huber distance turns from quadratic to linear."""
    distance: Distance = "huber"
    """Distance between prediction and target: pseudo-Huber, as in the LCM paper, or l2, the square, the default of
    diffusers' script."""
    target_decay: Annotated[float, Ge(0), Lt(1)] = 0.0
    """mu, decay of the average of the student that gives the target; 0: the student itself, as for LCM-LoRA. 0.95 is
    the LCM paper's, for a student whose weights are all trained."""

    def __post_init__(self) -> None:
        check_ranges(self)
        self._distillation = Distillation(
            self.ode_steps, self.guidance_scale_min, self.guidance_scale_max, self.huber_c, self.distance
        )
        self._target = Average(self.target_decay)

    def check(self, sampler: Sampler, facts: PolicyFacts) -> None:
        self._distillation.check(sampler, facts)

    def setup(self, ctx: Context) -> None:
        self._target.start(ctx.policy)

    def collect(self, batch: Batch, ctx: Context) -> Noised:
        assert batch.images is not None  # needs "images"
        latents = ctx.policy.encode_images(batch.images)
        return self._distillation.sample(latents, encode_examples(ctx.policy, batch.captions), ctx)

    def updates(self, collected: Noised, ctx: Context) -> Iterator[Noised]:
        yield from collected.split(ctx.rows_per_update)

    def loss(self, rows: Noised, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        assert ctx.teacher is not None  # needs "teacher"
        value = self._distillation.loss(ctx.policy, ctx.teacher, rows, self._target.weights).mean()
        return value, {"distillation_loss": value}

    def after_update(self, ctx: Context) -> None:
        self._target.follow(ctx.policy)

    def state_dict(self) -> dict[str, Any]:
        return self._target.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._target.load_state_dict(state)
