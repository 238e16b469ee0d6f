"""SDPO: at every stochastic step, the difference of two log-likelihood ratios follows the difference of returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from alignkit import Algorithm, Batch, Context, PolicyFacts, Prompt, Rows, Sampler, check_ranges
from alignkit.advantage import Baseline
from alignkit.errors import ConfigError
from alignkit.rollout import Trajectories, choose_steps, sample_trajectories
from alignkit_sdpo.dense import by_interpolation, by_similarity, discounted_returns, queried_steps


@dataclass(frozen=True)
class PairedSteps(Rows):
    """The same stochastic step of two trajectories from one initial noise, N rows."""

    x: Tensor
    """(N, 2, *S) the latents before the step."""
    x_next: Tensor
    """(N, 2, *S) the latents that were sampled."""
    k: Tensor
    """(N,) the step's number in the sampler."""
    pair: Tensor
    """(N,) the pair's number, ascending: the rows of a pair stand together, as many for each."""
    prompt: Prompt
    advantage: Tensor
    """(N, 2) advantages of the return from this step on; NaN where it could not be scored."""
    old_log_prob: Tensor | None = None
    """(N, 2) of `x_next` under the policy that sampled it."""


@dataclass
class SDPO(Algorithm[PairedSteps, PairedSteps]):
    """SDPO, stepwise diffusion policy optimization (Zhang et al., arXiv 2411.11727).

    Two trajectories start from the same noise. Every step of both gets a reward of its own, estimated for the clean
    latent predicted there from three queries a trajectory; the difference of the two log-likelihood ratios is regressed
    to the difference of the advantages, one step a pair in an update. A deterministic step has no likelihood and is
    left out, so on the `lcm` sampler all but the last are trained.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"stochastic_steps"})
    takes_advantages: ClassVar[bool] = True

    pairs: Annotated[int, Ge(1)] = 2
    """Pairs of trajectories of each prompt in a round. The paper samples 128 pairs a round for its 45 prompts."""
    queries: Literal["three", "two", "one", "all"] = "three"
    """Steps whose predictions are scored: first, anchor and last; first and last; last, copied to all; or every one.
    "three" scores every step where there are at most four."""
    anchor: Literal["adaptive", "random", "fixed"] = "adaptive"
    """The third query: the step least like first and last (Eq. 10), any step between them, or the middle one."""
    between: Literal["similarity", "interpolation"] = "similarity"
    """The reward of a step without a query: the mean weighted by likeness of latents (Eq. 11), or on a straight line
    between its neighbours."""
    discount: Annotated[float, Ge(0), Le(1)] = 0.99
    """gamma of Eq. 13; 0 takes each step's own reward alone."""
    baseline: Literal["step_prompt", "prompt", "batch"] = "step_prompt"
    """Normalise a return by the last of the same prompt and step, of the same prompt, or by all of the round."""
    buffer_size: int = 32
    """Returns that are kept for each prompt and step."""
    min_count: Annotated[int, Ge(1)] = 16
    """Returns that a prompt needs at a step to be normalised by its own; until then it is by the round's."""
    advantage_clip: Annotated[float, Gt(0)] = 5.0
    """Clamp advantages to this size."""
    decay: Annotated[float, Gt(0)] = 0.99
    """lambda of Eq. 14: step i, from 0, weighs lambda^i / log_ratio_scale. Above 1 late steps weigh more."""
    log_ratio_scale: Annotated[float, Gt(0)] = 1.0
    """eta of Eq. 14."""
    clip_range: Annotated[float, Ge(0)] = 1e-4
    """epsilon of Eq. 15, the size at which a log-ratio is clipped; it belongs to `reduction` and to the latents' size.
    0 does not clip."""
    reduction: Literal["mean", "sum"] = "mean"
    """The log-probability over latent dimensions. The paper writes the sum, its code takes the mean."""
    order: Literal["shuffled", "in_order", "accumulated"] = "shuffled"
    """The content of an update: a random step of each pair (Eq. 16); the same step of all pairs, first to last;
    or all steps of its pairs at once."""
    step_fraction: Annotated[float, Gt(0), Le(1)] = 1.0
    """Share of stochastic steps to learn from, chosen anew for each pair."""
    inner_epochs: Annotated[int, Ge(1)] = 1
    """Passes over the steps of a round."""

    def __post_init__(self) -> None:
        check_ranges(self)
        self._baseline = Baseline(self.baseline, self.buffer_size, self.min_count)

    def check(self, sampler: Sampler, facts: PolicyFacts) -> None:
        # Both trajectories of a pair have the first noise, and so the first prediction, in common.
        if sampler.num_steps == 1:
            raise ConfigError(
                "sampler.num_steps: found 1, expected at least 2: the trajectories of a pair start from one noise and "
                "predict the same at the first step, so at one step sdpo finds no difference"
            )
        if not self.discount and sampler.stochastic_steps() == 1:
            raise ConfigError(
                "algorithm.discount: found 0, expected more: only the first step is stochastic, and the rewards of "
                "that step alone are the same for both trajectories of a pair"
            )

    # collect: sample in pairs, score few predictions, compare step by step

    def collect(self, batch: Batch, ctx: Context) -> PairedSteps:
        trajectories = sample_trajectories(batch.examples, ctx, 2 * self.pairs, sharing=2)
        return self._paired(trajectories, self._scored(trajectories, ctx), ctx)

    def _scored(self, trajectories: Trajectories, ctx: Context) -> Tensor:
        """Return the advantages of all steps (N, K); NaN where one rests on an image that could not be scored."""
        clean, examples = trajectories.clean, trajectories.prompt.examples
        step = queried_steps(clean, self.queries, self.anchor, ctx.generator)
        each, num_steps = step.shape[1], clean.shape[1]
        row = torch.arange(len(step), device=step.device)[:, None]
        scores = ctx.score(clean[row, step].flatten(0, 1), [e for e in examples for _ in range(each)])
        found = scores.values.masked_fill(~scores.valid, torch.nan).view_as(step).to(clean.device)
        for k, rewards in ((1, found[:, 0]), (num_steps, found[:, -1]))[each == 1 :]:
            if not bool(rewards.isnan().all()):
                ctx.log(**{f"reward/step{k}": rewards.nanmean()})

        def returns(rewards: Tensor) -> Tensor:
            queried = rewards.view_as(step).to(clean.device)
            if self.between == "similarity":
                dense = by_similarity(clean, step, queried)
            else:
                dense = by_interpolation(num_steps, step, queried)
            return discounted_returns(dense, self.discount)

        return self._baseline.advantages(scores, examples, ctx, returns)

    def _paired(self, trajectories: Trajectories, advantage: Tensor, ctx: Context) -> PairedSteps:
        """Make a row of every stochastic step of each pair, or of a random share of them."""
        count, stochastic = len(advantage) // 2, trajectories.stochastic_steps(ctx.sampler)
        k = choose_steps(stochastic, count, self.step_fraction, ctx.generator).sort(1).values
        pair, k = torch.arange(count, device=k.device).repeat_interleave(k.shape[1]), k.flatten()

        def members(column: Tensor) -> Tensor:
            return column.view(count, 2, *column.shape[1:])[pair, :, k]

        return PairedSteps(
            x=members(trajectories.states),
            x_next=members(trajectories.next_states),
            k=k,
            pair=pair,
            prompt=trajectories.prompt.select(2 * pair),
            advantage=members(advantage),
        )

    # the updates

    def updates(self, collected: PairedSteps, ctx: Context) -> Iterator[PairedSteps]:
        """Yield the updates of each inner epoch; a row is a pair, which the network sees as two."""
        plan = self._plan(collected, ctx)
        # Computed again instead of kept from the trajectory: at the first update the log-ratios are then 0 exactly.
        old = torch.zeros_like(collected.advantage)
        with torch.no_grad():
            for index in plan:
                old[index.to(old.device)] = self.log_prob(collected.select(index), ctx)
        steps = replace(collected, old_log_prob=old)
        for epoch in range(self.inner_epochs):
            for index in self._plan(steps, ctx) if epoch else plan:
                yield steps.select(index)

    def _plan(self, steps: PairedSteps, ctx: Context) -> list[Tensor]:
        """Plan each update: one step of every pair, then the next, in parts of nearly `ctx.rows_per_update` rows."""
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
        """Return the log-probabilities (N, 2) of the latents that were sampled, under the policy as it is."""
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

    def state_dict(self) -> dict[str, Any]:
        return self._baseline.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._baseline.load_state_dict(state)


def pair_loss(log_ratio: Tensor, advantage: Tensor, weight: Tensor, clip_range: float) -> Tensor:
    """Return max((w d - dA)^2, (w d~ - dA)^2) of each pair (N,), d~ of the clipped log-ratios (SDPO, Eq. 14 to 16).

    `log_ratio` and `advantage` are (N, 2), `weight` (N,). A `clip_range` of 0 does not clip.
    """
    wanted = advantage[:, 0] - advantage[:, 1]
    free = (weight * (log_ratio[:, 0] - log_ratio[:, 1]) - wanted) ** 2
    if not clip_range:
        return free
    near = log_ratio.clamp(-clip_range, clip_range)
    return torch.maximum(free, (weight * (near[:, 0] - near[:, 1]) - wanted) ** 2)
