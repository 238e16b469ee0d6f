"""The loop: batch, collect, rows, loss, update. The only home of accelerate."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from torch import Tensor

from alignkit.config import RunConfig
from alignkit.data import Pictures, Stream, examples_at, slice_of
from alignkit.errors import AlignkitError
from alignkit.interfaces import Algorithm, Batch, Context, Example, Policy, Rows, Sampler, Scores, Surrogate
from alignkit.rewards import WeightedRewards

RowsT = TypeVar("RowsT")

IDLE_ROUNDS = 10
"""A run that draws and scores this often without anything to learn from would do so for ever."""


@dataclass(frozen=True)
class Update:
    """One finished update of the policy."""

    step: int
    """1, 2, ..."""
    metrics: Mapping[str, float]

    @property
    def reward(self) -> float:
        """Mean true reward of what was drawn for this update; NaN if nothing was scored for it."""
        return self.metrics.get("reward", math.nan)


class TrainContext(Context):
    """The core's side of `Context`."""

    def __init__(
        self,
        accelerator: Accelerator,
        policy: Policy,
        teacher: Policy | None,
        sampler: Sampler,
        rewards: WeightedRewards,
        surrogate: Surrogate | None,
        seed: int,
        rows_per_update: int,
        chunk: int,
    ) -> None:
        self.accelerator = accelerator
        self.policy, self.teacher, self.sampler, self.surrogate = policy, teacher, sampler, surrogate
        self._rewards, self._chunk = rewards, chunk
        self.generator = torch.Generator().manual_seed(seed * 1000 + accelerator.process_index)
        self.rows_per_update = rows_per_update
        self.update = 0
        self.warming_up = False
        self.pictures = 0
        """Pictures scored since `take_pictures`."""
        self.warnings: list[str] = []
        self._metrics: dict[str, list[float]] = defaultdict(list)

    def noise(self, count: int) -> Tensor:
        return torch.randn((count, *self.policy.latent_shape), generator=self.generator).to(self.policy.device)

    @torch.no_grad()
    def score(self, latents: Tensor, examples: Sequence[Example]) -> Scores:
        # In the precision that decoder and rewards were loaded in, as when the run is measured.
        with torch.autocast(self.policy.device.type, enabled=False):
            images = torch.cat([self.policy.decode(part) for part in torch.split(latents, self._chunk)])
            scores = self._rewards.score(images, examples, self._chunk)
        self.pictures += len(images) * self.accelerator.num_processes
        if bool(scores.valid.any()):
            self.log(reward=scores.values[scores.valid].mean())
            for name, values in scores.parts.items():
                self.log(**{f"reward/{name}": values[scores.valid].mean()})
        return scores

    def differentiable_score(self, latents: Tensor, examples: Sequence[Example]) -> Scores:
        self.pictures += len(latents) * self.accelerator.num_processes
        return self._rewards(self.policy.decode(latents), examples)

    def gather(self, values: Tensor) -> Tensor:
        gathered: Tensor = self.accelerator.gather(values)
        return gathered

    def log(self, **metrics: float | Tensor) -> None:
        for name, value in metrics.items():
            self._metrics[name].append(float(value))

    def warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)

    def take_pictures(self) -> int:
        """Pictures that were scored since the last call, over all processes."""
        count, self.pictures = self.pictures, 0
        return count

    def take_metrics(self) -> dict[str, float]:
        """Means over the values logged since the last call, and over processes."""
        logged = [(name, value) for name, values in self._metrics.items() for value in values]
        self._metrics.clear()
        # As objects: a process may have nothing to say about a metric, such as pairs when all its rewards are tied.
        together: dict[str, list[float]] = defaultdict(list)
        for name, value in gather_object(logged):
            together[name].append(value)
        return {name: sum(values) / len(values) for name, values in sorted(together.items())}


class Trainer:
    """One run's state, and the generator that advances it. `config.train` and `config.surrogate` set the rest."""

    def __init__(
        self,
        config: RunConfig,
        ctx: TrainContext,
        algorithm: Algorithm[Any, Any],
        examples: Sequence[Example],
        pictures: Pictures | None,
        skipped: list[str] | None = None,
    ) -> None:
        """`skipped` is where `pictures` notes what it skips as broken."""
        self.config, self.ctx, self.algorithm = config, ctx, algorithm
        self.accelerator = ctx.accelerator
        self._examples, self._pictures, self._skipped = examples, pictures, skipped
        self._stream = Stream(len(examples), config.seed)
        train = config.train
        self.optimizer = self._optimizer(ctx.policy.parameters(), train.learning_rate, train.weight_decay)
        self.average = {name: p.detach().clone() for name, p in ctx.policy.weights().items()}
        self.surrogate_optimizer: AcceleratedOptimizer | None = None
        if ctx.surrogate is not None and config.surrogate is not None:
            parameters = list(ctx.surrogate.module().parameters())
            self.surrogate_optimizer = self._optimizer(
                parameters, config.surrogate.learning_rate, config.surrogate.weight_decay
            )
        self.batches = 0
        """Finished rounds."""
        self._idle = 0
        """Rounds since the last update."""

    def _optimizer(self, parameters: list[torch.nn.Parameter], lr: float, decay: float) -> AcceleratedOptimizer:
        prepared: AcceleratedOptimizer = self.accelerator.prepare(
            torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)
        )
        return prepared

    def batch(self) -> Batch:
        """The next texts, and pictures if the algorithm needs them; each process reads its own."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        start, size = slice_of(self.batches, self.config.data.batch_size, rank, processes)
        examples = examples_at(self._examples, self._stream, start, size)
        if self._pictures is None:
            return Batch(examples)
        start, size = slice_of(self.batches, self.config.train.rows_per_update, rank, processes)
        pictures, captions = self._pictures.batch(start, size, self.config.seed)
        if self._skipped is not None:
            for what in gather_object(list(self._skipped)):
                self.ctx.warn(f"data: skipped as broken: {what}")
            self._skipped.clear()
        return Batch(examples, pictures.to(self.ctx.policy.device), captions)

    @property
    def finished(self) -> bool:
        return self.ctx.update >= self.config.train.updates and not self.warming_up

    @property
    def warming_up(self) -> bool:
        """Whether the next round teaches the surrogate alone."""
        return self.config.surrogate is not None and self.batches < self.config.surrogate.warmup

    def round(self) -> Iterator[Update]:
        """Collect once and learn from it; yields behind each update of the policy, or once in the warm-up (step 0)."""
        algorithm, ctx, warming_up, before = self.algorithm, self.ctx, self.warming_up, self.ctx.update
        ctx.warming_up = warming_up
        # Under the precision of the loss: likelihoods of then and now are compared.
        with torch.no_grad(), self.accelerator.autocast():
            collected = algorithm.collect(self.batch(), ctx)
        self.batches += 1
        self._update_surrogate(collected)
        if warming_up:
            yield Update(0, ctx.take_metrics())
            return
        for rows in self._together(self._in_precision(algorithm.updates(collected, ctx))):
            self._update_policy(rows)
            yield Update(ctx.update, ctx.take_metrics())
            if self.finished:
                return
        self._idle = 0 if ctx.update > before else self._idle + 1
        if self._idle >= IDLE_ROUNDS:
            raise AlignkitError(
                f"train: {IDLE_ROUNDS} rounds in a row gave algorithm {self.config.algorithm.name} nothing to learn "
                "from: no picture could be scored, or no two were told apart; try the reward with alignkit score, or "
                "draw more pictures of each prompt"
            )

    def _in_precision(self, updates: Iterator[RowsT]) -> Iterator[RowsT]:
        """The updates, made in the precision of the loss: a log-probability that is kept for comparison must not
        differ from the loss's own by rounding."""
        while True:
            with self.accelerator.autocast():
                rows = next(updates, None)
            if rows is None:
                return
            yield rows

    def _together(self, updates: Iterator[RowsT]) -> Iterator[RowsT]:
        """The updates, as long as every process has one: gradients are averaged over all of them."""
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

    def _update_policy(self, rows: Rows) -> None:
        train = self.config.train
        metrics = self._backward(rows, lambda part: self.algorithm.loss(part, self.ctx))
        norm = self._step(self.optimizer, self.ctx.policy.parameters(), train.max_grad_norm)
        with torch.no_grad():
            for name, parameter in self.ctx.policy.weights().items():
                self.average[name].lerp_(parameter, 1 - train.ema_decay)
        self.ctx.update += 1
        self.algorithm.after_update(self.ctx)
        self.ctx.log(grad_norm=norm, **metrics)

    def _backward(self, rows: Rows, loss: Callable[[Any], tuple[Tensor, dict[str, Tensor]]]) -> dict[str, float]:
        """Gradients of the mean loss over `rows`, a few rows a pass; returns the means of loss and metrics."""
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
        """One optimizer step on gradients averaged over processes; returns their norm before clipping."""
        learned = [p for p in parameters if p.grad is not None]
        if self.accelerator.num_processes > 1:
            # By hand and not by DDP: one update may hold several forward passes, through different entry points.
            for parameter in learned:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        self.accelerator.unscale_gradients(optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(learned, max_norm))
        if self.accelerator.scaler is None and not math.isfinite(norm):
            raise AlignkitError(
                f"train: the gradient of update {self.ctx.update + 1} is not finite; lower the learning rate, or set "
                f'train.precision = "no" (found "{self.config.train.precision}")'
            )
        optimizer.step()
        optimizer.zero_grad()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """All that the next update depends on and that every process holds."""
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
        """What differs between processes: chance, and what the algorithm keeps of its own samples."""
        return {
            "algorithm": self.algorithm.state_dict(),
            "generator": self.ctx.generator.get_state(),
            "warnings": list(self.ctx.warnings),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The reverse of `state_dict`."""
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
        """The reverse of `rank_state`."""
        self.algorithm.load_state_dict(state["algorithm"])
        self.ctx.generator.set_state(state["generator"])
        # What was found while this process loaded may be new.
        self.ctx.warnings = list(dict.fromkeys([*state["warnings"], *self.ctx.warnings]))
