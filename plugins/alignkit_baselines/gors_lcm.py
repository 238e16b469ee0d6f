"""GORS-LCM: generate, keep the best, distil on it. LaSRO's baseline for any reward, without a gradient of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from alignkit import Algorithm, Batch, Context, PolicyFacts, Prompt, Rows, Sampler, check_ranges
from alignkit.distillation import Distillation, Noised
from alignkit.rollout import sample_trajectories


@dataclass(frozen=True)
class Chosen(Rows):
    """The best sample of each prompt at each step, N rows."""

    latents: Tensor
    """(N, *S) clean latents."""
    reward: Tensor
    """(N,) float32."""
    prompt: Prompt


@dataclass(frozen=True)
class WeightedRows(Rows):
    """One policy update: chosen samples, noised, N rows."""

    noised: Noised | None
    """None where no sample of the round was kept."""
    weight: Tensor
    """(N,) factor of each sample's loss."""


@dataclass
class GorsLCM(Algorithm[Chosen, WeightedRows]):
    """GORS-LCM (LaSRO, arXiv 2411.15247, appendix D; after GORS of T2I-CompBench, arXiv 2307.06350).

    For each prompt, the best of a few samples at every step of the sampler takes the place of a real image in the
    distillation loss. The same loss on captioned images is the regulariser `lcd`, which it has by default.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"teacher"})
    default_regularisers: ClassVar[Mapping[str, float]] = {"lcd": 1.0}

    samples: Annotated[int, Ge(1)] = 6
    """N_s, samples of each prompt, of which the best is kept. With 1 the model distils its own samples."""
    threshold: float | None = None
    """Drop samples with a reward below this, as GORS does; left out: the best is kept whatever its reward."""
    weight: Literal["none", "reward"] = "none"
    """Multiply a sample's loss by its reward, as GORS does; a reward below 0 counts as 0."""
    ode_steps: Annotated[int, Ge(1)] = 50
    """Solver steps; must equal what the student's sampler counts as original steps."""
    guidance_scale_min: float = 6.0
    """Smallest guidance scale of the teacher (w + 1 of the LCM paper)."""
    guidance_scale_max: float = 16.0
    """Largest guidance scale of the teacher."""

    def __post_init__(self) -> None:
        check_ranges(self)
        self._distillation = Distillation(self.ode_steps, self.guidance_scale_min, self.guidance_scale_max)

    def check(self, sampler: Sampler, facts: PolicyFacts) -> None:
        self._distillation.check(sampler, facts)

    def collect(self, batch: Batch, ctx: Context) -> Chosen:
        """Sample, score the prediction of every step, and keep each prompt's best."""
        trajectories = sample_trajectories(batch.examples, ctx, self.samples)
        prompt, chosen = trajectories.prompt, []
        for k, clean in enumerate(trajectories.clean.unbind(1)):
            scores = ctx.score(clean, prompt.examples)
            rewards = scores.values.masked_fill(~scores.valid, -torch.inf).float()
            rows = best(rewards.view(-1, self.samples), self.threshold)
            chosen.append((clean[rows], rewards[rows], rows))
            ctx.log(**{f"kept/step{k + 1}": len(rows) / len(batch.examples)})
        latents, rewards, rows = (torch.cat(column) for column in zip(*chosen, strict=True))
        if len(rows):
            ctx.log(kept_reward=rewards.mean())
        return Chosen(latents, rewards, prompt.select(rows))

    def updates(self, collected: Chosen, ctx: Context) -> Iterator[WeightedRows]:
        """Yield one update of chosen samples in random order, noised anew; without any, one for regularisers alone."""
        if not len(collected):
            ctx.warn("in some rounds no sample was kept: none could be scored, or all were below algorithm.threshold")
            yield WeightedRows(None, torch.zeros(ctx.rows_per_update, device=collected.reward.device))
            return
        chosen = collected.shuffled(ctx.generator)
        chosen = chosen.select(torch.arange(ctx.rows_per_update) % len(chosen))
        weight = chosen.reward.clamp(min=0) if self.weight == "reward" else torch.ones_like(chosen.reward)
        yield WeightedRows(self._distillation.sample(chosen.latents, chosen.prompt, ctx), weight)

    def loss(self, rows: WeightedRows, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        assert ctx.teacher is not None  # needs "teacher"
        if rows.noised is None:
            return rows.weight.new_zeros((), requires_grad=True), {}
        # The mean over rows of all steps, times K, is the sum over steps of the mean at each.
        each = self._distillation.loss(ctx.policy, ctx.teacher, rows.noised)
        loss = ctx.sampler.num_steps * (rows.weight * each).mean()
        return loss, {"kept_loss": loss}


def best(rewards: Tensor, threshold: float | None = None) -> Tensor:
    """Return the place among all N * M of the best of each group of rewards (N, M); the first of equal ones.

    Groups whose best is below the threshold, or in which nothing could be scored (-inf), have none.
    """
    top, place = rewards.max(1)
    kept = top.isfinite() & (top >= (-torch.inf if threshold is None else threshold))
    return (place + torch.arange(len(rewards), device=rewards.device) * rewards.shape[1])[kept]
