"""Groups of scored samples, the pairs that a surrogate learns from, and measures of how well it ranks them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alignkit.interfaces import Context
from alignkit.records import Prompt, Rows


@dataclass(frozen=True)
class Pairs(Rows):
    """Latents of which the true reward prefers the first. N rows."""

    winner: Tensor
    """(N, *S)."""
    loser: Tensor
    """(N, *S)."""
    prompt: Prompt


@dataclass(frozen=True)
class Scored(Rows):
    """Groups of scored samples that share prompt and step. N groups of M samples."""

    latents: Tensor
    """(N, M, *S) clean latents."""
    rewards: Tensor
    """(N, M) float32; NaN where an image could not be scored."""
    text: Tensor
    """(N,) the prompt's place in the batch."""
    step: Tensor
    """(N,) the sampler step that gave the clean latents, 0 for the first."""


def extremes(rewards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best and the worst of each group of rewards (N, M), and which groups carry a label. All (N,).

    Equal rewards go to the first index. A group whose best and worst are equal, or with fewer than two scored samples,
    carries none.
    """
    best = rewards.nan_to_num(nan=-torch.inf).argmax(1)
    worst = rewards.nan_to_num(nan=torch.inf).argmin(1)
    rows = torch.arange(len(rewards))
    # NaN compares as False, so a group without scores drops out as well.
    return best, worst, rewards[rows, best] > rewards[rows, worst]


def best_and_worst(scored: Scored, prompt: Prompt, size: int, generator: torch.Generator) -> Pairs | None:
    """Pair the best with the worst of each group (LaSRO, Eq. 10); of more than `size` groups, some chosen at random.

    `prompt` holds the batch's prompts. None where no group carries a label.
    """
    best, worst, labelled = extremes(scored.rewards.cpu())
    rows = labelled.nonzero()[:, 0]
    if len(rows) > size:
        rows = rows[torch.randperm(len(rows), generator=generator)[:size]]
    if not len(rows):
        return None
    winner, loser = (scored.latents[rows, place[rows]] for place in (best, worst))
    return Pairs(winner, loser, prompt.select(scored.text[rows]))


def log_rewards(scored: Scored, own: int, ctx: Context) -> None:
    """Log the true reward by step. The first `own` samples of each group are the policy's."""
    for k in range(ctx.sampler.num_steps):
        found = scored.rewards[scored.step == k, :own]
        if not bool(found.isnan().all()):
            ctx.log(**{f"reward/step{k + 1}": found.nanmean()})


def log_agreement(scored: Scored, prompt: Prompt, own: int, ctx: Context) -> tuple[bool, float | None]:
    """Log how the surrogate ranks samples that it has not learned from; `prompt` holds the batch's prompts.

    Returns whether it distinguishes any two samples, and its rank correlation with the reward, None without one.
    """
    assert ctx.surrogate is not None
    each = prompt.select(scored.text.repeat_interleave(scored.rewards.shape[1]))
    scores = ctx.surrogate.score(scored.latents.flatten(0, 1), each).view_as(scored.rewards)
    opinionated = bool((scores != scores[0, 0]).any())
    best, worst, labelled = extremes(scored.rewards.cpu())
    rows = torch.arange(len(scored))
    margin = scores[rows, best] - scores[rows, worst]
    ctx.log(surrogate_score=scores[:, :own].mean(), labelled_groups=labelled.float().mean())
    for k in range(ctx.sampler.num_steps):
        at = scored.step == k
        if bool(labelled[at].any()):
            ctx.log(**{f"pair_accuracy/step{k + 1}": (margin[at & labelled] > 0).float().mean()})
    if not bool(labelled.any()):
        return opinionated, None
    correlation = float(rank_correlation(scores, scored.rewards))
    if correlation != correlation:
        return opinionated, None
    ctx.log(pair_accuracy=(margin[labelled] > 0).float().mean(), rank_correlation=correlation)
    return opinionated, correlation


def rank_correlation(scores: Tensor, rewards: Tensor) -> Tensor:
    """Return Spearman's coefficient within each group, (N, M) both; the mean over groups in which both vary.

    NaN if there is no such group. Ties share their mean rank. A group with a NaN is left out.
    """
    keep = (rewards.amax(1) > rewards.amin(1)) & (scores.amax(1) > scores.amin(1))
    if not bool(keep.any()):
        return torch.tensor(torch.nan)
    a, b = _ranks(scores[keep]), _ranks(rewards[keep])
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    coefficients: Tensor = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    return coefficients.mean()


def _ranks(values: Tensor) -> Tensor:
    """Return mean ranks along the last axis."""
    below = (values[:, :, None] > values[:, None, :]).sum(2)
    equal = (values[:, :, None] == values[:, None, :]).sum(2)
    return below.float() + (equal.float() - 1) / 2
