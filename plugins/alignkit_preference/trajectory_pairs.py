"""Pairs of trajectories of one prompt, which D3PO, PSO and REBEL learn from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alignkit import Batch, Context, Prompt, Rows, Scores
from alignkit.rollout import sample_trajectories


@dataclass(frozen=True)
class Pairs(Rows):
    """Pairs of trajectories of the same prompt, N rows of M stochastic steps each."""

    x: Tensor
    """(N, 2, M, *S) the latents before the steps."""
    x_next: Tensor
    """(N, 2, M, *S) the latents that were sampled."""
    k: Tensor
    """(N, M) the steps' numbers in the sampler."""
    prompt: Prompt
    rewards: Tensor
    """(N, 2) of the images at the end; NaN where one could not be scored."""

    def by_step(self) -> Pairs:
        """Return every step as a pair of its own, N M rows of one step."""
        count, _, steps = self.x.shape[:3]
        row = torch.arange(count, device=self.x.device).repeat_interleave(steps)
        at = torch.arange(steps, device=self.x.device).repeat(count)
        x, x_next = self.x[row, :, at, None], self.x_next[row, :, at, None]
        return Pairs(x, x_next, self.k.reshape(-1, 1), self.prompt.select(row), self.rewards[row])

    def swapped(self, where: Tensor) -> Pairs:
        """Exchange the two trajectories in the rows where `where` (N,) holds."""
        rows = torch.arange(len(self), device=where.device)[:, None]
        order = torch.stack([where, ~where], dim=1).long()
        return Pairs(self.x[rows, order], self.x_next[rows, order], self.k, self.prompt, self.rewards[rows, order])


def collect_pairs(batch: Batch, pairs: int, shared_noise: bool, ctx: Context) -> tuple[Pairs, Scores]:
    """Sample and score `pairs` pairs of each prompt, from one initial noise a pair or from two.

    Also returns the scores of their 2 N images, the two of a pair after each other.
    """
    trajectories = sample_trajectories(batch.examples, ctx, 2 * pairs, sharing=2 if shared_noise else 1)
    scores = ctx.score(trajectories.samples, trajectories.prompt.examples)
    k, count = trajectories.stochastic_steps(ctx.sampler), len(trajectories) // 2
    found = Pairs(
        x=trajectories.states[:, k].unflatten(0, (count, 2)),
        x_next=trajectories.next_states[:, k].unflatten(0, (count, 2)),
        k=k.expand(count, -1),
        prompt=trajectories.prompt.select(2 * torch.arange(count)),
        rewards=scores.values.masked_fill(~scores.valid, torch.nan).view(count, 2),
    )
    return found, scores


def winners_first(pairs: Pairs, ctx: Context) -> Pairs:
    """Keep the pairs of which the reward prefers one trajectory, that one first. Logs their share."""
    first, second = pairs.rewards[:, 0], pairs.rewards[:, 1]
    # NaN compares as False both ways, so an image that could not be scored is in no pair.
    labelled = (first > second) | (first < second)
    ctx.log(labelled_pairs=labelled.float().mean())
    return pairs.swapped(first < second).select(labelled.nonzero()[:, 0])


def log_prob(pairs: Pairs, ctx: Context, reduction: str = "mean") -> Tensor:
    """Return the log-probabilities (N, 2, M) of the latents that were sampled, under the policy as it is.

    `reduction` is over latent dimensions, "mean" or "sum".
    """
    count, two, steps = pairs.x.shape[:3]
    prompt = pairs.prompt.select(torch.arange(count).repeat_interleave(two * steps))
    k = pairs.k[:, None].expand(count, two, steps).flatten()
    step = ctx.sampler.transition(ctx.policy, pairs.x.flatten(0, 2), k, prompt)
    return step.log_prob(pairs.x_next.flatten(0, 2), reduction).view(count, two, steps)
