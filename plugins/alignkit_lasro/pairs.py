"""Scored samples, the pairs that are made of them, and how well a surrogate ranks them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

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
    """Groups of samples that share prompt and step. N groups of M samples."""

    latents: Tensor
    """(N, M, *S) clean latents."""
    rewards: Tensor
    """(N, M) float32; NaN where an image could not be scored."""
    text: Tensor
    """(N,) a text's place in the list that goes with the table."""
    step: Tensor
    """(N,) the sampler step that gave the clean latents, 0 for the first."""


def extremes(rewards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Best and worst of each group of rewards (N, M), and which groups carry a label.

    Equal rewards go to the first index. A group whose best and worst are equal, or with fewer than two scored samples,
    carries none. All (N,).
    """
    best = rewards.nan_to_num(nan=-torch.inf).argmax(1)
    worst = rewards.nan_to_num(nan=torch.inf).argmin(1)
    rows = torch.arange(len(rewards))
    # NaN compares as False, so a group without scores drops out as well.
    return best, worst, rewards[rows, best] > rewards[rows, worst]


def drawn(rewards: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Like `extremes`, but any two samples of each group, the better one first."""
    order = torch.rand(rewards.shape, generator=generator).argsort(1)
    first, second = order[:, 0], order[:, 1]
    rows = torch.arange(len(rewards))
    left, right = rewards[rows, first], rewards[rows, second]
    # NaN compares as False both ways, so a sample that could not be scored is in no pair.
    better, worse = torch.where(left >= right, first, second), torch.where(left >= right, second, first)
    return better, worse, (left > right) | (left < right)


def counterparts(scored: Scored, own: int, samples: int) -> Scored:
    """Groups of two from the same noise: one of `own` samples of the policy, and one of the model before training.

    `scored` holds `own` samples of the policy, then those of the model before training up to `samples`, each from the
    noise of the own sample at its place.
    """
    place = torch.arange(own, samples)
    members = torch.stack([(place - own) % own, place], dim=1)
    return Scored(
        latents=scored.latents[:, members].flatten(0, 1),
        rewards=scored.rewards[:, members].flatten(0, 1),
        text=scored.text.repeat_interleave(len(place)),
        step=scored.step.repeat_interleave(len(place)),
    )


def mixed(
    rounds: Sequence[tuple[Scored, Sequence[str]]],
    choice: Literal["extremes", "random"],
    size: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, list[str]]:
    """Up to `size` pairs of the newest of `rounds`, which come with their texts, and of older ones in random order.

    Where there are older ones half of the room is for the newest, and of each older one a part is drawn. Winners
    (N, *S), losers and their texts; N is 0 where no group carries a label.
    """
    winners: list[Tensor] = []
    losers: list[Tensor] = []
    texts: list[str] = []
    fresh, kept = rounds[-1:], rounds[:-1]
    order = torch.randperm(len(kept), generator=generator).tolist()
    for scored, names in [*fresh, *(kept[i] for i in order)]:
        best, worst, labelled = extremes(scored.rewards) if choice == "extremes" else drawn(scored.rewards, generator)
        rows = labelled.nonzero()[:, 0]
        room = size if not kept else size // 2 if not winners else size // 4
        if kept or len(rows) > room:
            rows = rows[torch.randperm(len(rows), generator=generator)[:room]]
        winners.append(scored.latents[rows, best[rows]])
        losers.append(scored.latents[rows, worst[rows]])
        texts += [names[i] for i in scored.text[rows].tolist()]
        if len(texts) >= size:
            break
    return torch.cat(winners), torch.cat(losers), texts


def rank_correlation(scores: Tensor, rewards: Tensor) -> Tensor:
    """Spearman's coefficient within each group, (N, M) both; the mean over groups in which both vary, NaN if none.

    Ties share their mean rank. A group with a NaN is left out.
    """
    keep = (rewards.amax(1) > rewards.amin(1)) & (scores.amax(1) > scores.amin(1))
    if not bool(keep.any()):
        return torch.tensor(torch.nan)
    a, b = _ranks(scores[keep]), _ranks(rewards[keep])
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    coefficients: Tensor = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    return coefficients.mean()


def _ranks(values: Tensor) -> Tensor:
    """Mean ranks along the last axis."""
    below = (values[:, :, None] > values[:, None, :]).sum(2)
    equal = (values[:, :, None] == values[:, None, :]).sum(2)
    return below.float() + (equal.float() - 1) / 2
