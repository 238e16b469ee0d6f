"""Trainers of SDPO on the tiny pipelines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit.train import Trainer

MakeTrainer = Callable[..., Trainer]
SETTINGS = {"algorithm.name": "sdpo", "sampler.num_steps": 3}


@pytest.fixture
def make(make_trainer: MakeTrainer, tiny_teacher: Path) -> MakeTrainer:
    """A trainer of SDPO on the consistency model, or with `ddim=True` on its teacher: 2 prompts, 4 pairs, 3 steps."""

    def build(overrides: dict[str, Any] | None = None, ddim: bool = False) -> Trainer:
        teacher = {"model.name": str(tiny_teacher), "sampler.name": "ddim", "sampler.eta": 1.0, "evaluate.steps": [3]}
        return make_trainer(SETTINGS | (teacher if ddim else {}) | (overrides or {}))

    return build
