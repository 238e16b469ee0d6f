"""Runs with points, and a held-out reward for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from alignkit.evaluation.choice import Choice
from alignkit.evaluation.rows import Row
from plugin_fixtures import PluginFolder
from run_fixtures import metrics

LORA = "pytorch_lora_weights.safetensors"

STEADY = """
    from alignkit import hookimpl

    @hookimpl
    def register_rewards(register):
        register("steady", "steady.rewards:Steady", "The same for every image, from a server that can be switched off")
"""

STEADY_REWARD = """
    import torch
    from alignkit.interfaces import Reward

    ERROR = None
    "What is raised in the place of a score, once there were CALLS."
    CALLS = 0


    class Steady(Reward):
        def __call__(self, images, examples):
            global CALLS
            CALLS -= 1
            if ERROR is not None and CALLS < 0:
                raise ERROR
            return torch.full((len(images),), 0.5)
"""


@pytest.fixture
def steady(plugins: PluginFolder) -> Any:
    """The module of a held-out reward that never falls and can be made to fail."""
    plugins.install("steady", STEADY, rewards=STEADY_REWARD)
    import steady.rewards

    return steady.rewards


DDPO = {"algorithm.name": "ddpo", "algorithm.samples": 2, "algorithm.baseline": "batch"}
LCD: dict[str, Any] = {"algorithm.name": "lcd", "algorithm.samples": None, "algorithm.baseline": None}


def points(overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Settings with points after updates 2 and 4, and so large a step size that the weights differ visibly."""
    chosen = {
        "evaluate.points": 2, "evaluate.rewards": ["steady"], "evaluate.steps": [1, 2], "scoring.retries": 0,
        "train.learning_rate": 0.05, "train.ema_decay": 0.5, **DDPO, **(overrides or {}),
    }  # fmt: skip
    return {key: value for key, value in chosen.items() if value is not None}


def choice_of(folder: Path) -> dict[str, Any]:
    (found,) = [record for record in metrics(folder) if "exported" in record]
    return found


def prefer(update: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose this point as soon as it is there, whatever the rewards."""

    def choose(points: Mapping[int, Sequence[Row]]) -> Choice:
        return Choice(update if update in points else None, "for the test")

    monkeypatch.setattr("alignkit.runs.points.choose", choose)
    monkeypatch.setattr("alignkit.runs.loop.choose", choose)
