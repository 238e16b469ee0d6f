"""The loop of a run: rounds, with evaluations and checkpoints between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor

from alignkit.errors import AlignkitError
from alignkit.evaluation.choice import choose
from alignkit.evaluation.measure import Measurement, compare, measure
from alignkit.evaluation.rows import TOTAL
from alignkit.page.page import FILE as PAGE
from alignkit.records import Example
from alignkit.rewards.combine import Combination
from alignkit.rewards.weighted import WeightedRewards
from alignkit.runs.build import Parts, facts_of
from alignkit.runs.display import Display
from alignkit.runs.folder import export, export_weights
from alignkit.runs.grid import GRID, comparison
from alignkit.runs.points import Points, planned, point_grid, read_point, write_point
from alignkit.runs.report import SAMPLES, Report
from alignkit.runs.trackers import Trackers
from alignkit.training import checkpoint
from alignkit.training.context import TrainContext
from alignkit.training.trainer import Trainer
from alignkit.training.update import Update

SCORES = "scores.sqlite"
"""The file of a run folder that keeps scores of black boxes."""
SHORT = 60
"""Characters of a prompt that is short enough for a command to try."""


class Loop:
    """Rounds until the last update, with evaluation, images and checkpoints between them."""

    def __init__(self, parts: Parts, folder: Path, accelerator: Accelerator, display: Display) -> None:
        """Load all that training needs. Raises AlignkitError for what the user can fix."""
        self.parts, self.folder, self.config, self.accelerator = parts, folder, parts.config, accelerator
        self._display = display
        config = parts.config
        saved = checkpoint.latest(folder / "checkpoints")
        # Before the weights load: a tracker may ask for a login.
        self._trackers = Trackers(accelerator, config, folder, int(saved.name) if saved else None)
        try:
            # Initial weights of adapters and heads come from torch's global generator, which is the caller's.
            with torch.random.fork_rng():
                torch.manual_seed(config.seed)
                self._load()
        except BaseException:
            self._trackers.close()
            raise
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
        trained = [TOTAL] if self.rewards.rewards else []
        self._shown = [*trained, *self.rewards.held_out][:2]
        """Names of the rewards whose scores stand under images."""
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
        self._trackers.rounds = self.trainer.batches
        with Report(self.folder, self._display, self._lines, main, self._trackers) as report:
            for message in self.trainer.ctx.warnings:
                report.warn(message)
            if self._before is None and self.examples:
                self._display.stage(f"measuring {len(self.examples)} held-out prompts before training")
                with self._stopping_well(None):
                    self._before = self._measure()
                report.evaluation(0, compare(self._before, held_out=self.rewards.held_out))
                report.grid(0, self._grid(self._before))
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
        """Close rewards and trackers, and leave the group of processes."""
        self.rewards.close()
        self._trackers.close()
        self.accelerator.end_training()

    def _round(self, report: Report, stopping: Callable[[], bool]) -> Iterator[Update]:
        """Run one round, and the evaluation and checkpoint that are due after it."""
        config, trainer, ctx = self.config, self.trainer, self.trainer.ctx
        resumed, warming_up = self._unmeasured is not None, trainer.warming_up
        last = ctx.update if self._unmeasured is None else self._unmeasured
        with self._stopping_well(lambda: self._save(report) if trainer.interrupted else None, agreeing=False):
            for update in () if resumed else trainer.round():
                report.update(update.step, update.metrics, ctx.take_images())
                for message in ctx.warnings:
                    report.warn(message)
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
        ended = stopping() or self._left
        if saving or ended or trainer.finished:
            self._save(report)
        if ended:
            self._show_stopped(report)

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
        self,
        weights: Mapping[str, Tensor],
        examples: Sequence[Example],
        images: int,
        samples: int = 1,
        rewards: WeightedRewards | None = None,
    ) -> Measurement:
        settings, rewards = self.config.evaluate, self.rewards if rewards is None else rewards
        with self.policy.using(weights):
            return measure(
                self.policy, self.parts.sampler(), rewards, examples, settings.steps, settings.seed,
                settings.batch_size, images, samples=samples,
            )  # fmt: skip

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
        report.grid(step, self._grid(before, after))

    def _grid(self, before: Measurement, after: Measurement | None = None) -> Image.Image:
        found = [before] if after is None else [before, after]
        prompts = [example.text for example in self.examples[: len(before.images)]]
        scores = [measurement.scores() for measurement in found]
        return comparison([m.images for m in found], prompts, self.config.evaluate.steps, scores, self._shown)

    def _show_stopped(self, report: Report) -> None:
        """Show images before training next to those of the newest point; without a point, those of now."""
        update = max(self._points.rows, default=0)
        if not self.accelerator.is_main_process:
            return
        try:
            if update:
                start, now = (read_point(self.folder, step) for step in (0, update))
                report.grid(update, point_grid(start, now, self._shown), stopped=True)
            elif self._before is not None:
                unscored = WeightedRewards([], needed=False)
                after = self._measure_with(self.weights, self.examples[:GRID], GRID, rewards=unscored)
                report.grid(self.trainer.ctx.update, self._grid(self._before, after), stopped=True)
        except AlignkitError as error:  # the run itself is saved
            report.warn(f"the images of now were not saved ({error})")


def _due(every: int, last: int, now: int) -> bool:
    """Whether a multiple of `every` lies in (last, now]."""
    return bool(every) and last // every != now // every
