"""Rewards as advantages: how far a sample lies above others, in units of their spread."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.interfaces import Context
from alignkit.records import Scores


def standardised(rewards: Tensor, others: Tensor, eps: float) -> Tensor:
    """(rewards - mean) / (standard deviation + eps), by the statistics of `others`; (N,) float32.

    In float64 whatever came in: rewards of 0 and 1 are not cut to integers. A sample that could not be scored is NaN;
    it enters no statistics and stays NaN.
    """
    known = others.cpu().double()
    known = known[~known.isnan()]
    spread = known.std(correction=0) if len(known) else torch.nan
    return ((rewards.cpu().double() - known.mean()) / (spread + eps)).float().to(rewards.device)


def over_batch(rewards: Tensor, ctx: Context) -> Tensor:
    """Rewards (N,), NaN where a sample could not be scored, measured by those of all processes."""
    return standardised(rewards, ctx.gather(rewards), eps=1e-8)


def of_terms(scores: Scores, ctx: Context, measure: Callable[[Tensor, str], Tensor]) -> Tensor:
    """`measure(rewards (N,), name)`, advantages of any shape, of each of `ctx.terms(scores)`, as one.

    One term is given back as it is measured. Of several, each measured apart, the weighted sum is measured once more
    over the batch, so that its size does not depend on how many there are (GDPO, Liu et al. 2026, arXiv 2601.05242).
    A reward that few samples get thus counts as much as one that tells all of them apart.
    """
    found = [(weight, measure(rewards, name)) for name, (weight, rewards) in ctx.terms(scores).items()]
    if len(found) == 1:
        return found[0][1]
    total = torch.stack([weight * advantages for weight, advantages in found]).sum(0)
    return over_batch(total.flatten(), ctx).view_as(total)


class PromptTracker:
    """Advantages measured by what the same prompt got before: the mean and spread of its last `size` rewards.

    A prompt with fewer than `min_count` rewards is measured by the batch.
    """

    def __init__(self, size: int, min_count: int) -> None:
        self.size, self.min_count = size, min_count
        self._seen: dict[int, deque[float]] = {}

    def advantages(self, texts: Sequence[str], rewards: Tensor, ctx: Context, name: str = "") -> Tensor:
        """Rewards (N,) of N texts, NaN where a sample could not be scored; they are remembered and then measured.

        Those of one `name` are measured by each other alone, so that several rewards can share a tracker.
        Logs `own_statistics`, the share of samples that were measured by their own prompt.
        """
        keys = torch.tensor([_key(f"{name}\0{text}" if name else text) for text in texts], device=rewards.device)
        batch = ctx.gather(rewards)
        for key, reward in zip(ctx.gather(keys).tolist(), batch.tolist(), strict=True):
            if reward == reward:
                self._seen.setdefault(key, deque(maxlen=self.size)).append(reward)
        found, own = standardised(rewards, batch, eps=1e-6), torch.zeros(len(rewards), dtype=torch.bool)
        for key in set(keys.tolist()):
            seen = self._seen.get(key, ())
            if len(seen) >= self.min_count:
                at = keys == key
                found[at] = standardised(rewards[at], torch.tensor(seen, dtype=torch.float64), eps=1e-6)
                own |= at.cpu()
        ctx.log(own_statistics=own.float().mean())
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"seen": {key: list(rewards) for key, rewards in self._seen.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The reverse of `state_dict`."""
        self._seen = {key: deque(rewards, maxlen=self.size) for key, rewards in state["seen"].items()}


def _key(text: str) -> int:
    """A text as a number that is the same in every process and every run."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)
