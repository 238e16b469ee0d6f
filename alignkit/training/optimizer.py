"""One step of an optimizer on gradients averaged over processes, and the learning rate of each update."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from alignkit.config.sections import TrainConfig
from alignkit.errors import AlignkitError


def adamw(
    accelerator: Accelerator, parameters: Sequence[torch.nn.Parameter], learning_rate: float, weight_decay: float
) -> AcceleratedOptimizer:
    """Return AdamW for `parameters`, prepared for this precision."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    prepared: AcceleratedOptimizer = accelerator.prepare(optimizer)
    return prepared


def step(
    accelerator: Accelerator,
    optimizer: AcceleratedOptimizer,
    parameters: Sequence[torch.nn.Parameter],
    max_norm: float,
    update: int,
) -> float:
    """Average gradients over processes, clip them to `max_norm` and step; returns their norm before clipping.

    Raises AlignkitError, which names the `update`, if the norm is not finite and no loss scaling will skip the step.
    """
    learned = [p for p in parameters if p.grad is not None]
    if accelerator.num_processes > 1:
        # By hand and not by DDP: one update may hold several forward passes, through different entry points.
        for parameter in learned:
            parameter.grad = accelerator.reduce(parameter.grad, "mean")
    accelerator.unscale_gradients(optimizer)
    norm = float(torch.nn.utils.clip_grad_norm_(learned, max_norm))
    if accelerator.scaler is None and not math.isfinite(norm):
        raise AlignkitError(
            f"train: the gradient of update {update} is not finite; lower the learning rate, or set "
            f'train.precision = "no" (found "{accelerator.mixed_precision}")'
        )
    optimizer.step()
    optimizer.zero_grad()
    return norm


def learning_rate(train: TrainConfig, done: int) -> float:
    """Return the learning rate after `done` updates, by the schedules of transformers."""
    if done < train.warmup:
        return train.learning_rate * done / train.warmup
    passed = (done - train.warmup) / max(1, train.updates - train.warmup)
    falling = {"constant": 1.0, "linear": 1 - passed, "cosine": (1 + math.cos(math.pi * passed)) / 2}
    return train.learning_rate * falling[train.schedule]
