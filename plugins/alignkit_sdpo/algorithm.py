"""SDPO: at every stochastic step, the difference of two walks' likelihoods follows the difference of their returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from alignkit.advantage import PromptTracker, of_terms, over_batch
from alignkit.errors import ConfigError, PluginError
from alignkit.interfaces import Algorithm, Context, Sampler
from alignkit.records import Batch, Example, Prompt, Rows
from alignkit.rollout import Rollout, run_sampler
from alignkit_sdpo.dense import by_interpolation, by_similarity, discounted_returns, queried_steps


@dataclass(frozen=True)
class PairedSteps(Rows):
    """The same stochastic step of two walks from one initial noise, N rows."""

    x: Tensor
    """(N, 2, *S) the latents before the step."""
    x_next: Tensor
    """(N, 2, *S) the latents that were drawn."""
    k: Tensor
    """(N,) which step of the sampler."""
    pair: Tensor
    """(N,) which pair of walks, ascending: the rows of a pair stand together, as many for each."""
    prompt: Prompt
    advantage: Tensor
    """(N, 2) of what follows from this step on; NaN where it could not be scored."""
    old_log_prob: Tensor | None = None
    """(N, 2) of `x_next` under the policy that drew it."""


@dataclass
class SDPO(Algorithm[PairedSteps, PairedSteps]):
    """SDPO, stepwise diffusion policy optimization (Zhang et al., arXiv 2411.11727).

    Two walks start from the same noise. Every step of both gets a reward of its own, read off the clean latent that is
    predicted there, from three queries a walk; the log-likelihood ratio of the one walk minus that of the other is
    drawn to the difference of their advantages, one step a pair in an update. A step without chance has no likelihood
    and is left out, so on the `lcm` sampler all but the last are trained.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"stochastic_steps"})
    takes_advantages: ClassVar[bool] = True

    pairs: int = 2
    """Pairs of walks for each prompt in a round. The paper draws 128 pairs a round for its 45 prompts."""
    queries: Literal["three", "two", "one", "all"] = "three"
    """Where a walk's reward is asked: first, anchor and last; first and last; last, copied to all; or at every step.
    "three" asks every step where there are at most four."""
    anchor: Literal["adaptive", "random", "fixed"] = "adaptive"
    """The third query: the step least like first and last (Eq. 10), any step between them, or the middle one."""
    between: Literal["similarity", "interpolation"] = "similarity"
    """The reward of a step without a query: the mean weighted by likeness of latents (Eq. 11), or on a straight line
    between its neighbours."""
    discount: float = 0.99
    """gamma of Eq. 13; 0 takes each step's own reward alone."""
    baseline: Literal["step_prompt", "prompt", "batch"] = "step_prompt"
    """What a return is measured by: the last of the same prompt and step, of the same prompt, or all of the round."""
    buffer_size: int = 32
    """Returns that are kept for each prompt and step."""
    min_count: int = 16
    """Returns a prompt must have got at a step before it is measured by its own; until then by the round's."""
    advantage_clip: float = 5.0
    """Advantages are clamped to this size."""
    decay: float = 0.99
    """lambda of Eq. 14: step i of a walk, from 0, weighs lambda^i / log_ratio_scale. Above 1 late steps weigh more."""
    log_ratio_scale: float = 1.0
    """eta of Eq. 14."""
    clip_range: float = 1e-4
    """epsilon of Eq. 15, how far a log-ratio may leave 0; it belongs to `reduction` and to the size of the latents.
    0 does not clip."""
    reduction: Literal["mean", "sum"] = "mean"
    """The log-probability over latent dimensions. The paper writes the sum, its code takes the mean."""
    order: Literal["shuffled", "in_order", "accumulated"] = "shuffled"
    """What an update holds: one step of each pair, drawn for each (Eq. 16); the same step of all pairs, first to last;
    or all steps of its pairs at once."""
    step_fraction: float = 1.0
    """The share of stochastic steps that is learned from, drawn anew for each pair."""
    inner_epochs: int = 1
    """Times that a round is learned from."""

    def __post_init__(self) -> None:
        for name in ("pairs", "min_count", "inner_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("advantage_clip", "decay", "log_ratio_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected more than 0")
        if not 0 <= self.discount <= 1:
            raise ValueError(f"discount is {self.discount}, expected 0 to 1")
        if self.clip_range < 0:
            raise ValueError(f"clip_range is {self.clip_range}, expected 0 or more")
        if not 0 < self.step_fraction <= 1:
            raise ValueError(f"step_fraction is {self.step_fraction}, expected more than 0 and at most 1")
        if self.buffer_size < self.min_count:
            raise ValueError(
                f"buffer_size is {self.buffer_size}, expected at least min_count = {self.min_count}: "
                "a prompt would never be measured by its own returns"
            )
        self._trackers: list[PromptTracker] = []

    def check(self, sampler: Sampler) -> None:
        # Both walks of a pair have the first noise, and so the first prediction, in common.
        if sampler.num_steps == 1:
            raise ConfigError(
                "sampler.num_steps: found 1, expected at least 2: the walks of a pair start from one noise and predict "
                "the same at the first step, so at one step sdpo finds no difference"
            )
        if not self.discount and sampler.stochastic_steps() == 1:
            raise ConfigError(
                "algorithm.discount: found 0, expected more: only the first step has chance in it, and the rewards of "
                "that step alone are the same for both walks of a pair"
            )

    def setup(self, ctx: Context) -> None:
        steps = ctx.sampler.num_steps
        if self.baseline == "step_prompt":
            self._trackers = [PromptTracker(self.buffer_size, self.min_count) for _ in range(steps)]
        elif self.baseline == "prompt":  # which sees the returns of all steps
            self._trackers = [PromptTracker(self.buffer_size * steps, self.min_count * steps)]

    # collect: walk in pairs, ask for few rewards, compare step by step

    def collect(self, batch: Batch, ctx: Context) -> PairedSteps:
        examples = [e for e in batch.examples for _ in range(2 * self.pairs)]
        texts, count, num_steps = [e.text for e in examples], len(examples), ctx.sampler.num_steps
        prompt = ctx.policy.encode(texts)
        start = ctx.noise(count // 2).repeat_interleave(2, dim=0)
        noises = torch.stack([start, *(ctx.noise(count) for _ in range(num_steps))], dim=1)
        rollout = run_sampler(ctx.policy, ctx.sampler, prompt, noises)
        advantage = self._scored(rollout.clean, examples, ctx)
        return self._paired(rollout, prompt, advantage, ctx)

    def _scored(self, clean: Tensor, examples: list[Example], ctx: Context) -> Tensor:
        """The advantages of all steps (N, K); NaN where one rests on an image that could not be scored."""
        texts = [e.text for e in examples]
        step = queried_steps(clean, self.queries, self.anchor, ctx.generator)
        each, num_steps = step.shape[1], clean.shape[1]
        row = torch.arange(len(step), device=step.device)[:, None]
        scores = ctx.score(clean[row, step].flatten(0, 1), [e for e in examples for _ in range(each)])
        found = scores.values.masked_fill(~scores.valid, torch.nan).view_as(step).to(clean.device)
        for k, rewards in ((1, found[:, 0]), (num_steps, found[:, -1]))[each == 1 :]:
            if not bool(rewards.isnan().all()):
                ctx.log(**{f"reward/step{k}": rewards.nanmean()})

        def measured(rewards: Tensor, name: str) -> Tensor:
            queried = rewards.view_as(step).to(clean.device)
            if self.between == "similarity":
                dense = by_similarity(clean, step, queried)
            else:
                dense = by_interpolation(num_steps, step, queried)
            return self._advantages(texts, discounted_returns(dense, self.discount), ctx, name)

        return of_terms(scores, ctx, measured)

    def _advantages(self, texts: list[str], returns: Tensor, ctx: Context, name: str) -> Tensor:
        """Returns (N, K) of one reward measured by others, over the walks of all processes."""
        if self.baseline == "batch":
            return over_batch(returns.flatten(), ctx).view_as(returns)
        if self.baseline == "prompt":
            each = [text for text in texts for _ in range(returns.shape[1])]
            return self._trackers[0].advantages(each, returns.flatten(), ctx, name).view_as(returns)
        columns = [t.advantages(texts, returns[:, k], ctx, name) for k, t in enumerate(self._trackers)]
        return torch.stack(columns, dim=1)

    def _paired(self, rollout: Rollout, prompt: Prompt, advantage: Tensor, ctx: Context) -> PairedSteps:
        """A row for every stochastic step of each pair, or for a share of them that is drawn."""
        device = rollout.states.device
        stochastic = (rollout.std[0] > 0).nonzero()[:, 0].cpu()
        if not len(stochastic):
            raise PluginError(f"sampler {type(ctx.sampler).__name__}: stochastic_steps is wrong; every step had std 0")
        count, kept = len(advantage) // 2, max(1, int(len(stochastic) * self.step_fraction))
        drawn = torch.rand(count, len(stochastic), generator=ctx.generator).argsort(1)[:, :kept].sort(1).values
        k = stochastic[drawn].flatten().to(device)
        pair = torch.arange(count, device=device).repeat_interleave(kept)

        def members(column: Tensor) -> Tensor:
            return column.view(count, 2, *column.shape[1:])[pair, :, k]

        return PairedSteps(
            x=members(rollout.states),
            x_next=members(rollout.next_states),
            k=k,
            pair=pair,
            prompt=prompt.select(2 * pair),
            advantage=members(advantage),
        )

    # the updates

    def updates(self, collected: PairedSteps, ctx: Context) -> Iterator[PairedSteps]:
        """Inner epochs over the round; a row is a pair, which the network sees as two."""
        plan = self._plan(collected, ctx)
        # Asked for again instead of kept from the walk: at the first update the log-ratios are then 0 exactly.
        old = torch.zeros_like(collected.advantage)
        with torch.no_grad():
            for index in plan:
                old[index.to(old.device)] = self.log_prob(collected.select(index), ctx)
        steps = replace(collected, old_log_prob=old)
        for epoch in range(self.inner_epochs):
            for index in self._plan(steps, ctx) if epoch else plan:
                yield steps.select(index)

    def _plan(self, steps: PairedSteps, ctx: Context) -> list[Tensor]:
        """The rows of each update: one step of every pair, then the next, in parts of nearly `ctx.rows_per_update`."""
        rows = torch.arange(len(steps)).view(int(steps.pair[-1]) + 1, -1)
        rows = rows[torch.randperm(len(rows), generator=ctx.generator)]
        if self.order == "shuffled":
            rows = rows.gather(1, torch.rand(rows.shape, generator=ctx.generator).argsort(1))
        size = -(-len(rows) // max(1, round(len(rows) / ctx.rows_per_update)))
        if self.order == "accumulated":
            parts = [part.flatten() for part in rows.split(size)]
        else:
            parts = [part for slot in rows.T for part in slot.split(size)]
        scored = steps.advantage.isfinite().all(1).cpu()
        return [part[scored[part]] for part in parts if bool(scored[part].any())]

    def log_prob(self, steps: PairedSteps, ctx: Context) -> Tensor:
        """(N, 2) of the latents that were drawn, under the policy as it is."""
        twice = torch.arange(len(steps)).repeat_interleave(2)
        k = steps.k.repeat_interleave(2)
        step = ctx.sampler.transition(ctx.policy, steps.x.flatten(0, 1), k, steps.prompt.select(twice))
        return step.log_prob(steps.x_next.flatten(0, 1), self.reduction).view(-1, 2)

    def loss(self, rows: PairedSteps, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        assert rows.old_log_prob is not None
        log_ratio = self.log_prob(rows, ctx) - rows.old_log_prob
        advantage = rows.advantage.clamp(-self.advantage_clip, self.advantage_clip)
        weight = self.decay**rows.k / self.log_ratio_scale
        loss = pair_loss(log_ratio, advantage, weight, self.clip_range).mean()
        outside = log_ratio.detach().abs() > self.clip_range
        return loss, {
            "policy_loss": loss,
            "advantage_difference": (advantage[:, 0] - advantage[:, 1]).abs().mean(),
            "log_ratio_size": log_ratio.detach().abs().mean(),
            "clip_fraction": outside.float().mean(),
        }

    # what a resumed run needs

    def state_dict(self) -> dict[str, Any]:
        return {"trackers": [tracker.state_dict() for tracker in self._trackers]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for tracker, saved in zip(self._trackers, state["trackers"], strict=True):
            tracker.load_state_dict(saved)


def pair_loss(log_ratio: Tensor, advantage: Tensor, weight: Tensor, clip_range: float) -> Tensor:
    """max((w d - dA)^2, (w d~ - dA)^2) of each pair (N,), d~ of the clipped log-ratios (SDPO, Eq. 14 to 16).

    `log_ratio` and `advantage` are (N, 2), `weight` (N,). A `clip_range` of 0 does not clip.
    """
    wanted = advantage[:, 0] - advantage[:, 1]
    free = (weight * (log_ratio[:, 0] - log_ratio[:, 1]) - wanted) ** 2
    if not clip_range:
        return free
    near = log_ratio.clamp(-clip_range, clip_range)
    return torch.maximum(free, (weight * (near[:, 0] - near[:, 1]) - wanted) ** 2)
