"""A reward that counts how often it is asked, and the pauses between."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from alignkit.errors import TransientError
from alignkit.interfaces import Reward
from alignkit.records import Example, Scores
from alignkit.rewards.checked import Scoring
from alignkit.rewards.weighted import WeightedRewards

EXAMPLES = [Example(f"prompt {i}") for i in range(6)]
IMAGES = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Judge(Reward):
    """The mean of all pixels, from an answer that may fail; counts how often it is asked."""

    def __init__(self, fail: Sequence[int] = (), mark: str = "judge 1") -> None:
        self.asked, self.fail, self.mark = 0, set(fail), mark

    def fingerprint(self) -> str:
        return self.mark

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor | Scores:
        self.asked += 1
        if self.asked in self.fail:
            raise TransientError("connection refused")
        values = images.mean((1, 2, 3))
        return Scores(values, torch.ones(len(values), dtype=torch.bool), {"twice": 2 * values})


class Slow(Judge):
    slow = True


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were asked for, none of which is made but on the clock."""
    found: list[float] = []
    monkeypatch.setattr("alignkit.rewards.checked.wait", lambda closed, seconds: found.append(seconds))
    monkeypatch.setattr("alignkit.rewards.checked.monotonic", lambda: sum(found))
    return found


def loaded(reward: Reward, scoring: Scoring, name: str = "judge") -> WeightedRewards:
    rewards = WeightedRewards([(name, 1.0, reward)], scoring=scoring)
    rewards.load(torch.device("cpu"))
    return rewards
