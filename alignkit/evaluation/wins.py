"""Win rates: how often the image of one model scores higher than that of another, on the same prompt and noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class WinRate:
    """The share of pairs in which `first` scores higher than `second`; a tie counts half."""

    first: str
    second: str
    reward: str
    num_steps: int
    count: int
    """Number of prompts."""
    rate: float
    low: float
    """Lower end of the 95 % interval (Wilson 1927), which has a width at 0 and 1 too; `high` is the upper end."""
    high: float
    ties: float = 0.0
    """Share of pairs with equal scores."""
    prompts: str = "unseen"
    """Kind of prompts, as in a row of an evaluation."""


def win_rate(
    first: str, second: str, reward: str, num_steps: int, pairs: Sequence[Sequence[tuple[float, float]]]
) -> WinRate | None:
    """Return the win rate of `first` over `second` from the pairs of scores of every prompt; None without any.

    The rate is the mean over prompts of the share of each. The interval counts prompts, not images, since the images
    of a prompt win or lose together.
    """
    shares = [[((a > b) + (a >= b)) / 2 for a, b in some] for some in pairs if some]
    if not shares:
        return None
    rate = sum(sum(some) / len(some) for some in shares) / len(shares)
    every = [share for some in shares for share in some]
    ties = every.count(0.5) / len(every)
    return WinRate(first, second, reward, num_steps, len(shares), rate, *_wilson(rate, len(shares)), ties)


def _wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return the score interval of a share of `count`."""
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    reach = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return max(0.0, middle - reach), min(1.0, middle + reach)
