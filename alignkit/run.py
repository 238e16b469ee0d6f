"""A run: trains, draws, measures. The Python API behind `alignkit.load`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from PIL import Image
from rich.console import Console
from torch import Tensor

from alignkit import checkpoint, evaluate, run_folder
from alignkit.combination import Combination
from alignkit.compare import compare_runs
from alignkit.config import RunConfig, find_bundle
from alignkit.config import load as load_config
from alignkit.context import TrainContext
from alignkit.diffusers_policy import DiffusersPolicy
from alignkit.errors import AlignkitError, ConfigError
from alignkit.interfaces import Example
from alignkit.parts import Parts
from alignkit.prepare import Prepared, prepare
from alignkit.registry import whose
from alignkit.report import Report
from alignkit.rewards import WeightedRewards
from alignkit.rollout import sample_pictures
from alignkit.score import score
from alignkit.train import Trainer, Update

__all__ = ["Run", "compare_runs", "load", "open_run", "score"]

SCORES = "scores.sqlite"
"""The file of a run folder that keeps scores of black boxes."""
GRID = 8
"""Prompts in a picture grid."""


def load(
    path: str | Path | None = None, overrides: Mapping[str, Any] | None = None, resume: str | Path | None = None
) -> Run:
    """The run that a run file and overrides describe, or, with `resume`, the one in that run folder.

    Raises ConfigError with a line for every mistake; loads no weights.
    """
    if resume is None:
        return Run(load_config(path, overrides))
    folder = Path(resume)
    if path is not None or overrides:
        raise ConfigError(
            f"--resume {folder}: a resumed run keeps its own settings; leave the run file and other options out"
        )
    if not (folder / "run.toml").is_file():
        raise ConfigError(f"--resume {folder}: no run.toml there; expected the folder of a run that was started before")
    return open_run(folder)


def open_run(source: str | Path, overrides: Mapping[str, Any] | None = None) -> Run:
    """The run in a run folder; for the name of a model, a run that has not trained it. `overrides` as for `load`."""
    folder = Path(source)
    if (folder / "run.toml").is_file():
        return Run(load_config(folder / "run.toml", overrides), folder=folder)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise ConfigError(
            f"{folder}: no run.toml here and no model_index.json; expected a run folder or a diffusers pipeline"
        )
    chosen = dict(overrides or {})
    if not {"sampler.name", "algorithm.name"} & chosen.keys():
        # Nothing is trained, so it is drawn as suits the model and not as suits it under the default algorithm.
        own = find_bundle(str(source)).defaults.get("sampler", {})
        chosen = {f"sampler.{key}": value for key, value in own.items()} | chosen
    return Run(load_config(None, {**chosen, "model.name": str(source)}))


class Run(Parts):
    """One run. Nothing is loaded until it is needed; two runs share no state."""

    def __init__(self, config: RunConfig, folder: Path | None = None) -> None:
        super().__init__(config)
        self.folder = folder or Path(config.output or f"runs/{date.today()}-{config.algorithm.name}")
        """The run folder."""
        self.stopping = False
        self._existing = folder is not None
        self._unnamed = folder is None and not config.output
        self._policy: DiffusersPolicy | None = None
        self.average: Mapping[str, Tensor] = {}
        """The average of the trained weights, once there is one."""
        self._rewards: WeightedRewards | None = None

    @property
    def name(self) -> str:
        """What tables call it: its folder, or the model if there is no folder yet."""
        return self.folder.name if (self.folder / "run.toml").is_file() else self.config.model.name

    def stop(self) -> None:
        """Ask a running `train` to save and end behind the update under way."""
        self.stopping = True

    # training

    def train(self, console: Console | None = None) -> Iterator[Update]:
        """Train; yields behind each update of the policy. Ends early, after saving, if `stop` was called.

        Writes the run folder; a folder that holds a run is continued if this run was opened from it and refused
        otherwise. Raises AlignkitError for what the user can mend.
        """
        self.check()
        accelerator = self._accelerator()
        self._claim(accelerator)
        saved = self._newest_checkpoint()
        try:
            trainer, examples = self._build(accelerator)
        except Exception:
            if not self._existing and accelerator.is_main_process:
                run_folder.release(self.folder)  # so that the next try is not refused
            raise
        assert self._rewards is not None
        state: dict[str, Any] = {"before": None, "lines": 0, "unmeasured": False, "rewards": {}}
        state = state if saved is None else trainer.restore(saved)
        self._rewards.hold_to(state.get("rewards", {}), f"{saved} was saved")
        before = evaluate.Measurement.from_state(state["before"]) if state["before"] else None
        try:
            with Report(
                self.folder, console, self.config.train.updates, state["lines"], writes=accelerator.is_main_process
            ) as report:
                yield from self._loop(accelerator, trainer, report, before, examples, state["unmeasured"])
        except Exception as error:
            if not isinstance(error, AlignkitError) and (origin := whose(error)):
                error.add_note(f"This was raised in code of {origin}.")
            raise
        finally:
            self._rewards.close()
            accelerator.end_training()

    def _loop(
        self,
        accelerator: Accelerator,
        trainer: Trainer,
        report: Report,
        before: evaluate.Measurement | None,
        examples: Sequence[Example],
        unmeasured: bool,
    ) -> Iterator[Update]:
        """Rounds until the last update, with what is due between them: evaluation, pictures, checkpoints.

        `unmeasured` says that the run broke off in the evaluation that was due.
        """
        config, ctx = self.config, trainer.ctx
        warmup = config.surrogate.warmup if config.surrogate else 0
        assert self._rewards is not None
        identities = self._rewards.identities()

        def save(unmeasured: bool = False) -> None:
            first = before.state_dict() if before else None
            run_state = {"before": first, "lines": report.lines, "unmeasured": unmeasured, "rewards": identities}
            trainer.save(self.folder / "checkpoints", run_state)

        if before is None and examples:
            with self._stopping_well(None):
                before = self._measure(trainer, examples)
            report.evaluation(0, evaluate.compare(before, watched=self._watched()))
        while not trainer.finished:
            warming_up, last = trainer.warming_up, ctx.update
            with self._stopping_well(lambda: save() if trainer.interrupted else None, agreeing=False):
                for update in () if unmeasured else trainer.round():
                    report.update(update.step, update.metrics, ctx.take_pictures())
                    for message in ctx.warnings:
                        report.warn(message)
                    accelerator.log(dict(update.metrics), step=trainer.batches if warming_up else warmup + update.step)
                    if not warming_up:
                        yield update
            due = unmeasured or _due(config.evaluate.every, last, ctx.update)
            if due and not trainer.finished and before is not None:
                with self._stopping_well(lambda: save(unmeasured=True)):
                    measured = self._measure(trainer, examples)
                self._show(report, ctx.update, before, measured, examples)
            warmed_up = warming_up and not trainer.warming_up
            saving = unmeasured or warmed_up or _due(config.train.checkpoint_every, last, ctx.update)
            unmeasured = False
            if saving or self.stopping or trainer.finished:
                save()
            if self.stopping:
                return
        if before is not None:
            with self._stopping_well(None):
                measured = self._measure(trainer, examples)
            self._show(report, ctx.update, before, measured, examples)
        if accelerator.is_main_process:
            assert self._policy is not None
            run_folder.export(self.folder, self._policy, trainer.average, ctx.surrogate)

    @contextmanager
    def _stopping_well(self, save: Callable[[], None] | None, agreeing: bool = True) -> Iterator[None]:
        """What a reward, or anything else that is meant for the user, ends the run with also says how to go on.

        `agreeing` ends it in all processes if it does in one; without, the block has seen to that.
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
            with suppress(AlignkitError):  # a full disk may be the reason itself: that is what is told
                save()
        raise type(refused)(f"{refused}; go on with: alignkit train --resume {self.folder}") from refused

    def _watched(self) -> list[str]:
        return self._rewards.watched if self._rewards is not None else []

    def _claim(self, accelerator: Accelerator) -> None:
        """Take the folder, in one process; if that fails it does so in all, so that none waits for the others."""
        refused: AlignkitError | None = None
        if self._unnamed:
            self.folder = gather_object([run_folder.free(self.folder)])[0]
            accelerator.project_configuration.set_directories(str(self.folder))
            self._unnamed = False  # who trains again is told that there is a run, as with a name
        if accelerator.is_main_process:
            try:
                if not self._existing:
                    run_folder.claim(self.folder, self.config)
                run_folder.note_environment(self.folder)
            except AlignkitError as error:
                refused = error
        for reason in gather_object([refused]):
            if reason is not None:
                raise reason

    def _accelerator(self) -> Accelerator:
        train = self.config.train
        # Accelerate keeps its first settings for the whole process; two runs in one may differ in precision.
        AcceleratorState._reset_state()
        return Accelerator(
            mixed_precision=train.precision,
            cpu=train.device == "cpu",
            log_with=list(train.trackers) or None,
            project_dir=str(self.folder),
        )

    def _newest_checkpoint(self) -> Path | None:
        """None for a new run, and for one that was ended before its first checkpoint."""
        return checkpoint.latest(self.folder / "checkpoints") if self._existing else None

    def _build(self, accelerator: Accelerator) -> tuple[Trainer, list[Example]]:
        """Load everything that training needs, and the held-out examples."""
        # Initial weights of adapters and heads come from torch's global generator, which is the caller's.
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            return self._load(accelerator)

    def _load(self, accelerator: Accelerator) -> tuple[Trainer, list[Example]]:
        config, device = self.config, accelerator.device
        algorithm = self.algorithm()
        policy = self.load_policy(device)
        self._policy = policy
        teacher = self.load_teacher(device)
        surrogate = self.load_surrogate(policy)
        asking = self.asking(self.folder / SCORES, lambda message: ctx.warn(message))
        self._rewards = self.with_measured(self.trained_rewards(), asking=asking)
        self._rewards.load(device)
        rows, chunk = config.train.rows_per_update, config.evaluate.batch_size
        combination = Combination(config.rewards, config.scoring, gather_object)
        ctx = TrainContext(
            accelerator,
            policy,
            teacher,
            self.sampler(),
            self._rewards.without_watched(),
            surrogate,
            config.seed,
            rows,
            chunk,
            combination,
        )
        skipped = self.skipped()
        prompts = self.prompts(skipped)
        pictures, pairs = self.pictures(policy.image_size, skipped), self.pairs(policy.image_size, skipped)
        if skipped:
            ctx.warn(f"data: {len(skipped)} skipped as broken: {'; '.join(skipped)}")
            skipped.clear()
        for note in pairs.notes if pairs is not None else ():
            ctx.warn(note)
        trainer = Trainer(config, ctx, algorithm, prompts, pictures, pairs, skipped)
        self.average = trainer.average
        algorithm.setup(ctx)
        if config.train.trackers:
            accelerator.init_trackers("alignkit", config=dict(_flat(asdict(config))))
        return trainer, self.held_out()

    def _measure(self, trainer: Trainer, examples: Sequence[Example]) -> evaluate.Measurement:
        """What the average weights score on the held-out prompts."""
        settings, policy = self.config.evaluate, trainer.ctx.policy
        assert self._rewards is not None
        with policy.using(trainer.average):
            return evaluate.evaluate(
                policy,
                self.sampler(),
                self._rewards,
                examples,
                settings.steps,
                settings.seed,
                settings.batch_size,
                GRID,
                samples=settings.samples,
            )

    def _show(
        self,
        report: Report,
        step: int,
        before: evaluate.Measurement,
        after: evaluate.Measurement,
        examples: Sequence[Example],
    ) -> None:
        report.evaluation(step, evaluate.compare(before, after, self._watched()))
        steps = self.config.evaluate.steps
        columns = [f"{k} step{'s' * (k > 1)}, {when}" for k in steps for when in ("before", "after")]
        pairs = torch.stack([before.pictures, after.pictures], dim=2).flatten(1, 2)
        report.grid(step, pairs, [e.text for e in examples[: len(pairs)]], columns)

    def prepare(self, console: Console | None = None) -> tuple[list[Prepared], list[str]]:
        """Encode what `train` will read into the cache of `[data] cache`, as `alignkit.prepare.prepare` tells."""
        return prepare(self, self._accelerator().device, console)

    # drawing and measuring

    def policy(self) -> DiffusersPolicy:
        """The model of this run. What is drawn and measured uses the newest average weights, if it was trained."""
        if self._policy is None:
            self._policy = self.load_policy(
                "cuda" if torch.cuda.is_available() and self.config.train.device != "cpu" else "cpu"
            )
            if saved := self._newest_checkpoint():
                self.average = checkpoint.load(saved)["trainer"]["average"]
            elif self._existing:
                raise ConfigError(
                    f"{self.folder}: no checkpoint here to draw from; train it first with "
                    f"alignkit train --resume {self.folder}"
                )
        return self._policy

    def sample(
        self, prompts: Sequence[str], steps: int | None = None, seed: int = 0, count: int = 1
    ) -> list[Image.Image]:
        """`count` pictures for each prompt, in that order.

        Picture i of a seed starts from the same noise at any number of steps.
        """
        sampler, policy = self.sampler(steps), self.policy()
        texts = [text for text in prompts for _ in range(count)]
        pictures: list[Image.Image] = []
        for start in range(0, len(texts), self.config.evaluate.batch_size):
            part = texts[start : start + self.config.evaluate.batch_size]
            with policy.using(self.average):
                images = sample_pictures(policy, sampler, part, [(seed, start + i) for i in range(len(part))])
            array = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            pictures += [Image.fromarray(a) for a in array]
        return pictures

    def evaluate(
        self, steps: Sequence[int] | None = None, rewards: Sequence[str] = (), seen: bool = False
    ) -> list[evaluate.Row]:
        """The rewards before and after with 95 % intervals, and how far the pictures drifted.

        On held-out prompts; with `seen` also on as many of the training prompts.
        """
        return compare_runs([self], steps, rewards, seen)


def _flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, int | float | str]]:
    """The values of a config under dotted keys, as trackers take them: what is no number or string as JSON."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value if isinstance(value, int | float | str) else json.dumps(value)


def _due(every: int, last: int, now: int) -> bool:
    """Whether a multiple of `every` lies in (last, now]."""
    return bool(every) and last // every != now // every
