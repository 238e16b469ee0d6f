"""DDPO: clipped policy gradient over the stochastic steps of a sampler; RLCM is the same on consistency models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from alignkit import diffusion
from alignkit.advantage import PromptTracker, of_terms, over_batch
from alignkit.distillation import Distillation, Noised
from alignkit.errors import ConfigError, PluginError
from alignkit.interfaces import Algorithm, Context, Sampler
from alignkit.records import Batch, Prompt, Rows, Transition
from alignkit.rollout import Rollout, run_sampler


@dataclass(frozen=True)
class Steps(Rows):
    """Stochastic steps of scored walks, N rows."""

    x: Tensor
    """(N, *S) the latent before the step."""
    x_next: Tensor
    """(N, *S) the latent that was drawn."""
    k: Tensor
    """(N,) which step of the sampler."""
    prompt: Prompt
    advantage: Tensor
    """(N,) of the image at the end of the walk, the same for all its steps."""
    old_log_prob: Tensor | None = None
    """(N,) of `x_next` under the policy that drew it."""
    noised: Noised | None = None
    """N captioned latents to stay consistent on, where the distillation term is switched on."""


@dataclass(frozen=True)
class Collected:
    """One round: the steps to learn from, and captioned latents."""

    steps: Steps
    images: Tensor | None = None
    captions: Prompt | None = None


@dataclass
class DDPO(Algorithm[Collected, Steps]):
    """DDPO with importance sampling (Black et al. 2023, arXiv 2305.13301).

    A walk of the sampler is a sequence of actions, each a draw from a normal distribution; what its image is worth
    beside others weighs the ratio of likelihoods of every action, clipped as in PPO. With the `lcm` sampler this is
    RLCM (Oertell et al. 2024, arXiv 2404.03673). A step without chance has no likelihood and is left out.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"stochastic_steps"})
    takes_advantages: ClassVar[bool] = True

    samples: int = 4
    """Walks of each prompt in a round."""
    baseline: Literal["prompt", "batch"] = "prompt"
    """What a reward is measured by: the last rewards of the same prompt (RLCM), or those of the round."""
    buffer_size: int = 32
    """Rewards of a prompt that are kept, as in RLCM."""
    min_count: int = 16
    """Rewards a prompt must have got before it is measured by its own; until then it is by those of the round."""
    advantage_clip: float = 5.0
    """Advantages are clamped to this size; RLCM takes 10."""
    clip_range: float = 1e-4
    """How far the ratio of likelihoods may leave 1. It belongs to `reduction` and to the size of the latents."""
    reduction: Literal["mean", "sum"] = "mean"
    """The log-probability over latent dimensions. The papers write the sum, their code takes the mean."""
    inner_epochs: int = 1
    """Times that a round is learned from."""
    step_fraction: float = 1.0
    """The share of stochastic steps that is learned from, drawn anew for each walk."""
    final_step: Literal["drop", "renoise"] = "drop"
    """A deterministic last step: left out, or noised again to its own level as one more action (RLCM's code), which no
    image depends on."""
    distillation_weight: float = 0.0
    """Weight of latent consistency distillation beside the policy gradient (LaSRO's baselines have it); needs a teacher
    and images. 0 leaves it out."""
    ode_steps: int = 50
    """Solver steps of the distillation term; must be what the model was distilled with."""
    guidance_scale_min: float = 6.0
    """Smallest guidance scale of the teacher in the distillation term."""
    guidance_scale_max: float = 16.0
    """Largest guidance scale of the teacher in the distillation term."""

    def __post_init__(self) -> None:
        for name in ("samples", "inner_epochs", "min_count"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("advantage_clip", "clip_range"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected more than 0")
        if not 0 < self.step_fraction <= 1:
            raise ValueError(f"step_fraction is {self.step_fraction}, expected more than 0 and at most 1")
        if self.buffer_size < self.min_count:
            raise ValueError(
                f"buffer_size is {self.buffer_size}, expected at least min_count = {self.min_count}: "
                "a prompt would never be measured by its own rewards"
            )
        if self.distillation_weight:
            self.needs = type(self).needs | {"teacher", "images"}  # type: ignore[misc]
        self._distillation = Distillation(self.ode_steps, self.guidance_scale_min, self.guidance_scale_max)
        self._tracker = PromptTracker(self.buffer_size, self.min_count)

    def check(self, sampler: Sampler) -> None:
        if self.distillation_weight:
            self._distillation.check(sampler)
        if self.final_step == "renoise" and sampler.stochastic_steps() != sampler.num_steps - 1:
            raise ConfigError(
                f'algorithm.final_step: found "renoise" for a sampler with {sampler.stochastic_steps()} stochastic '
                f"of {sampler.num_steps} steps, expected one whose last step alone is deterministic, as lcm's is; "
                'set it to "drop"'
            )

    # collect: walk, score, compare

    def collect(self, batch: Batch, ctx: Context) -> Collected:
        examples = [e for e in batch.examples for _ in range(self.samples)]
        texts, count = [e.text for e in examples], len(examples)
        prompt = ctx.policy.encode(texts)
        noises = torch.stack([ctx.noise(count) for _ in range(ctx.sampler.num_steps + 1)], dim=1)
        rollout = run_sampler(ctx.policy, ctx.sampler, prompt, noises)
        scores = ctx.score(rollout.next_states[:, -1], examples)

        def measured(rewards: Tensor, name: str) -> Tensor:
            if self.baseline == "prompt":
                return self._tracker.advantages(texts, rewards, ctx, name)
            return over_batch(rewards, ctx)

        advantage = of_terms(scores, ctx, measured)

        x_next, stochastic = self._actions(rollout, ctx)
        kept = max(1, int(len(stochastic) * self.step_fraction))
        order = torch.rand(count, len(stochastic), generator=ctx.generator).argsort(1)[:, :kept]
        row = torch.arange(count, device=x_next.device).repeat_interleave(kept)
        k = stochastic[order.flatten().to(stochastic.device)]
        steps = Steps(rollout.states[row, k], x_next[row, k], k, prompt.select(row), advantage[row])
        steps = steps.select(scores.valid[row].nonzero()[:, 0])
        if not self.distillation_weight or batch.images is None:
            return Collected(steps)
        return Collected(steps, ctx.policy.encode_images(batch.images), ctx.policy.encode(batch.captions))

    def _actions(self, rollout: Rollout, ctx: Context) -> tuple[Tensor, Tensor]:
        """What was drawn at every step (N, K, *S), and which steps have a likelihood (M,)."""
        x_next, stochastic = rollout.next_states, rollout.std[0] > 0
        if not bool(stochastic.any()):
            raise PluginError(f"sampler {type(ctx.sampler).__name__}: stochastic_steps is wrong; every step had std 0")
        if self.final_step == "renoise":
            last = torch.full((len(x_next),), ctx.sampler.num_steps - 1, device=x_next.device)
            again = diffusion.add_noise(rollout.clean[:, -1], ctx.noise(len(x_next)), *self._level(last, ctx))
            x_next = torch.cat([x_next[:, :-1], again[:, None]], dim=1)
            stochastic = torch.ones_like(stochastic)
        return x_next, stochastic.nonzero()[:, 0]

    def _level(self, k: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """alpha and sigma of the latent before step k (N,)."""
        return ctx.policy.schedule(ctx.sampler.grid(ctx.policy).to(k.device)[k])

    # the updates

    def updates(self, collected: Collected, ctx: Context) -> Iterator[Steps]:
        """Inner epochs over the steps in random order, in parts of nearly `ctx.rows_per_update`."""
        steps, size = collected.steps.shuffled(ctx.generator), ctx.rows_per_update
        if not len(steps):
            return
        # Asked for again instead of kept from the walk: at the first update the ratio is then 1 exactly.
        with torch.no_grad():
            old = torch.cat([self.log_prob(part, ctx) for part in steps.even_split(size)])
        steps = replace(steps, old_log_prob=old)
        for epoch in range(self.inner_epochs):
            for part in (steps.shuffled(ctx.generator) if epoch else steps).even_split(size):
                yield self._with_images(part, collected, ctx)

    def _with_images(self, part: Steps, collected: Collected, ctx: Context) -> Steps:
        """As many captioned latents as there are steps, noised anew, where the distillation term is switched on."""
        if collected.images is None or collected.captions is None:
            return part
        index = torch.arange(len(part)) % len(collected.images)
        latents = collected.images[index.to(collected.images.device)]
        return replace(part, noised=self._distillation.draw(latents, collected.captions.select(index), ctx))

    def transition(self, steps: Steps, ctx: Context) -> Transition:
        """The distribution of the next latents under the policy as it is."""
        step = ctx.sampler.transition(ctx.policy, steps.x, steps.k, steps.prompt)
        if self.final_step == "drop":
            return step
        alpha, sigma = self._level(steps.k, ctx)
        last = step.std == 0
        again = diffusion.columns(alpha, step.clean) * step.clean
        mean = torch.where(diffusion.columns(last, again), again, step.mean)
        return Transition(mean, torch.where(last, sigma, step.std), step.clean)

    def log_prob(self, steps: Steps, ctx: Context) -> Tensor:
        """(N,) of the latents that were drawn, under the policy as it is."""
        return self.transition(steps, ctx).log_prob(steps.x_next, self.reduction)

    def loss(self, rows: Steps, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        assert rows.old_log_prob is not None
        log_ratio = self.log_prob(rows, ctx) - rows.old_log_prob
        advantage = rows.advantage.clamp(-self.advantage_clip, self.advantage_clip)
        loss = clipped(log_ratio, advantage, self.clip_range).mean()
        metrics = {
            "policy_loss": loss,
            "clip_fraction": ((log_ratio.exp() - 1).abs() > self.clip_range).float().mean(),
            "log_ratio": log_ratio.mean(),
            "log_ratio_size": log_ratio.abs().mean(),
        }
        if rows.noised is not None:
            assert ctx.teacher is not None  # needs "teacher"
            distillation = self._distillation.loss(ctx.policy, ctx.teacher, rows.noised).mean()
            metrics["distillation_loss"] = distillation
            loss = loss + self.distillation_weight * distillation
        return loss, metrics

    # what a resumed run needs

    def state_dict(self) -> dict[str, Any]:
        return self._tracker.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._tracker.load_state_dict(state)


def clipped(log_ratio: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """max(-A r, -A clamp(r, 1 - eps, 1 + eps)) of each row, (N,): PPO's pessimistic objective as a loss."""
    ratio = log_ratio.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))
