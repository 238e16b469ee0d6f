"""What the tests of the baselines share: trainers on the tiny pipelines, and rewards that tell little apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit.train import Trainer

REWARDS = """
    from alignkit import hookimpl

    @hookimpl
    def register_rewards(register):
        register("constant", "odd_rewards.rewards:Constant", "The same for every picture")
        register("partial", "odd_rewards.rewards:Partial", "Every third picture cannot be scored")
"""

REWARD_CLASSES = """
    import torch
    from alignkit.interfaces import Reward, Scores


    class Constant(Reward):
        def __call__(self, images, examples):
            return torch.ones(len(images), dtype=torch.long)


    class Partial(Reward):
        def __call__(self, images, examples):
            return Scores(images.mean((1, 2, 3)), torch.arange(len(images)) % 3 != 0)
"""


@pytest.fixture
def make(make_trainer: Callable[..., Trainer], tiny_teacher: Path, plugins: Any) -> Callable[..., Trainer]:
    """A trainer on the consistency model at three steps, or with `ddim=True` on its teacher."""
    plugins.install("odd_rewards", REWARDS, rewards=REWARD_CLASSES)

    def build(name: str, overrides: dict[str, Any] | None = None, ddim: bool = False) -> Trainer:
        settings: dict[str, Any] = {"algorithm.name": name, "sampler.num_steps": 3}
        if ddim:
            settings |= {
                "model.name": str(tiny_teacher),
                "sampler.name": "ddim",
                "sampler.eta": 1.0,
                "evaluate.steps": [3],
            }
        return make_trainer(settings | (overrides or {}))

    return build
