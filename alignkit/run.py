"""A parsed run: builds its parts, trains, draws, measures. The Python API behind `alignkit.load`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from PIL import Image
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignkit import checkpoint, evaluate
from alignkit.config import RunConfig, find_bundle, to_toml
from alignkit.config import load as load_config
from alignkit.data import open_pictures, read_examples
from alignkit.diffusers_policy import DiffusersPolicy, check_source
from alignkit.environment import environment
from alignkit.errors import AlignkitError, ConfigError
from alignkit.interfaces import Algorithm, Example, Reward, Sampler, Surrogate
from alignkit.registry import default_registry
from alignkit.report import Report
from alignkit.rewards import WeightedRewards
from alignkit.rollout import sample, seeded_noises
from alignkit.train import TrainContext, Trainer, Update

GRID = 8
"""Prompts in a picture grid."""
SURROGATE_FILE = "surrogate.safetensors"


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
    return open_run(folder)


def open_run(source: str | Path) -> Run:
    """The run in a run folder; for the name of a model, a run that has not trained it."""
    folder = Path(source)
    if (folder / "run.toml").is_file():
        return Run(load_config(folder / "run.toml"), folder=folder)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise ConfigError(
            f"{folder}: no run.toml here and no model_index.json; expected a run folder or a diffusers pipeline"
        )
    return Run(load_config(None, {"model.name": str(source)}))


class Run:
    """One run. Nothing is loaded until it is needed; two runs share no state."""

    def __init__(self, config: RunConfig, folder: Path | None = None) -> None:
        self.config = config
        self.folder = folder or Path(config.output or f"runs/{date.today()}-{config.algorithm.name}")
        """The run folder."""
        self.stopping = False
        self._existing = folder is not None
        self._policy: DiffusersPolicy | None = None
        self._average: Mapping[str, Tensor] = {}
        self._rewards: WeightedRewards | None = None

    def stop(self) -> None:
        """Ask a running `train` to save and end behind the update under way."""
        self.stopping = True

    # parts

    def _plugin(self, kind: str, config: Any) -> Any:
        return default_registry().get(kind, config.name)(**config.fields)

    def sampler(self, num_steps: int | None = None) -> Sampler:
        """The run's sampler, at another number of steps if one is given."""
        sampler: Sampler = self._plugin("sampler", self.config.sampler)
        try:
            return sampler if num_steps is None else replace(sampler, num_steps=num_steps)
        except ValueError as error:
            raise ConfigError(f"steps: {error}") from error

    def algorithm(self) -> Algorithm[Any, Any]:
        """A fresh instance of the run's algorithm."""
        algorithm: Algorithm[Any, Any] = self._plugin("algorithm", self.config.algorithm)
        return algorithm

    def _trained_rewards(self) -> list[tuple[str, float, Reward]]:
        return [(r.name, r.weight, self._plugin("reward", r)) for r in self.config.rewards]

    def _all_rewards(self) -> WeightedRewards:
        """Those that are trained on, and at weight 0 those that are only measured."""
        trained = self._trained_rewards()
        names = {name for name, _, _ in trained}
        extra = [
            (n, 0.0, default_registry().get("reward", n)()) for n in self.config.evaluate.rewards if n not in names
        ]
        return WeightedRewards([*trained, *extra])

    def _prompts(self) -> list[Example]:
        if not self.config.data.prompts:
            raise ConfigError("data.prompts: missing; expected a .txt file with one prompt a line, or a .jsonl file")
        return read_examples(self.config.data.prompts)

    def _held_out(self) -> list[Example]:
        path = self.config.evaluate.prompts
        return read_examples(path)[: self.config.evaluate.limit] if path else []

    def check(self) -> None:
        """Find what can be found before any weight loads. Raises ConfigError or PluginError."""
        sampler, algorithm = self.sampler(), self.algorithm()
        check_source(find_bundle(self.config.model.name).path)
        if "teacher" in algorithm.needs and self._teacher_source():
            check_source(self._teacher_source())
        algorithm.check(sampler)
        for steps in self.config.evaluate.steps:
            self.sampler(steps)
        if "teacher" in algorithm.needs and not self._teacher_source():
            raise ConfigError(
                f"model.teacher: missing; algorithm {self.config.algorithm.name} needs the model that "
                f"{self.config.model.name} was distilled from"
            )
        if "pictures" in algorithm.needs and not self.config.data.pictures:
            raise ConfigError(
                f"data.pictures: missing; algorithm {self.config.algorithm.name} needs captioned pictures"
            )
        rewards = WeightedRewards(self._trained_rewards())
        if "differentiable_reward" in algorithm.needs and not rewards.differentiable:
            raise ConfigError(f"reward: algorithm {self.config.algorithm.name} needs a differentiable reward")
        rewards.check(self._prompts())
        if held_out := self._held_out():
            self._all_rewards().check(held_out)

    def _teacher_source(self) -> str:
        return self.config.model.teacher or find_bundle(self.config.model.name).teacher or ""

    def _load_policy(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> DiffusersPolicy:
        model = self.config.model
        return DiffusersPolicy(
            find_bundle(model.name).path,
            lora_rank=model.lora_rank,
            lora_targets=model.lora_targets,
            guidance=model.guidance,
            device=device,
            dtype=dtype,
        )

    def _load_surrogate(self, policy: DiffusersPolicy) -> Surrogate | None:
        config = self.config.surrogate
        if config is None:
            return None
        surrogate: Surrogate = self._plugin("surrogate", config)
        surrogate.load(policy)
        if config.init:
            path = Path(config.init)
            path = path / SURROGATE_FILE if path.is_dir() else path
            try:
                surrogate.module().load_state_dict(load_file(path))
            except (OSError, RuntimeError, ValueError) as error:
                reason = str(error).strip().splitlines()[0]
                raise ConfigError(f"surrogate.init: {path} does not fit surrogate {config.name} ({reason})") from error
        return surrogate

    # training

    def train(self, console: Console | None = None) -> Iterator[Update]:
        """Train; yields behind each update of the policy. Ends early, after saving, if `stop` was called.

        Writes the run folder; a folder that holds a run is continued if this run was opened from it and refused
        otherwise. Raises AlignkitError for what the user can mend.
        """
        self.check()
        accelerator = self._accelerator()
        if accelerator.is_main_process:
            self._claim_folder()
        accelerator.wait_for_everyone()
        saved = self._newest_checkpoint()
        trainer, examples = self._build(accelerator)
        state: dict[str, Any] = {"before": None, "lines": 0}
        if saved is not None:
            loaded = checkpoint.load(saved)
            trainer.load_state_dict(loaded["trainer"])
            state = loaded["run"]
            ranks = loaded["ranks"]
            if len(ranks) != accelerator.num_processes:
                raise ConfigError(
                    f"{saved}: saved by {len(ranks)} processes, resumed by {accelerator.num_processes}; "
                    "start as many as then"
                )
            trainer.load_rank_state(ranks[accelerator.process_index]["trainer"])
            checkpoint.restore_rng(ranks[accelerator.process_index]["rng"])
        config, ctx = self.config, trainer.ctx
        with Report(
            self.folder, console, config.train.updates, state["lines"], writes=accelerator.is_main_process
        ) as report:
            before = self._measurement(state["before"])
            if before is None and examples:
                before = self._measure(trainer, examples)
                report.evaluation(0, evaluate.compare(before))
            while not trainer.finished:
                warming_up = trainer.warming_up
                last = ctx.update
                for update in trainer.round():
                    report.update(update.step, update.metrics, ctx.take_pictures())
                    for message in ctx.warnings:
                        report.warn(message)
                    accelerator.log(dict(update.metrics), step=trainer.batches if warming_up else update.step)
                    if not warming_up:
                        yield update
                if _due(config.evaluate.every, last, ctx.update) and not trainer.finished and before is not None:
                    after = self._measure(trainer, examples)
                    self._show(report, ctx.update, before, after, examples)
                warmed_up = warming_up and not trainer.warming_up
                if (
                    self.stopping
                    or warmed_up
                    or trainer.finished
                    or _due(config.train.checkpoint_every, last, ctx.update)
                ):
                    self._save(accelerator, trainer, before, report)
                if self.stopping:
                    return
            if before is not None:
                self._show(report, ctx.update, before, self._measure(trainer, examples), examples)
            if accelerator.is_main_process:
                self._export(trainer)
        accelerator.end_training()

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

    def _claim_folder(self) -> None:
        if not self._existing:
            if self.folder.exists() and any(self.folder.iterdir()):
                raise ConfigError(
                    f"output: {self.folder} exists and is not empty; name another with --out, or go on with "
                    f"alignkit train --resume {self.folder}"
                )
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"output: {self.folder} cannot be made ({error.strerror})") from error
            checkpoint.write_file(self.folder / "run.toml", to_toml(self.config))
        checkpoint.write_file(self.folder / "environment.json", json.dumps(environment(), indent=1))

    def _newest_checkpoint(self) -> Path | None:
        """None for a new run, and for one that was ended before its first checkpoint."""
        return checkpoint.latest(self.folder / "checkpoints") if self._existing else None

    def _build(self, accelerator: Accelerator) -> tuple[Trainer, list[Example]]:
        """Load everything that training needs, and the held-out examples."""
        config, device = self.config, accelerator.device
        # Initial weights of adapters and heads come from torch's global generator.
        torch.manual_seed(config.seed)
        algorithm = self.algorithm()
        policy = self._load_policy(device)
        self._policy = policy
        teacher = None
        if "teacher" in algorithm.needs:
            teacher = DiffusersPolicy(self._teacher_source(), trainable=False, guidance=0.0, device=device)
        surrogate = self._load_surrogate(policy)
        rewards = WeightedRewards(self._trained_rewards())
        rewards.load(device)
        self._rewards = self._all_rewards()
        self._rewards.load(device)
        train = config.train
        rows = train.rows_per_update
        ctx = TrainContext(
            accelerator,
            policy,
            teacher,
            self.sampler(),
            rewards,
            surrogate,
            config.seed,
            rows,
            config.evaluate.batch_size,
        )
        pictures = open_pictures(config.data.pictures, policy.image_size) if "pictures" in algorithm.needs else None
        trainer = Trainer(config, ctx, algorithm, self._prompts(), pictures)
        self._average = trainer.average
        algorithm.setup(ctx)
        if train.trackers:
            accelerator.init_trackers("alignkit", config=json.loads(json.dumps(asdict(config))))
        return trainer, self._held_out()

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
            )

    def _show(
        self,
        report: Report,
        step: int,
        before: evaluate.Measurement,
        after: evaluate.Measurement,
        examples: Sequence[Example],
    ) -> None:
        report.evaluation(step, evaluate.compare(before, after))
        steps = self.config.evaluate.steps
        columns = [f"{k} step{'s' * (k > 1)}, {when}" for k in steps for when in ("before", "after")]
        pairs = torch.stack([before.pictures, after.pictures], dim=2).flatten(1, 2)
        report.grid(step, pairs, [e.text for e in examples[: len(pairs)]], columns)

    def _measurement(self, saved: Any) -> evaluate.Measurement | None:
        if saved is None:
            return None
        values = {(steps, name): column for steps, name, column in saved["values"]}
        return evaluate.Measurement(values, saved["pictures"])

    def _save(
        self, accelerator: Accelerator, trainer: Trainer, before: evaluate.Measurement | None, report: Report
    ) -> None:
        # Chance and what the algorithm keeps differ between processes; all else is the same in each.
        ranks = gather_object([{"trainer": trainer.rank_state(), "rng": checkpoint.rng_state()}])
        if not accelerator.is_main_process:
            return
        measured = None
        if before is not None:
            measured = {
                "values": [[k, n, column] for (k, n), column in before.values.items()],
                "pictures": before.pictures,
            }
        state = {
            "trainer": trainer.state_dict(),
            "ranks": ranks,
            "run": {"before": measured, "lines": report.lines},
        }
        checkpoint.save(self.folder / "checkpoints", trainer.ctx.update, state, self.config.train.keep_checkpoints)

    def _export(self, trainer: Trainer) -> None:
        """What is taken away: the average weights for plain diffusers, and the surrogate for a later run."""
        assert self._policy is not None
        partial = self.folder / ".export.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            self._policy.export(partial, trainer.average)
            if trainer.ctx.surrogate is not None:
                tensors = {
                    n: t.detach().cpu().contiguous() for n, t in trainer.ctx.surrogate.module().state_dict().items()
                }
                save_file(tensors, partial / SURROGATE_FILE)
            for path in partial.iterdir():
                target = self.folder / path.name
                if target.is_dir():
                    shutil.rmtree(target)
                path.replace(target)
            partial.rmdir()
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise AlignkitError(
                f"{self.folder}: the trained weights could not be written ({error}); make room and run "
                f"alignkit train --resume {self.folder}"
            ) from error

    # drawing and measuring

    def policy(self) -> DiffusersPolicy:
        """The model of this run. What is drawn and measured uses the newest average weights, if it was trained."""
        if self._policy is None:
            self._policy = self._load_policy(
                "cuda" if torch.cuda.is_available() and self.config.train.device != "cpu" else "cpu"
            )
            if saved := self._newest_checkpoint():
                self._average = checkpoint.load(saved)["trainer"]["average"]
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
            seeds = [(seed, start + i) for i in range(len(part))]
            noises = seeded_noises(policy.latent_shape, sampler.num_steps, seeds).to(policy.device)
            with torch.no_grad(), policy.using(self._average):
                images = policy.decode(sample(policy, sampler, policy.encode(part), noises))
            array = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            pictures += [Image.fromarray(a) for a in array]
        return pictures

    def evaluate(self, steps: Sequence[int] | None = None) -> list[evaluate.Row]:
        """The rewards on the held-out prompts, before and after, with 95 % intervals."""
        settings, examples = self.config.evaluate, self._held_out()
        if not examples:
            raise ConfigError("evaluate.prompts: missing; expected a file of prompts that are not trained on")
        policy, rewards = self.policy(), self._all_rewards()
        rewards.check(examples)
        rewards.load(policy.device)
        chosen = list(steps or settings.steps)
        for number in chosen:
            self.sampler(number)

        def measure() -> evaluate.Measurement:
            return evaluate.evaluate(
                policy, self.sampler(), rewards, examples, chosen, settings.seed, settings.batch_size
            )

        with policy.reference():
            before = measure()
        with policy.using(self._average):
            return evaluate.compare(before, measure())


def score(
    reward: str, folder: str | Path, prompts: str | Path, overrides: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Score the pictures of a folder, in the order of their names, one prompt a picture.

    One record a picture: {"picture", "prompt", "score" (None if it could not be scored), "parts"}.
    """
    config = load_config(None, {**(overrides or {}), "reward": [reward]})
    files = sorted(p for p in Path(folder).glob("*") if p.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp"})
    if not files:
        raise ConfigError(f"{folder}: no pictures here; expected .png, .jpg or .webp files")
    examples = read_examples(prompts)
    if len(examples) == 1:
        examples = examples * len(files)
    if len(examples) != len(files):
        raise ConfigError(
            f"{prompts}: {len(examples)} prompts for {len(files)} pictures in {folder}; "
            "expected one a picture, or one for all"
        )
    run = Run(config)
    rewards = WeightedRewards(run._trained_rewards())
    rewards.check(examples)
    rewards.load(torch.device("cpu"))
    records = []
    for file, example in zip(files, examples, strict=True):
        try:
            with Image.open(file) as opened:
                picture = opened.convert("RGB")
        except OSError as error:
            raise AlignkitError(f"{file}: cannot be read as a picture ({error})") from error
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(
            picture.height, picture.width, 3
        )
        scores = rewards.score(pixels.permute(2, 0, 1)[None].float() / 255, [example], 1)
        valid = bool(scores.valid[0])
        parts = {name: float(values[0]) for name, values in scores.parts.items()} if valid else {}
        records.append(
            {
                "picture": str(file),
                "prompt": example.text,
                "score": float(scores.values[0]) if valid else None,
                "parts": parts,
            }
        )
    return records


def _due(every: int, last: int, now: int) -> bool:
    """Whether a multiple of `every` lies in (last, now]."""
    return bool(every) and last // every != now // every
