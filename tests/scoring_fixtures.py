"""A reward that counts its calls and can fail, and a clock for the pauses between retries."""

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


class Flaky(Reward):
    """The mean of all pixels. Counts its calls, and fails at those whose number is in `fail`."""

    def __init__(self, fail: Sequence[int] = (), mark: str = "version 1") -> None:
        self.calls, self.fail, self.mark = 0, set(fail), mark

    def fingerprint(self) -> str:
        return self.mark

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor | Scores:
        self.calls += 1
        if self.calls in self.fail:
            raise TransientError("connection refused")
        values = images.mean((1, 2, 3))
        return Scores(values, torch.ones(len(values), dtype=torch.bool), {"twice": 2 * values})


class Slow(Flaky):
    slow = True


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The requested pauses. None is made; the clock advances by them instead."""
    found: list[float] = []
    monkeypatch.setattr("alignkit.rewards.checked.wait", lambda closed, seconds: found.append(seconds))
    monkeypatch.setattr("alignkit.rewards.checked.monotonic", lambda: sum(found))
    return found


def loaded(reward: Reward, scoring: Scoring, name: str = "flaky") -> WeightedRewards:
    rewards = WeightedRewards([(name, 1.0, reward)], scoring=scoring)
    rewards.load(torch.device("cpu"))
    return rewards
