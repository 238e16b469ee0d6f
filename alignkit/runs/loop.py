"""The loop of a run: rounds, with evaluations and checkpoints between them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from alignkit.errors import AlignkitError
from alignkit.evaluation.choice import choose
from alignkit.evaluation.measure import Measurement, compare, measure
from alignkit.page.page import FILE as PAGE
from alignkit.records import Example
from alignkit.rewards.combine import Combination
from alignkit.runs.build import Parts, facts_of
from alignkit.runs.display import Display
from alignkit.runs.folder import export, export_weights
from alignkit.runs.points import Points, planned, write_point
from alignkit.runs.report import SAMPLES, Report
from alignkit.training.context import TrainContext
from alignkit.training.trainer import Trainer
from alignkit.training.update import Update

SCORES = "scores.sqlite"
"""The file of a run folder that keeps scores of black boxes."""
GRID = 8
"""Prompts in an image grid."""
SHORT = 60
"""Characters of a prompt that is short enough for a command to try."""


class Loop:
    """Rounds until the last update, with evaluation, images and checkpoints between them."""

    def __init__(self, parts: Parts, folder: Path, accelerator: Accelerator, display: Display) -> None:
        """Load all that training needs. Raises AlignkitError for what the user can fix."""
        self.parts, self.folder, self.config, self.accelerator = parts, folder, parts.config, accelerator
        self._display = display
        config = parts.config
        # Initial weights of adapters and heads come from torch's global generator, which is the caller's.
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self._load()
        self.examples = parts.held_out()
        self._before: Measurement | None = None
        """The evaluation before training."""
        self._lines = 0
        """Lines of the record that a resumed run keeps."""
        self._unmeasured: int | None = None
        """The update before the last round, if the run broke off during an evaluation or point after it."""
        self._left = False
        """Whether the caller has left the generator of updates."""
        points = config.evaluate.points
        self._point_examples = parts.point_examples() if self.rewards.names else []
        self._points = Points(
            planned(points, config.train.updates) if self._point_examples else [], self.rewards.held_out
        )

    def _load(self) -> None:
        parts, config, accelerator = self.parts, self.config, self.accelerator
        algorithm = parts.algorithm()
        self._display.stage(f"loading the model {config.model.name}")
        policy = parts.load_policy(accelerator.device)
        parts.check_methods(facts_of(policy))
        teacher = parts.load_teacher(accelerator.device)
        surrogate = parts.load_surrogate(policy)
        scoring = parts.scoring(self.folder / SCORES, lambda message: ctx.warn(message))
        self.rewards = parts.with_measured(scoring=scoring)
        if self.rewards.names:
            self._display.stage(f"loading the rewards {', '.join(self.rewards.names)}")
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
        self._metadata = parts.metadata(prompts)
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
        self._points.load_state_dict(state["points"])
        self._lines, self._unmeasured = state["lines"], state["unmeasured"]

    @property
    def export_rule(self) -> str:
        """The value of train.export, its default resolved."""
        comparable = self._points.updates and self.rewards.rewards and self.rewards.held_out
        return self.config.train.export or ("best" if comparable else "average")

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The weights that the run exports once it has ended; until then the average."""
        if self.trainer.finished and self.export_rule == "last":
            return {name: parameter.detach() for name, parameter in self.policy.weights().items()}
        if self.trainer.finished and self.export_rule == "best" and self._points.best is not None:
            return self._points.best
        return self.trainer.average

    def updates(self, stopping: Callable[[], bool]) -> Iterator[Update]:
        """Train to the end, or until `stopping`, and save; yields after each update of the policy."""
        main = self.accelerator.is_main_process
        with Report(self.folder, self._display, self._lines, writes=main) as report:
            for message in self.trainer.ctx.warnings:
                report.warn(message)
            if self._before is None and self.examples:
                self._display.stage(f"measuring {len(self.examples)} held-out prompts before training")
                with self._stopping_well(None):
                    self._before = self._measure()
                report.evaluation(0, compare(self._before, held_out=self.rewards.held_out))
            if self._points.due(0, 0):
                with self._stopping_well(None):
                    self._measure_point(report)
            while not self.trainer.finished or self._unmeasured is not None:
                yield from self._round(report, stopping)
                if stopping():
                    return
            with self._stopping_well(None):  # before what else may fail
                written = self._export()
            exported = self._report_export(report)
            if self._before is not None:
                self._display.stage(f"measuring {len(self.examples)} held-out prompts after training")
                with self._stopping_well(None):
                    after = self._measure()
                self._show(report, self._before, after, exported)
        if main:
            self._show_results(written)

    def _show_results(self, weights: Path) -> None:
        """Show where the results are and a command to try them."""
        images = sorted((self.folder / SAMPLES).glob("*.png"))
        results = {"weights": weights, **({"images": images[-1]} if images else {}), "report": self.folder / PAGE}
        short = (example.text for example in self.examples if len(example.text) <= SHORT)
        command = ["alignkit", "sample", str(self.folder), next(short, "a prompt")]
        self._display.results({name: path for name, path in results.items() if path.exists()}, command)

    def close(self) -> None:
        """Close rewards and trackers."""
        self.rewards.close()
        self.accelerator.end_training()

    def _round(self, report: Report, stopping: Callable[[], bool]) -> Iterator[Update]:
        """Run one round, and the evaluation and checkpoint that are due after it."""
        config, trainer, ctx = self.config, self.trainer, self.trainer.ctx
        warmup = config.surrogate.warmup if config.surrogate else 0
        resumed, warming_up = self._unmeasured is not None, trainer.warming_up
        last = ctx.update if self._unmeasured is None else self._unmeasured
        with self._stopping_well(lambda: self._save(report) if trainer.interrupted else None, agreeing=False):
            for update in () if resumed else trainer.round():
                report.update(update.step, update.metrics, ctx.take_images())
                for message in ctx.warnings:
                    report.warn(message)
                step = trainer.batches if warming_up else warmup + update.step
                self.accelerator.log(dict(update.metrics), step=step)
                if not warming_up and not self._left:
                    try:
                        yield update
                    except GeneratorExit:  # as a stop: the round is brought to its end and saved
                        self._left = True
            report.end_round()
        if self._points.due(last, ctx.update):
            with self._stopping_well(lambda: self._save(report, unmeasured=last)):
                self._measure_point(report)
        due = _due(config.evaluate.every, last, ctx.update)
        if due and not trainer.finished and self._before is not None:
            with self._stopping_well(lambda: self._save(report, unmeasured=last)):
                after = self._measure()
            self._show(report, self._before, after, ctx.update)
        warmed_up = warming_up and not trainer.warming_up
        saving = resumed or warmed_up or _due(config.train.checkpoint_every, last, ctx.update)
        self._unmeasured = None
        if saving or stopping() or self._left or trainer.finished:
            self._save(report)

    def _save(self, report: Report, unmeasured: int | None = None) -> None:
        state = {
            "points": self._points.state_dict(),
            "exported": self.export_rule if self.trainer.finished else "average",
            "before": self._before.state_dict() if self._before else None,
            "lines": report.lines,
            "unmeasured": unmeasured,
            "rewards": self._identities,
        }
        self.trainer.save(self.folder / "checkpoints", state)
        if not self.trainer.finished:  # so that a run has weights to use, however it ends
            self._export()

    def _export(self) -> Path:
        """Write the weights and the surrogate of now into the folder, in one process."""
        if not self.accelerator.is_main_process:
            return self.folder
        return export(self.folder, self.policy, self.weights, self.trainer.ctx.surrogate, self._metadata)

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
        """Evaluate `weights` on the held-out prompts."""
        # Where nothing is scored, only the images of the grid are generated.
        examples, samples = self.examples, self.config.evaluate.samples
        if not self.rewards.names:
            examples, samples = examples[:GRID], 1
        return self._measure_with(self.weights, examples, GRID, samples)

    def _measure_with(
        self, weights: Mapping[str, Tensor], examples: Sequence[Example], images: int, samples: int = 1
    ) -> Measurement:
        settings = self.config.evaluate
        with self.policy.using(weights):
            return measure(
                self.policy,
                self.parts.sampler(),
                self.rewards,
                examples,
                settings.steps,
                settings.seed,
                settings.batch_size,
                images,
                samples=samples,
            )

    def _measure_point(self, report: Report) -> None:
        """Measure the average of now on the prompts of points, and keep images, scores and weights in the folder."""
        update, average, examples = self.trainer.ctx.update, self.trainer.average, self._point_examples
        self._display.stage(f"measuring {len(examples)} held-out prompts", log=False)
        found = self._measure_with(average, examples, len(examples))
        if self.accelerator.is_main_process:
            lora = partial(export_weights, policy=self.policy, weights=average, metadata=self._metadata)
            keeps = lora if update and self.config.model.lora_rank else None
            write_point(self.folder / "points" / f"{update:06d}", found, examples, self.config.evaluate.steps, keeps)
        rows = self._points.compare(found)
        report.point(update, rows)
        self._points.add(update, found, rows, average)

    def _report_export(self, report: Report) -> int:
        """Report which weights are exported, and return their update."""
        last, rule = self.trainer.ctx.update, self.export_rule
        update, why = last, ""
        if rule == "best":
            choice = choose(self._points.rows)
            why = f": {choice.reason}"
            if choice.update is None:
                rule = "average"
            else:
                update = choice.update
        what = "weights" if rule == "last" else "average weights"
        report.exported(last, update, rule, f"exports the {what} of update {update} of {last}{why}")
        return update

    def _show(self, report: Report, before: Measurement, after: Measurement, weights: int) -> None:
        step = self.trainer.ctx.update
        report.evaluation(step, compare(before, after, self.rewards.held_out), weights)
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


def exported(state: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Return the weights that a checkpoint's run exports: of a run that has not ended, the average."""
    trainer, run = state["trainer"], state["run"]
    rule, weights = run.get("exported", "average"), trainer["average"]
    if rule == "last":
        weights = trainer["policy"]
    elif rule == "best" and run["points"]["best"] is not None:
        weights = run["points"]["best"]
    return dict(weights)


def _due(every: int, last: int, now: int) -> bool:
    """Whether a multiple of `every` lies in (last, now]."""
    return bool(every) and last // every != now // every
