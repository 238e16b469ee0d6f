"""Checks that the tests of several methods share, and the steps of a round one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import alignkit
from alignkit.training.regularisers import UpdateRows
from alignkit.training.trainer import Trainer


def collect(trainer: Trainer) -> Any:
    """Collect the next round as the trainer does; returns what the algorithm collected."""
    trainer.ctx.warming_up = trainer.warming_up
    with torch.no_grad(), trainer.accelerator.autocast():
        batch = trainer.batch()
        collected = trainer.algorithm.collect(batch, trainer.ctx)
        trainer.regularisers.collect(batch, trainer.ctx)
    trainer.batches += 1
    return collected


def updates(trainer: Trainer, collected: Any = None) -> list[Any]:
    """Return the algorithm's rows of each update of what was collected, by default of the next round."""
    collected = collect(trainer) if collected is None else collected
    return list(trainer._in_precision(trainer.algorithm.updates(collected, trainer.ctx)))


def whole_updates(trainer: Trainer) -> list[UpdateRows]:
    """Return the rows of each update of the next round, those of the regularisers included."""
    return list(trainer._updates(collect(trainer)))


def number(value: Tensor) -> float:
    return float(value.detach())


def gradient(trainer: Trainer, value: Tensor) -> Tensor:
    """Return the gradient of `value` with respect to all that is trained, flat."""
    parameters = trainer.ctx.policy.parameters()
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, materialize_grads=True)])


def copies(parameters: Any) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def toy_images(trainer: Trainer, scale: float = 20) -> None:
    """Make the images those of which the reward grows with the first three channels of the latent."""
    trainer.ctx.policy.decode = lambda latents: (latents[:, :3] / scale).sigmoid()  # type: ignore[method-assign]


def assert_the_true_reward_rises(trainer: Trainer, scale: float = 20) -> list[float]:
    """Training raises the toy reward, of which the method sees the values alone.

    Returns the rewards of all rounds but those of a surrogate's warm-up.
    """
    toy_images(trainer, scale)
    rewards = []
    while not trainer.finished:
        rewards += [u.reward for u in trainer.round() if u.step and "reward" in u.metrics]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.02
    return rewards


def assert_a_stopped_run_ends_with_the_same_bits(tiny_run: Any, settings: Mapping[str, Any]) -> None:
    """Check that a run stopped after its first update and resumed has the metrics and the file of an unbroken one."""
    whole, stopped = tiny_run("whole", settings), tiny_run("stopped", settings)
    metrics = [dict(u.metrics) for u in whole.train()]
    for update in stopped.train():
        if update.step == 1:
            stopped.stop()
    assert [dict(u.metrics) for u in alignkit.load(resume=stopped.folder).train()] == metrics[1:]
    (file,) = whole.folder.glob("*.safetensors")
    assert file.read_bytes() == (stopped.folder / file.name).read_bytes()
