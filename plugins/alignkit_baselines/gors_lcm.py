"""GORS-LCM: generate, keep the best, distil on it. LaSRO's baseline for any reward, without a gradient of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from alignkit.distillation import Distillation, Noised
from alignkit.interfaces import Algorithm, Context, Sampler
from alignkit.records import Batch, Prompt, Rows
from alignkit.rollout import run_sampler


@dataclass(frozen=True)
class Chosen(Rows):
    """The best sample of each prompt at each step, N rows."""

    latents: Tensor
    """(N, *S) clean latents."""
    reward: Tensor
    """(N,) float32."""
    prompt: Prompt


@dataclass(frozen=True)
class Collected:
    """One round: the best samples, and captioned latents where they are wanted."""

    chosen: Chosen
    images: Tensor | None
    captions: Prompt | None


@dataclass(frozen=True)
class PolicyRows(Rows):
    """One policy update: chosen samples and captioned latents, noised, N rows of each."""

    chosen: Noised | None
    weight: Tensor
    """(N,) factor of each chosen sample."""
    noised: Noised | None


@dataclass
class GorsLCM(Algorithm[Collected, PolicyRows]):
    """GORS-LCM (LaSRO, arXiv 2411.15247, appendix D; after GORS of T2I-CompBench, arXiv 2307.06350).

    For each prompt, the best of a few samples at every step of the sampler takes the place of a real image in the
    distillation loss, beside the same loss on captioned images.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"teacher"})

    samples: int = 6
    """N_s, samples a prompt, of which the best is kept. With 1 the model distils what it draws anyway."""
    dataset_weight: float = 1.0
    """Weight of the distillation on captioned images; 0 needs none."""
    threshold: float | None = None
    """Samples with a reward below this are not kept, as GORS does; left out: the best is kept whatever its reward."""
    weight: Literal["none", "reward"] = "none"
    """Whether a sample's loss is multiplied with its reward, as GORS does; a reward below 0 counts as 0."""
    ode_steps: int = 50
    """Solver steps; must be what the student's sampler counts as original steps."""
    guidance_scale_min: float = 6.0
    """Smallest guidance scale of the teacher (w + 1 of the LCM paper)."""
    guidance_scale_max: float = 16.0
    """Largest guidance scale of the teacher."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples: found {self.samples}, expected 1 or more")
        if self.dataset_weight < 0:
            raise ValueError(f"dataset_weight: found {self.dataset_weight}, expected 0 or more")
        if self.dataset_weight:
            self.needs = type(self).needs | {"images"}  # type: ignore[misc]
        self._distillation = Distillation(self.ode_steps, self.guidance_scale_min, self.guidance_scale_max)

    def check(self, sampler: Sampler) -> None:
        self._distillation.check(sampler)

    # generate and filter

    def collect(self, batch: Batch, ctx: Context) -> Collected:
        texts, each, num_steps = [e.text for e in batch.examples], self.samples, ctx.sampler.num_steps
        prompt = ctx.policy.encode([text for text in texts for _ in range(each)])
        noises = torch.stack([ctx.noise(len(prompt)) for _ in range(num_steps + 1)], dim=1)
        clean = run_sampler(ctx.policy, ctx.sampler, prompt, noises).clean
        repeated = [e for e in batch.examples for _ in range(each)]
        chosen = []
        for k in range(num_steps):
            scores = ctx.score(clean[:, k], repeated)
            rewards = scores.values.masked_fill(~scores.valid, -torch.inf).float()
            rows = best(rewards.view(-1, each), self.threshold)
            chosen.append((clean[rows, k], rewards[rows], rows))
            ctx.log(**{f"kept/step{k + 1}": len(rows) / len(texts)})
        latents, rewards, rows = (torch.cat(column) for column in zip(*chosen, strict=True))
        if len(rows):
            ctx.log(kept_reward=rewards.mean())
        images = captions = None
        if self.dataset_weight and batch.images is not None:
            images, captions = ctx.policy.encode_images(batch.images), ctx.policy.encode(batch.captions)
        return Collected(Chosen(latents, rewards, prompt.select(rows)), images, captions)

    # distil

    def updates(self, collected: Collected, ctx: Context) -> Iterator[PolicyRows]:
        """One update, of samples in random order and of images, all noised anew."""
        size, chosen = ctx.rows_per_update, collected.chosen
        noised = kept = None
        weight = torch.ones(size, device=chosen.reward.device)
        if len(chosen):
            chosen = chosen.shuffled(ctx.generator)
            chosen = chosen.select(torch.arange(size) % len(chosen))
            kept = self._distillation.draw(chosen.latents, chosen.prompt, ctx)
            weight = chosen.reward.clamp(min=0) if self.weight == "reward" else weight
        if collected.images is not None and collected.captions is not None:
            index = torch.arange(size) % len(collected.images)
            noised = self._distillation.draw(collected.images[index], collected.captions.select(index), ctx)
        if kept is None:
            ctx.warn("in some rounds no sample was kept: none could be scored, or all were below algorithm.threshold")
        yield PolicyRows(kept, weight, noised)

    def loss(self, rows: PolicyRows, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        assert ctx.teacher is not None  # needs "teacher"
        # Where nothing was kept it is still a loss: its gradient is zero.
        loss = rows.weight.new_zeros((), requires_grad=True)
        metrics: dict[str, Tensor] = {}
        if rows.chosen is not None:
            # The mean over rows of all steps, times K, is the sum over steps of the mean at each.
            kept = (
                ctx.sampler.num_steps
                * (rows.weight * self._distillation.loss(ctx.policy, ctx.teacher, rows.chosen)).mean()
            )
            loss, metrics["kept_loss"] = loss + kept, kept
        if rows.noised is not None:
            distillation = self._distillation.loss(ctx.policy, ctx.teacher, rows.noised).mean()
            loss, metrics["distillation_loss"] = loss + self.dataset_weight * distillation, distillation
        return loss, metrics


def best(rewards: Tensor, threshold: float | None = None) -> Tensor:
    """Where the best of each group of rewards (N, M) stands among all N * M; the first of equal ones.

    Groups whose best is below the threshold, or in which nothing could be scored (-inf), have none.
    """
    top, place = rewards.max(1)
    kept = top.isfinite() & (top >= (-torch.inf if threshold is None else threshold))
    return (place + torch.arange(len(rewards), device=rewards.device) * rewards.shape[1])[kept]
