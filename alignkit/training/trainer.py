"""A round: batch, collect, rows, loss, update; and what a checkpoint keeps of it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object

from alignkit.config.load import RunConfig
from alignkit.data.sources import Images, Preferences
from alignkit.data.stream import Stream, examples_at, slice_of
from alignkit.errors import AlignkitError, ConfigError
from alignkit.interfaces import Algorithm
from alignkit.records import Batch, Example, PreferencePairs, Rows
from alignkit.training import checkpoint
from alignkit.training.context import TrainContext
from alignkit.training.optimizer import adamw, learning_rate, step
from alignkit.training.regularisers import Loss, Regularisers, UpdateRows, Weighed
from alignkit.training.update import Update

RowsT = TypeVar("RowsT")

IDLE_ROUNDS = 10
"""Abort after this many consecutive rounds without training rows."""
PAIRS_AT_ONCE = 32
"""Preference pairs in memory as images: an update of Diffusion-DPO has 2048, of SDXL 25 MB each."""


class Trainer:
    """The state of one run, and the rounds that advance it, as `config.train` and `config.surrogate` say."""

    def __init__(
        self,
        config: RunConfig,
        ctx: TrainContext,
        algorithm: Algorithm[Any, Any],
        examples: Sequence[Example],
        images: Images | None,
        pairs: Preferences | None = None,
        skipped: list[str] | None = None,
        regularisers: Sequence[Weighed] = (),
    ) -> None:
        """`images` and `pairs` note in `skipped` what they skip as broken; `regularisers` are (name, weight,
        regulariser)."""
        self.config, self.ctx, self.algorithm = config, ctx, algorithm
        self.regularisers = Regularisers(regularisers)
        self.accelerator = ctx.accelerator
        self._examples, self._images, self._pairs, self._skipped = examples, images, pairs, skipped
        self._stream = Stream(len(examples), config.seed)
        train = config.train
        self.optimizer = adamw(self.accelerator, ctx.policy.parameters(), train.learning_rate, train.weight_decay)
        self.average = {name: p.detach().clone() for name, p in ctx.policy.weights().items()}
        self.surrogate_optimizer: AcceleratedOptimizer | None = None
        if ctx.surrogate is not None and config.surrogate is not None:
            parameters = list(ctx.surrogate.module().parameters())
            taught = config.surrogate
            self.surrogate_optimizer = adamw(self.accelerator, parameters, taught.learning_rate, taught.weight_decay)
        self.batches = 0
        """Finished rounds."""
        self._idle = 0
        """Rounds since the last update."""
        self._round_start: dict[str, Any] | None = None

    def batch(self) -> Batch:
        """Read the next texts, and images or pairs where the run has them; each process reads its own."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        start, size = slice_of(self.batches, self.config.data.batch_size, rank, processes)
        batch = Batch(examples_at(self._examples, self._stream, start, size) if self._examples else ())
        start, size = slice_of(self.batches, self.config.train.rows_per_update, rank, processes)
        if self._images is not None:
            images, captions = self._images.batch(start, size, self.config.seed)
            examples = [Example.of(caption) for caption in captions]
            batch = replace(batch, images=images.to(self.ctx.policy.device), captions=examples)
        return batch if self._pairs is None else replace(batch, pairs=self._some_pairs(self._pairs, start, size))

    def _some_pairs(self, pairs: Preferences, start: int, size: int) -> Iterator[PreferencePairs]:
        for at in range(start, start + size, PAIRS_AT_ONCE):
            yield pairs.batch(at, min(PAIRS_AT_ONCE, start + size - at), self.config.seed)

    def _report_skipped(self) -> None:
        """Warn of the images and pairs that the round found broken."""
        if self._skipped is not None:
            # The process that writes the record warns for all.
            for what in gather_object(list(self._skipped)):
                self.ctx.warn(f"data: skipped as broken: {what}")
            self._skipped.clear()

    @property
    def finished(self) -> bool:
        return self.ctx.update >= self.config.train.updates and not self.warming_up

    @property
    def warming_up(self) -> bool:
        """Whether the next round trains the surrogate alone."""
        return self.config.surrogate is not None and self.batches < self.config.surrogate.warmup

    def round(self) -> Iterator[Update]:
        """Collect once and train on it; yields after each update of the policy, or once in the warm-up (step 0)."""
        algorithm, ctx, warming_up, before = self.algorithm, self.ctx, self.warming_up, self.ctx.update
        ctx.warming_up = warming_up
        self._round_start = self._own_state()
        ctx.begin_round()
        # In the precision of the loss, which compares likelihoods with those of now.
        with torch.no_grad(), self.accelerator.autocast():
            batch = self.batch()
            collected = algorithm.collect(batch, ctx)
            if not warming_up:
                self.regularisers.collect(batch, ctx)
        self._report_skipped()
        self.batches += 1
        self._round_start = None
        self._update_surrogate(collected)
        if warming_up:
            metrics = ctx.take_metrics()
            yield Update(0, metrics, metrics.get("reward", math.nan))
            return
        reward = math.nan
        for rows in self._together(self._updates(collected)):
            self._update_policy(rows)
            metrics = ctx.take_metrics()
            reward = metrics.get("reward", reward)
            yield Update(ctx.update, metrics, reward)
            if self.finished:
                return
        self._idle = 0 if ctx.update > before else self._idle + 1
        if self._idle >= IDLE_ROUNDS:
            raise AlignkitError(
                f"train: {IDLE_ROUNDS} rounds in a row gave algorithm {self.config.algorithm.name} nothing to learn "
                f"from: {ctx.why_idle()}"
            )

    def _in_precision(self, updates: Iterator[RowsT]) -> Iterator[RowsT]:
        """Yield the updates, made in the precision of the loss: a log-probability that is kept for comparison must
        not differ from the loss's own by rounding."""
        while True:
            with self.accelerator.autocast():
                rows = next(updates, None)
            if rows is None:
                return
            yield rows

    def _updates(self, collected: Any) -> Iterator[UpdateRows]:
        """Yield the rows of each update of the policy, those of the regularisers included."""
        own = self.algorithm.updates(collected, self.ctx)
        return self._in_precision(self.regularisers.rows(rows, self.ctx) for rows in own)

    def _together(self, updates: Iterator[RowsT]) -> Iterator[RowsT]:
        """Yield the updates as long as every process has one: gradients are averaged over all of them."""
        for rows in chain(updates, [None]):
            if not all(gather_object([rows is not None])) or rows is None:
                return
            yield rows

    def _update_surrogate(self, collected: Any) -> None:
        if self.surrogate_optimizer is None or self.ctx.surrogate is None or self.config.surrogate is None:
            return
        module = self.ctx.surrogate.module()
        for part in self._together(self.algorithm.surrogate_updates(collected, self.ctx)):
            module.requires_grad_(True)
            losses = self._backward(part, lambda rows: (self.algorithm.surrogate_loss(rows, self.ctx), {}))
            norm = self._step(self.surrogate_optimizer, list(module.parameters()), self.config.surrogate.max_grad_norm)
            # Frozen while the policy learns: gradient flows through it to the latents, none into it.
            module.requires_grad_(False)
            self.ctx.log(surrogate_loss=losses["loss"], surrogate_grad_norm=norm)

    def loss(self, rows: Rows | UpdateRows) -> Loss:
        """Compute the loss of one pass: of an algorithm's rows, or of an update with those of the regularisers."""
        if isinstance(rows, UpdateRows):
            return self.regularisers.loss(rows, self.ctx, self.algorithm.loss)
        return self.algorithm.loss(rows, self.ctx)

    def _update_policy(self, rows: Rows | UpdateRows) -> None:
        train = self.config.train
        rate = learning_rate(train, self.ctx.update)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if train.warmup or train.schedule != "constant":
            self.ctx.log(learning_rate=rate)
        metrics = self._backward(rows, self.loss)
        norm = self._step(self.optimizer, self.ctx.policy.parameters(), train.max_grad_norm)
        with torch.no_grad():
            for name, parameter in self.ctx.policy.weights().items():
                self.average[name].lerp_(parameter, 1 - train.ema_decay)
        self.ctx.update += 1
        self.algorithm.after_update(self.ctx)
        self.regularisers.after_update(self.ctx)
        self.ctx.log(grad_norm=norm, **metrics)

    def _backward(self, rows: Rows | UpdateRows, loss: Callable[[Any], Loss]) -> dict[str, float]:
        """Add up gradients of the mean loss over `rows`, a few rows a pass; returns the means of loss and metrics."""
        means: dict[str, float] = defaultdict(float)
        for part in rows.split(self.config.train.rows_per_pass):
            with self.accelerator.autocast():
                value, metrics = loss(part)
            share = len(part) / len(rows)
            self.accelerator.backward(value * share)
            for name, metric in {"loss": value, **metrics}.items():
                means[name] += share * float(metric.detach())
        return means

    def _step(self, optimizer: AcceleratedOptimizer, parameters: list[torch.nn.Parameter], max_norm: float) -> float:
        return step(self.accelerator, optimizer, parameters, max_norm, self.ctx.update + 1)

    @property
    def interrupted(self) -> bool:
        """Whether a round broke off while it was collected, before any update. `save` then writes the state in which
        the round began, so that a resumed run collects it again, the same to the bit."""
        alone = self.accelerator.num_processes == 1
        return self._round_start is not None and (alone or self.ctx.failed_together)

    def _own_state(self) -> dict[str, Any]:
        return {"trainer": self.rank_state(), "rng": checkpoint.rng_state()}

    def save(self, folder: Path, run: Mapping[str, Any]) -> None:
        """Write a checkpoint into `folder`: the state of all processes, and `run`, which `restore` returns."""
        ranks = gather_object([self._round_start or self._own_state()])
        if self.accelerator.is_main_process:
            state = {"trainer": self.state_dict(), "ranks": ranks, "run": run}
            checkpoint.save(folder, self.ctx.update, state, self.config.train.keep_checkpoints)

    def restore(self, path: Path) -> dict[str, Any]:
        """Restore the checkpoint at `path`; returns its `run`.

        Raises ConfigError if another number of processes saved it, AlignkitError if it is damaged.
        """
        state = checkpoint.load(path)
        found, expected = self.accelerator.num_processes, len(state["ranks"])
        if found != expected:
            raise ConfigError(f"{path}: saved by {expected} processes, resumed by {found}; resume with {expected}")
        self.load_state_dict(state["trainer"])
        own = state["ranks"][self.accelerator.process_index]
        self.load_rank_state(own["trainer"])
        checkpoint.restore_rng(own["rng"])
        run: dict[str, Any] = state["run"]
        return run

    def state_dict(self) -> dict[str, Any]:
        """Return the state that all processes share and the next update depends on."""
        surrogate = self.ctx.surrogate
        return {
            "update": self.ctx.update,
            "batches": self.batches,
            "policy": dict(self.ctx.policy.weights()),
            "average": dict(self.average),
            "optimizer": self.optimizer.state_dict(),
            "surrogate": surrogate.module().state_dict() if surrogate else None,
            "surrogate_optimizer": self.surrogate_optimizer.state_dict() if self.surrogate_optimizer else None,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }

    def rank_state(self) -> dict[str, Any]:
        """Return the state that differs between processes: RNG, algorithm and regularisers."""
        return {
            "algorithm": self.algorithm.state_dict(),
            "regularisers": self.regularisers.state_dict(),
            "context": self.ctx.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.ctx.update, self.batches = state["update"], state["batches"]
        own = self.ctx.policy.weights()
        with torch.no_grad():
            for name, value in state["policy"].items():
                own[name].copy_(value)
            for name, value in state["average"].items():
                self.average[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ctx.surrogate is not None and self.surrogate_optimizer is not None:
            self.ctx.surrogate.module().load_state_dict(state["surrogate"])
            self.surrogate_optimizer.load_state_dict(state["surrogate_optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def load_rank_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `rank_state` returned."""
        self.algorithm.load_state_dict(state["algorithm"])
        self.regularisers.load_state_dict(state["regularisers"])
        self.ctx.load_state_dict(state["context"])
