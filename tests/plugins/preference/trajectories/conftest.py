"""Fixtures of the methods that learn from pairs of trajectories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from alignkit.training.trainer import Trainer


@pytest.fixture
def make(make_trainer: Callable[..., Trainer], odd_rewards: None) -> Callable[..., Trainer]:
    """Build a trainer on the consistency model at three steps, or with `ddim=True` on its teacher."""

    def build(name: str, overrides: dict[str, Any] | None = None, ddim: bool = False) -> Trainer:
        return make_trainer({"algorithm.name": name, "sampler.num_steps": 3} | (overrides or {}), ddim)

    return build
