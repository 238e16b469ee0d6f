"""How the learning rate changes over a run."""

from __future__ import annotations

import math

from alignkit.sections import TrainConfig


def learning_rate(train: TrainConfig, done: int) -> float:
    """The learning rate behind `done` updates, as the schedules of transformers have it."""
    if done < train.warmup:
        return train.learning_rate * done / train.warmup
    passed = (done - train.warmup) / max(1, train.updates - train.warmup)
    falling = {"constant": 1.0, "linear": 1 - passed, "cosine": (1 + math.cos(math.pi * passed)) / 2}
    return train.learning_rate * falling[train.schedule]
