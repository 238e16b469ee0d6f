"""The loop of a run: rounds, with evaluations and checkpoints between them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console

from alignkit.errors import AlignkitError
from alignkit.evaluation.measure import Measurement, compare, measure
from alignkit.rewards.combine import Combination
from alignkit.runs.build import Parts, facts_of
from alignkit.runs.folder import export
from alignkit.runs.report import Report
from alignkit.training.context import TrainContext
from alignkit.training.trainer import Trainer, Update

SCORES = "scores.sqlite"
"""The file of a run folder that keeps scores of black boxes."""
GRID = 8
"""Prompts in an image grid."""


class Loop:
    """Rounds until the last update, with evaluation, images and checkpoints between them."""

    def __init__(self, parts: Parts, folder: Path, accelerator: Accelerator) -> None:
        """Load all that training needs. Raises AlignkitError for what the user can fix."""
        self.parts, self.folder, self.config, self.accelerator = parts, folder, parts.config, accelerator
        # Initial weights of adapters and heads come from torch's global generator, which is the caller's.
        with torch.random.fork_rng():
            torch.manual_seed(parts.config.seed)
            self._load()
        self.examples = parts.held_out()
        self._before: Measurement | None = None
        """The evaluation before training."""
        self._lines = 0
        """Lines of the record that a resumed run keeps."""
        self._unmeasured = False
        """Whether the run broke off during an evaluation, which is still due."""

    def _load(self) -> None:
        parts, config, accelerator = self.parts, self.config, self.accelerator
        algorithm = parts.algorithm()
        policy = parts.load_policy(accelerator.device)
        parts.check_methods(facts_of(policy))
        teacher = parts.load_teacher(accelerator.device)
        surrogate = parts.load_surrogate(policy)
        scoring = parts.scoring(self.folder / SCORES, lambda message: ctx.warn(message))
        self.rewards = parts.with_measured(scoring=scoring)
        self.rewards.load(accelerator.device)
        self._identities = self.rewards.identities()
        ctx = TrainContext(
            accelerator=accelerator,
            policy=policy,
            teacher=teacher,
            sampler=parts.sampler(),
            surrogate=surrogate,
            rewards=self.rewards.trained_only(),
            combination=Combination(config.rewards, config.scoring, gather_object),
            seed=config.seed,
            rows_per_update=config.train.rows_per_update,
            chunk=config.evaluate.batch_size,
        )
        skipped = parts.skipped()
        prompts = parts.prompts(skipped)
        images, pairs = parts.images(policy.image_size, skipped), parts.pairs(policy.image_size, skipped)
        if skipped:
            ctx.warn(f"data: {len(skipped)} skipped as broken: {'; '.join(skipped)}")
            skipped.clear()
        for note in pairs.notes if pairs is not None else ():
            ctx.warn(note)
        for warning in parts.warnings():
            ctx.warn(warning)
        self.policy = policy
        self.trainer = Trainer(config, ctx, algorithm, prompts, images, pairs, skipped, parts.regularisers())
        algorithm.setup(ctx)
        self.trainer.regularisers.setup(ctx)
        if config.train.trackers:
            accelerator.init_trackers("alignkit", config=dict(_flat(asdict(config))))

    def restore(self, saved: Path) -> None:
        """Restore the checkpoint `saved`. Raises ConfigError if a reward's identity differs from that of then."""
        state = self.trainer.restore(saved)
        self.rewards.check_identities(state["rewards"], f"{saved} was saved")
        if state["before"]:
            self._before = Measurement.from_state(state["before"])
        self._lines, self._unmeasured = state["lines"], state["unmeasured"]

    def updates(self, console: Console | None, stopping: Callable[[], bool]) -> Iterator[Update]:
        """Train to the end, or until `stopping`, and save; yields after each update of the policy."""
        main = self.accelerator.is_main_process
        with Report(self.folder, console, self.config.train.updates, self._lines, writes=main) as report:
            if departure := self.parts.departure():
                report.note(departure)
            for message in self.trainer.ctx.warnings:
                report.warn(message)
            if self._before is None and self.examples:
                with self._stopping_well(None):
                    self._before = self._measure()
                report.evaluation(0, compare(self._before, held_out=self.rewards.held_out))
            while not self.trainer.finished:
                yield from self._round(report, stopping)
                if stopping():
                    return
            with self._stopping_well(None):  # before what else may fail
                if main:
                    export(self.folder, self.policy, self.trainer.average, self.trainer.ctx.surrogate)
            if self._before is not None:
                with self._stopping_well(None):
                    after = self._measure()
                self._show(report, self._before, after)

    def close(self) -> None:
        """Close rewards and trackers."""
        self.rewards.close()
        self.accelerator.end_training()

    def _round(self, report: Report, stopping: Callable[[], bool]) -> Iterator[Update]:
        """Run one round, and the evaluation and checkpoint that are due after it."""
        config, trainer, ctx = self.config, self.trainer, self.trainer.ctx
        warmup = config.surrogate.warmup if config.surrogate else 0
        warming_up, last = trainer.warming_up, ctx.update
        with self._stopping_well(lambda: self._save(report) if trainer.interrupted else None, agreeing=False):
            for update in () if self._unmeasured else trainer.round():
                report.update(update.step, update.metrics, ctx.take_images())
                for message in ctx.warnings:
                    report.warn(message)
                step = trainer.batches if warming_up else warmup + update.step
                self.accelerator.log(dict(update.metrics), step=step)
                if not warming_up:
                    yield update
        due = self._unmeasured or _due(config.evaluate.every, last, ctx.update)
        if due and not trainer.finished and self._before is not None:
            with self._stopping_well(lambda: self._save(report, unmeasured=True)):
                after = self._measure()
            self._show(report, self._before, after)
        warmed_up = warming_up and not trainer.warming_up
        saving = self._unmeasured or warmed_up or _due(config.train.checkpoint_every, last, ctx.update)
        self._unmeasured = False
        if saving or stopping() or trainer.finished:
            self._save(report)

    def _save(self, report: Report, unmeasured: bool = False) -> None:
        state = {
            "before": self._before.state_dict() if self._before else None,
            "lines": report.lines,
            "unmeasured": unmeasured,
            "rewards": self._identities,
        }
        self.trainer.save(self.folder / "checkpoints", state)

    @contextmanager
    def _stopping_well(self, save: Callable[[], None] | None, agreeing: bool = True) -> Iterator[None]:
        """Add to an AlignkitError of the block how to resume the run, after calling `save`.

        With `agreeing`, an error in one process is raised in all; without, the block has seen to that.
        """
        refused: AlignkitError | None = None
        try:
            yield
        except AlignkitError as error:
            refused = error
        if agreeing:
            refused = next((error for error in gather_object([refused]) if error is not None), None)
        if refused is None:
            return
        if save is not None:
            with suppress(AlignkitError):  # a full disk may be the error itself, which is raised below
                save()
        raise type(refused)(f"{refused}; resume with: alignkit train --resume {self.folder}") from refused

    def _measure(self) -> Measurement:
        """Evaluate the average weights on the held-out prompts."""
        settings = self.config.evaluate
        # Where nothing is scored, only the images of the grid are generated.
        examples, samples = (self.examples, settings.samples) if self.rewards.names else (self.examples[:GRID], 1)
        with self.policy.using(self.trainer.average):
            return measure(
                self.policy,
                self.parts.sampler(),
                self.rewards,
                examples,
                settings.steps,
                settings.seed,
                settings.batch_size,
                GRID,
                samples=samples,
            )

    def _show(self, report: Report, before: Measurement, after: Measurement) -> None:
        step = self.trainer.ctx.update
        report.evaluation(step, compare(before, after, self.rewards.held_out))
        steps = self.config.evaluate.steps
        columns = [f"{k} step{'s' * (k > 1)}, {when}" for k in steps for when in ("before", "after")]
        pairs = torch.stack([before.images, after.images], dim=2).flatten(1, 2)
        report.grid(step, pairs, [e.text for e in self.examples[: len(pairs)]], columns)


def _flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, int | float | str]]:
    """Yield the values of a config under dotted keys, as trackers take them: numbers, strings, and JSON of the rest."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value if isinstance(value, int | float | str) else json.dumps(value)


def _due(every: int, last: int, now: int) -> bool:
    """Whether a multiple of `every` lies in (last, now]."""
    return bool(every) and last // every != now // every
