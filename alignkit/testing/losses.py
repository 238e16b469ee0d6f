"""Promises of every loss: a mean over rows, repeatable, with a gradient to what it trains and to nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from alignkit.testing.expect import expect, global_rng_untouched, leaves
from alignkit.training.trainer import Trainer


def columns(value: Any) -> Any:
    """Return a dataclass of tensors as nested dicts."""
    if isinstance(value, Tensor | str | int | float | bool) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(key): columns(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [columns(item) for item in value]
    return {f.name: columns(getattr(value, f.name)) for f in fields(value)}


def the_loss_is_true(trainer: Trainer, rows: Any) -> None:
    """Raise AssertionError unless `Trainer.loss` keeps the promises of `Algorithm.loss` and `Regulariser.loss`."""
    ctx = trainer.ctx
    kept, state = leaves(columns(rows)), ctx.generator.get_state()
    with global_rng_untouched("in loss"), trainer.accelerator.autocast():
        (loss, metrics), (again, _) = trainer.loss(rows), trainer.loss(rows)
    expect(
        torch.equal(ctx.generator.get_state(), state),
        "loss used ctx.generator; sample where the rows are made, into the rows",
    )
    for name, value in {"loss": loss, **metrics}.items():
        expect(isinstance(value, Tensor) and value.dim() == 0, f"{name}: expected a scalar tensor, found {value!r:.40}")
        expect(math.isfinite(float(value.detach())), f"{name}: found {float(value.detach())}, expected a finite number")
    expect(float(loss.detach()) == float(again.detach()), "the same rows twice: found another loss, expected the same")
    expect(leaves(columns(rows)) == kept, "loss changed the rows that it was given, expected them unchanged")
    expect(loss.requires_grad, "loss has no gradient to the policy, expected one")
    others = [ctx.surrogate.module()] if ctx.surrogate is not None else []
    del loss, again
    assert_one_pass_is_several(trainer, rows)
    for module in others:
        expect(all(p.grad is None for p in module.parameters()), "loss left a gradient in the surrogate, expected none")


def the_surrogate_loss_is_a_mean(trainer: Trainer, rows: Any) -> None:
    """Raise AssertionError unless `surrogate_loss` is a mean over rows with a gradient to the surrogate alone."""
    surrogate = trainer.ctx.surrogate
    assert surrogate is not None
    module = surrogate.module()
    module.requires_grad_(True)
    found = []
    for size in (len(rows), 1):
        trainer.config = replace(trainer.config, train=replace(trainer.config.train, rows_per_pass=size))
        means = trainer._backward(rows, lambda part: (trainer.algorithm.surrogate_loss(part, trainer.ctx), {}))
        found.append(means["loss"])
        expect(any(p.grad is not None for p in module.parameters()), "surrogate_loss has no gradient to the surrogate")
        trained = [p for p in trainer.ctx.policy.parameters() if p.grad is not None and bool(p.grad.any())]
        expect(not trained, "surrogate_loss left a gradient in the policy, expected none")
        module.zero_grad()
    module.requires_grad_(False)
    expect(
        math.isclose(*found, rel_tol=1e-3, abs_tol=1e-4),
        f"surrogate_loss: found {found[0]:.6g} in one pass and {found[1]:.6g} row by row, expected a mean over rows",
    )


def assert_one_pass_is_several(trainer: Trainer, rows: Any, rel: float = 1e-4) -> float:
    """Check that one pass of all rows has the loss and the gradient of several passes of fewer; returns that loss.

    `rows` are the algorithm's, or an update with those of the regularisers.
    """
    found = []
    for size in (len(rows), 3, 1):
        trainer.config = replace(trainer.config, train=replace(trainer.config.train, rows_per_pass=size))
        means = trainer._backward(rows, trainer.loss)
        gradients = [p.grad.flatten() for p in trainer.ctx.policy.parameters() if p.grad is not None]
        expect(bool(gradients), "loss leaves no gradient in the policy, expected one")
        found.append((means["loss"], torch.cat(gradients).clone()))
        trainer.optimizer.zero_grad()
    (loss, whole), *parts = found
    largest = float(whole.abs().max())
    expect(0 < largest < math.inf, f"loss: found a gradient to the policy of size {largest}, expected one above 0")
    for mean, summed in parts:
        expect(
            math.isclose(mean, loss, rel_tol=rel, abs_tol=1e-4),
            f"loss: found {loss:.6g} in one pass and {mean:.6g} in several, expected a mean over rows",
        )
        apart = float((summed - whole).abs().max()) / largest
        expect(apart <= 2e-3, f"the gradient of several passes is {apart:.1%} away from that of one, expected the same")
    return loss
