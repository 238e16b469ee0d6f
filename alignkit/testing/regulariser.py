"""Promises of every regulariser, checked in the loop that trains with it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from alignkit.interfaces import Algorithm, Context, Regulariser, Sampler
from alignkit.models.quiet import errors_only
from alignkit.records import Batch, PolicyFacts, Prompt, Rows
from alignkit.testing.algorithm import assert_goes_on_from_its_checkpoint, tiny_trainer, two_steps
from alignkit.testing.expect import about, expect, global_rng_untouched, leaves
from alignkit.testing.losses import columns, the_loss_is_true
from alignkit.testing.world import Form
from alignkit.training.trainer import Trainer

NEEDS = {"teacher", "images", "predictions"}


@dataclass(frozen=True)
class Latents(Rows):
    """Random latents at random steps of the sampler, N rows."""

    x: Tensor
    """(N, *S)"""
    k: Tensor
    """(N,)"""
    prompt: Prompt


@dataclass
class Idle(Algorithm[Prompt, Latents]):
    """Predict with a loss of 0, so that the total loss is the regulariser's alone."""

    uses_rewards: ClassVar[bool] = False

    def collect(self, batch: Batch, ctx: Context) -> Prompt:
        return ctx.policy.encode([example.text for example in batch.examples])

    def updates(self, collected: Prompt, ctx: Context) -> Iterator[Latents]:
        count = ctx.rows_per_update
        k = torch.randint(ctx.sampler.num_steps, (count,), generator=ctx.generator).to(ctx.policy.device)
        yield Latents(ctx.noise(count), k, collected.select(torch.arange(count) % len(collected)))

    def loss(self, rows: Latents, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        clean = ctx.sampler.transition(ctx.policy, rows.x, rows.k, rows.prompt).clean
        return 0 * clean.mean(), {}


def check_regulariser(
    regulariser: Regulariser[Any, Any], sampler: Sampler | None = None, *, form: Form = "lcm"
) -> None:
    """Raise AssertionError, in one line, for the first promise of `alignkit.interfaces.Regulariser` that is not kept.

    It trains an untrained pipeline of this `form` for a few rounds with the regulariser alone and `sampler` (by default
    the registered `lcm` at 2 steps). Raises ConfigError where the regulariser refuses the sampler.
    """
    sampler = two_steps() if sampler is None else sampler
    name = type(regulariser).__name__
    with (
        about(f"regulariser {name} with sampler {type(sampler).__name__} on {form}"),
        errors_only(),
        torch.random.fork_rng(),
    ):
        unknown = set(regulariser.needs) - NEEDS
        expect(not unknown, f"needs: found {sorted(unknown)}, expected only {', '.join(sorted(NEEDS))}")
        regulariser.check(sampler, PolicyFacts())

        def make(settings: Mapping[str, Any] | None = None) -> Trainer:
            torch.manual_seed(0)
            return _moved(tiny_trainer(Idle(), sampler, form=form, regularisers=[(name, 1.0, regulariser)]))

        _a_round_taken_apart(make())
        with tempfile.TemporaryDirectory() as folder:
            assert_goes_on_from_its_checkpoint(make, {}, Path(folder))


def _moved(trainer: Trainer) -> Trainer:
    """Return the trainer with its policy moved away from the initial model, at which a term may be 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.ctx.policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return trainer


def _a_round_taken_apart(trainer: Trainer) -> None:
    """Run collect, rows and loss of one round separately."""
    batch, ctx = trainer.batch(), trainer.ctx
    kept = leaves(columns(batch))
    with torch.no_grad(), trainer.accelerator.autocast():
        collected = trainer.algorithm.collect(batch, ctx)
        with global_rng_untouched("in collect"):
            trainer.regularisers.collect(batch, ctx)
    expect(leaves(columns(batch)) == kept, "collect changed the batch that it was given, expected it unchanged")
    with global_rng_untouched("in rows"):
        (rows,) = trainer._updates(collected)
    the_loss_is_true(trainer, rows)
