"""Hybrid gradient: a policy gradient on the stochastic steps, and the reward's or a surrogate's own on the last."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from alignkit import Algorithm, Batch, Context, PolicyFacts, Prompt, Rows, Sampler, check_ranges
from alignkit.advantage import GROUP_EPS, Baseline, clipped, group_statistics
from alignkit.errors import ConfigError
from alignkit.groups import Pairs, Scored, best_and_worst, log_agreement
from alignkit.rollout import encode_examples, run_sampler

MIN_SPREAD = 0.05
"""Smallest standard deviation that a surrogate's scores are divided by. They are log-odds of winning a pair, and where
those of a group are so close they carry no signal yet."""


@dataclass(frozen=True)
class Compared(Rows):
    """Trajectories whose images were compared with others of their prompt, N rows of K steps."""

    x: Tensor
    """(N, K, *S) the latent before each step."""
    x_next: Tensor
    """(N, K, *S) the latent after it."""
    last_noise: Tensor
    """(N, *S) unit normal, of the last step."""
    prompt: Prompt
    advantage: Tensor
    """(N,); NaN where an image could not be scored, or all of its group got one score."""
    spread: Tensor
    """(N,) divisor of the last step's reward: the standard deviation within the group."""
    old_log_prob: Tensor | None = None
    """(N, K - 1) of the latents after all steps but the last, under the policy that sampled them. None: under the
    policy as it is."""


@dataclass(frozen=True)
class Collected:
    """One round: trajectories for the policy, and their images in groups for the surrogate."""

    rows: Compared
    scored: Scored | None
    """None where no surrogate learns."""
    prompt: Prompt
    """The prompts of the batch."""


@dataclass
class Hybrid(Algorithm[Collected, Compared]):
    """Hybrid gradient (after RTDMD, arXiv 2605.26108, which has it for flow models).

    Each step before the last is an action of a policy gradient, with advantages within the samples of a prompt and a
    clipped ratio, as in DDPO. The last step gets the gradient of the reward itself, through the decoder, from an input
    without gradient, as in DRaFT; or that of a surrogate, which learns in every round from the best and the worst
    sample of each prompt (LaSRO, Eq. 10), and the reward may then be a black box. One rollout serves both. With one
    step it is DRaFT.
    """

    default_surrogate: ClassVar[str] = "latent_unet"

    samples: Annotated[int, Ge(1)] = 8
    """Trajectories of each prompt in a round, which are compared with each other; 8 or more are meant."""
    last_weight: Annotated[float, Ge(0)] = 1.0
    """mu, the weight of the last step's term. The reward there is divided by its standard deviation within the group,
    as in the advantage, so that a weight means the same for every reward."""
    gradient_of: Literal["reward", "surrogate"] = "reward"
    """The gradient at the last step: of the reward, which must be differentiable, or of a surrogate that learns it."""
    surrogate_steps: Annotated[int, Ge(0)] = 2
    """Surrogate updates of each round, as K_2 of LaSRO. 0: it stays as surrogate.init or the warm-up left it."""
    pairs_per_update: Annotated[int, Ge(1)] = 64
    """Largest number of pairs in one surrogate update."""
    advantage_clip: Annotated[float, Gt(0)] = 5.0
    """Clamp advantages to this size."""
    clip_range: Annotated[float, Gt(0)] = 1e-4
    """Distance from 1 at which the likelihood ratio is clipped. It belongs to `reduction` and to the latents' size."""
    reduction: Literal["mean", "sum"] = "mean"
    """The log-probability over latent dimensions. The papers write the sum, their code takes the mean."""
    inner_epochs: Annotated[int, Ge(1)] = 1
    """Passes over the trajectories of a round."""

    def __post_init__(self) -> None:
        check_ranges(self)
        self._baseline = Baseline("group")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"surrogate" if self.gradient_of == "surrogate" else "differentiable_reward"})

    def check(self, sampler: Sampler, facts: PolicyFacts) -> None:
        if sampler.stochastic_steps() < sampler.num_steps - 1:
            raise ConfigError(
                f"sampler: found {sampler.stochastic_steps()} stochastic of {sampler.num_steps} steps, expected all "
                "but the last: hybrid learns from their likelihood; raise sampler.eta where there is one, or use lcm, "
                "renoise, or one step"
            )
        if self.samples < 2 and self._scores_groups(sampler):
            raise ConfigError(
                f"algorithm.samples: found {self.samples}, expected 2 or more, and 8 are meant: the images of a "
                "prompt are compared with each other"
            )

    def _scores_groups(self, sampler: Sampler) -> bool:
        """Whether anything is learned from comparing the images of a prompt."""
        return sampler.num_steps > 1 or self.gradient_of == "surrogate"

    # one rollout, scored in groups

    def collect(self, batch: Batch, ctx: Context) -> Collected:
        own = encode_examples(ctx.policy, batch.examples)
        prompt = own.select(torch.arange(len(own)).repeat_interleave(self.samples))
        noises = torch.stack([ctx.noise(len(prompt)) for _ in range(ctx.sampler.num_steps + 1)], dim=1)
        found = run_sampler(ctx.policy, ctx.sampler, prompt, noises)
        one = torch.ones(len(prompt), device=noises.device)
        rows = Compared(found.states, found.next_states, noises[:, -1], prompt, one, one)
        if not self._scores_groups(ctx.sampler):
            return Collected(rows, None, own)
        scores = ctx.score(found.samples, prompt.examples)
        rewards = scores.values.masked_fill(~scores.valid, torch.nan).float()
        advantage = self._baseline.advantages(scores, prompt.examples, ctx)
        spread = group_statistics(rewards, prompt.examples, ctx)[1] + GROUP_EPS
        rows = replace(rows, advantage=advantage, spread=spread.to(rewards))
        return Collected(rows, self._groups(found.samples, rewards, own, ctx), own)

    def _groups(self, samples: Tensor, rewards: Tensor, prompt: Prompt, ctx: Context) -> Scored | None:
        """Return the final samples in groups of one prompt, where a surrogate learns; log how well it ranks them."""
        if self.gradient_of == "reward":
            return None
        text = torch.arange(len(prompt))
        groups = samples.unflatten(0, (-1, self.samples)), rewards.view(-1, self.samples)
        scored = Scored(*groups, text, torch.full_like(text, ctx.sampler.num_steps - 1))
        log_agreement(scored, prompt, self.samples, ctx)
        return scored

    # the surrogate learns from the best and the worst of each group (LaSRO, Eq. 10)

    def surrogate_updates(self, collected: Collected, ctx: Context) -> Iterator[Pairs]:
        if collected.scored is None:
            return
        for _ in range(self.surrogate_steps or int(ctx.warming_up)):
            pairs = best_and_worst(collected.scored, collected.prompt, self.pairs_per_update, ctx.generator)
            if pairs is not None:
                yield pairs

    def surrogate_loss(self, rows: Pairs, ctx: Context) -> Tensor:
        assert ctx.surrogate is not None
        return ctx.surrogate.loss(rows.winner, rows.loser, rows.prompt)

    # the policy: L = L_pg + mu L_last

    def updates(self, collected: Collected, ctx: Context) -> Iterator[Compared]:
        """Yield the trajectories in random order, in parts of nearly `ctx.rows_per_update`, once each inner epoch."""
        rows, size = collected.rows, ctx.rows_per_update
        if self.gradient_of == "surrogate":
            rows = replace(rows, spread=self._surrogate_spread(rows, ctx))
        rows = rows.select((~rows.advantage.isnan()).nonzero()[:, 0]).shuffled(ctx.generator)
        if not len(rows):
            return
        several = self.inner_epochs > 1 or len(list(rows.even_split(size))) > 1
        if several and ctx.sampler.num_steps > 1:
            with torch.no_grad():
                old = torch.cat([self.log_prob(part, ctx) for part in rows.even_split(size)])
            rows = replace(rows, old_log_prob=old)
        for epoch in range(self.inner_epochs):
            yield from (rows.shuffled(ctx.generator) if epoch else rows).even_split(size)

    @torch.no_grad()
    def _surrogate_spread(self, rows: Compared, ctx: Context) -> Tensor:
        """Return the standard deviation of the surrogate's own scores within each group, (N,)."""
        assert ctx.surrogate is not None
        scores = ctx.surrogate.score(rows.x_next[:, -1], rows.prompt)
        return group_statistics(scores, rows.prompt.examples, ctx)[1].clamp(min=MIN_SPREAD).to(scores)

    def loss(self, rows: Compared, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        last = -(self.last_reward(rows, ctx) / rows.spread).mean()
        metrics = {"last_loss": last}
        if rows.x.shape[1] == 1:
            return self.last_weight * last, metrics
        log_prob = self.log_prob(rows, ctx)
        log_ratio = log_prob - (log_prob.detach() if rows.old_log_prob is None else rows.old_log_prob)
        advantage = rows.advantage.clamp(-self.advantage_clip, self.advantage_clip)
        policy = clipped(log_ratio, advantage[:, None], self.clip_range).mean()
        metrics |= {
            "policy_loss": policy,
            "clip_fraction": ((log_ratio.exp() - 1).abs() > self.clip_range).float().mean(),
            "log_ratio_size": log_ratio.abs().mean(),
        }
        return policy + self.last_weight * last, metrics

    def log_prob(self, rows: Compared, ctx: Context) -> Tensor:
        """Return the log-probabilities (N, K - 1) of the latents after all steps but the last."""
        count, steps = rows.x.shape[0], rows.x.shape[1] - 1
        prompt = rows.prompt.select(torch.arange(count).repeat_interleave(steps))
        k = torch.arange(steps, device=rows.x.device).repeat(count)
        step = ctx.sampler.transition(ctx.policy, rows.x[:, :-1].flatten(0, 1), k, prompt)
        return step.log_prob(rows.x_next[:, :-1].flatten(0, 1), self.reduction).view(count, steps)

    def last_reward(self, rows: Compared, ctx: Context) -> Tensor:
        """Return the reward, or the surrogate's score, of the policy's last step as it is now, (N,).

        The gradient flows through that step alone. An image that cannot be scored counts as 0 and has none.
        """
        x, steps = rows.x[:, -1], rows.x.shape[1]
        step = ctx.sampler.transition(ctx.policy, x, torch.full((len(x),), steps - 1, device=x.device), rows.prompt)
        final = step.sample(rows.last_noise)
        if self.gradient_of == "surrogate":
            assert ctx.surrogate is not None
            return ctx.surrogate.score(final, rows.prompt)
        # With several steps the images were scored, and the reward logged, when they were collected.
        scores = ctx.differentiable_score(final, rows.prompt.examples, log=steps == 1)
        return scores.values.masked_fill(~scores.valid, 0)
