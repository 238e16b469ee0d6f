"""Two walks of one prompt, of which some methods learn together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alignkit.errors import PluginError
from alignkit.interfaces import Context
from alignkit.records import Batch, Prompt, Rows, Scores
from alignkit.rollout import run_sampler


@dataclass(frozen=True)
class Pairs(Rows):
    """Pairs of walks under the same prompt, N rows of M stochastic steps each."""

    x: Tensor
    """(N, 2, M, *S) the latents before the steps."""
    x_next: Tensor
    """(N, 2, M, *S) the latents that were drawn."""
    k: Tensor
    """(N, M) which steps of the sampler."""
    prompt: Prompt
    rewards: Tensor
    """(N, 2) of the images at the end; NaN where one could not be scored."""

    def by_step(self) -> Pairs:
        """Every step as a pair of its own, N M rows of one step."""
        count, _, steps = self.x.shape[:3]
        row = torch.arange(count, device=self.x.device).repeat_interleave(steps)
        at = torch.arange(steps, device=self.x.device).repeat(count)
        x, x_next = self.x[row, :, at, None], self.x_next[row, :, at, None]
        return Pairs(x, x_next, self.k.reshape(-1, 1), self.prompt.select(row), self.rewards[row])

    def swapped(self, where: Tensor) -> Pairs:
        """The two walks exchanged in the rows where `where` (N,) holds."""
        rows = torch.arange(len(self), device=where.device)[:, None]
        order = torch.stack([where, ~where], dim=1).long()
        return Pairs(self.x[rows, order], self.x_next[rows, order], self.k, self.prompt, self.rewards[rows, order])


def collect_pairs(batch: Batch, pairs: int, shared_noise: bool, ctx: Context) -> Pairs:
    """Walk and score `pairs` pairs of each prompt, from the same initial noise or from two."""
    return scored_pairs(batch, pairs, shared_noise, ctx)[0]


def scored_pairs(batch: Batch, pairs: int, shared_noise: bool, ctx: Context) -> tuple[Pairs, Scores]:
    """The same with the scores of their images, 2 N, the two of a pair behind each other."""
    examples = [e for e in batch.examples for _ in range(pairs)]
    count, num_steps = len(examples), ctx.sampler.num_steps
    prompt = ctx.policy.encode([e.text for e in examples])
    noises = torch.stack([ctx.noise(2 * count) for _ in range(num_steps + 1)], dim=1)
    if shared_noise:
        noises[1::2, 0] = noises[::2, 0]
    twice = torch.arange(count).repeat_interleave(2)
    rollout = run_sampler(ctx.policy, ctx.sampler, prompt.select(twice), noises)
    scores = ctx.score(rollout.next_states[:, -1], [examples[i] for i in twice.tolist()])
    rewards = scores.values.masked_fill(~scores.valid, torch.nan)
    k = (rollout.std[0] > 0).nonzero()[:, 0]
    if not len(k):
        raise PluginError(f"sampler {type(ctx.sampler).__name__}: stochastic_steps is wrong; every step had std 0")
    found = Pairs(
        x=rollout.states[:, k].unflatten(0, (count, 2)),
        x_next=rollout.next_states[:, k].unflatten(0, (count, 2)),
        k=k.expand(count, -1),
        prompt=prompt,
        rewards=rewards.view(count, 2),
    )
    return found, scores


def log_prob(pairs: Pairs, ctx: Context, reduction: str = "mean") -> Tensor:
    """(N, 2, M) of the latents that were drawn, under the policy as it is; `reduction` over latent dimensions."""
    count, two, steps = pairs.x.shape[:3]
    prompt = pairs.prompt.select(torch.arange(count).repeat_interleave(two * steps))
    k = pairs.k[:, None].expand(count, two, steps).flatten()
    step = ctx.sampler.transition(ctx.policy, pairs.x.flatten(0, 2), k, prompt)
    return step.log_prob(pairs.x_next.flatten(0, 2), reduction).view(count, two, steps)
