"""Trainers of SDPO on the tiny pipelines."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from alignkit.training.trainer import Trainer

MakeTrainer = Callable[..., Trainer]
SETTINGS = {"algorithm.name": "sdpo", "sampler.num_steps": 3}


@pytest.fixture
def make(make_trainer: MakeTrainer) -> MakeTrainer:
    """A trainer of SDPO on the consistency model, or with `ddim=True` on its teacher: 2 prompts, 4 pairs, 3 steps."""
    return lambda overrides=None, ddim=False: make_trainer(SETTINGS | (overrides or {}), ddim)
