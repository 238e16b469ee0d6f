"""A run: train, sample, and load its policy. The Python API that `alignkit.load` returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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

from alignkit.config.bundles import find_bundle, is_checkpoint
from alignkit.config.load import RunConfig, to_toml
from alignkit.config.load import load as load_config
from alignkit.data.decode import to_uint8
from alignkit.errors import AlignkitError, ConfigError
from alignkit.files import parse_toml
from alignkit.interfaces import Policy
from alignkit.page.cells import images_cell, run_cell
from alignkit.page.notebook import in_notebook
from alignkit.page.plot import Plot, plot
from alignkit.page.record import UPDATES, Record, last_update, read_record
from alignkit.registry import responsible_plugin
from alignkit.rollout import sample_images
from alignkit.runs import folder as run_folder
from alignkit.runs.build import Parts
from alignkit.runs.cell import CellDisplay
from alignkit.runs.display import Display
from alignkit.runs.export import Format, Weights, export
from alignkit.runs.loop import Loop
from alignkit.runs.points import exported
from alignkit.training import checkpoint
from alignkit.training.update import Update

RESUMABLE = {"scoring.retries", "scoring.retry_seconds", "scoring.retry_limit", "scoring.on_error"}
"""Settings that may change when a run is resumed: reactions to a reward that fails. They change no score."""


def load(
    path: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    resume: str | Path | None = None,
    trust: bool = False,
) -> Run:
    """Return the run that a run file and overrides describe, or, with `resume`, the one in that run folder.

    `trust` lets the file, or the run folder, name code from anywhere and addresses that get a token; names in
    `overrides` need none. A resumed run accepts overrides of `RESUMABLE` only, and writes them into its run.toml when
    it trains. Raises ConfigError with a line for every mistake; loads no weights.
    """
    if resume is None:
        return Run(load_config(path, overrides, trust=trust))
    folder = Path(resume)
    if path is not None or (overrides or {}).keys() - RESUMABLE:
        raise ConfigError(
            f"--resume {folder}: a resumed run keeps its own settings; leave out the run file and all options, "
            f"except --set of {', '.join(sorted(RESUMABLE))}"
        )
    if not (folder / "run.toml").is_file():
        raise ConfigError(f"--resume {folder}: no run.toml here; expected the folder of a run that was started before")
    run = open_run(folder, overrides, trust)
    run.rewrites = bool(overrides)
    return run


def open_run(source: str | Path, overrides: Mapping[str, Any] | None = None, trust: bool = False) -> Run:
    """Return the run in a run folder, or for the name of a model an untrained run of it. The rest is as for `load`."""
    folder = Path(source)
    if (folder / "run.toml").is_file():
        return Run(load_config(folder / "run.toml", overrides, trust=trust), folder=folder)
    if folder.is_dir() and not is_checkpoint(folder):
        raise ConfigError(
            f"{folder}: contains neither run.toml nor a checkpoint that a policy serves (`alignkit list policies`)"
        )
    chosen = {"recipe": "", **(overrides or {})}  # nothing is trained
    if not {"sampler.name", "algorithm.name"} & chosen.keys():
        # Nothing is trained, so the sampler is the model's own and not the one for the default algorithm.
        own = find_bundle(str(source)).defaults.get("sampler", {})
        if not own:  # a hub id that no plugin knows; it is not looked up
            raise ConfigError(
                f"{source}: found no folder of a run (alignkit train --out FOLDER) and no registered model "
                "(alignkit list models); download another model of the hub and name its folder"
            )
        chosen = {f"sampler.{key}": value for key, value in own.items()} | chosen
    return Run(load_config(None, {**chosen, "model.name": str(source)}))


class Samples(list[Image.Image]):
    """Images, each with its prompt as `info["prompt"]`. A notebook shows them with their prompts."""

    def _repr_html_(self) -> str:
        return images_cell([(image, str(image.info.get("prompt", ""))) for image in self])


class Run(Parts):
    """One run. Nothing is loaded until it is needed; two runs share no state."""

    def __init__(self, config: RunConfig, folder: Path | None = None) -> None:
        super().__init__(config)
        self.folder = folder or Path(config.output or f"runs/{date.today()}-{config.algorithm.name}")
        """The run folder."""
        self.stopping = False
        self.rewrites = False
        """Whether the settings differ from those in the folder's run.toml and are to be written there."""
        self._existing = folder is not None
        self._begun = self._existing
        """Whether the run in the folder is this one."""
        self._unnamed = folder is None and not config.output
        self._policy: Policy | None = None
        self.weights: Mapping[str, Tensor] = {}
        """The trained weights to sample with, once there are any: those that the run exports once it has ended, until
        then their average."""

    @property
    def name(self) -> str:
        """Name in tables: that of its folder, or of the model if there is no folder yet."""
        return self.folder.name if self.has_folder else self.config.model.name

    @property
    def has_folder(self) -> bool:
        """Whether there is a run folder. That of an untrained model without a name would belong to another run."""
        return not self._unnamed and (self.folder / "run.toml").is_file()

    @property
    def title(self) -> str:
        """Method, model and rewards in a few words."""
        rewards = " and ".join(reward.name for reward in self.config.rewards)
        return f"{self.config.algorithm.name} on {self.config.model.name}{' for ' * bool(rewards)}{rewards}"

    def __repr__(self) -> str:
        update = last_update(self.folder) if self._begun else 0
        return f"<Run {self.folder}: {self.title}, update {update} of {self.config.train.updates}>"

    def _repr_html_(self) -> str:
        return run_cell(self._record())

    def _record(self) -> Record:
        """Return what is known of the run: the contents of its folder, before training its settings alone."""
        if self._begun and (self.folder / "metrics.jsonl").is_file():
            return read_record(self.folder)
        settings = parse_toml(to_toml(self.config))
        return Record(self.folder, self.name, settings, departure=self.departure())

    def plot(self, *metrics: str, against: str = UPDATES) -> Plot:
        """Plot the run so far: rewards at its points and the main metrics of training, or the `metrics` that are named.

        `against` is "updates", "samples" (scored images) or "minutes". Raises AlignkitError for a metric that the run
        does not have, and before the first update.
        """
        return plot(self._record(), metrics, against)

    def stop(self) -> None:
        """Make a running `train` save and end after the update under way."""
        self.stopping = True

    # training

    def train(
        self, console: Console | None = None, verbose: bool = False, progress: bool | None = None
    ) -> Iterator[Update]:
        """Train; yield after each update of the policy. Ends early, after saving, if `stop` was called.

        Progress is shown on `console`, with `verbose` every metric; without a console in the cell of a notebook, and
        else nowhere. With `progress` True it is shown in a terminal too, with False nowhere.

        Writes the run folder; a folder that holds a run is continued if this run was opened from it, else
        rejected. Raises AlignkitError for what the user can fix.
        """
        self.check()
        accelerator = self.accelerator()
        self._claim(accelerator)
        if not accelerator.is_main_process:
            progress = False
        with self._display(console, verbose, progress) as display:
            display.message(f"{self.folder}: {self.description()}")
            yield from self._train(accelerator, display)

    def _display(self, console: Console | None, verbose: bool, progress: bool | None) -> Display:
        total, warmup = self.config.train.updates, self.config.surrogate.warmup if self.config.surrogate else 0
        if progress is False:
            return Display(None, total, warmup)
        if console is None and in_notebook():
            return CellDisplay(self.title, self.folder, total, warmup)
        return Display(Console() if console is None and progress else console, total, warmup, verbose)

    def _train(self, accelerator: Accelerator, display: Display) -> Iterator[Update]:
        saved = self._newest_checkpoint()
        try:
            loop = Loop(self, self.folder, accelerator, display)
        except Exception:
            if not self._existing and accelerator.is_main_process:
                run_folder.release(self.folder)  # so that the next try is not refused
            raise
        self._policy, self.weights = loop.policy, loop.weights
        try:
            if saved is not None:
                loop.restore(saved)
            yield from loop.updates(lambda: self.stopping)
            self.weights = loop.weights
        except Exception as error:
            if not isinstance(error, AlignkitError) and (origin := responsible_plugin(error)):
                error.add_note(f"This was raised in code of {origin}.")
            raise
        finally:
            loop.close()

    def _claim(self, accelerator: Accelerator) -> None:
        """Claim the folder, in one process; a failure is raised in all, so that none waits for the others."""
        refused: AlignkitError | None = None
        if self._unnamed:
            self.folder = gather_object([run_folder.free(self.folder)])[0]
            self._unnamed = False  # a second `train` is rejected, as for a named folder
        if accelerator.is_main_process:
            try:
                if not self._existing:
                    run_folder.claim(self.folder, self.config)
                elif self.rewrites:
                    run_folder.write_settings(self.folder, self.config)
                run_folder.note_environment(self.folder)
            except AlignkitError as error:
                refused = error
        for reason in gather_object([refused]):
            if reason is not None:
                raise reason
        self._begun = True

    def accelerator(self) -> Accelerator:
        """Return the accelerator for the devices, precision and processes of `[train]`."""
        train = self.config.train
        # Accelerate keeps its first settings for the whole process; two runs in one may differ in precision.
        AcceleratorState._reset_state()
        return Accelerator(
            mixed_precision=train.precision,
            cpu=train.device == "cpu",
        )

    def _newest_checkpoint(self) -> Path | None:
        """Return the newest checkpoint; None for a new run, and for one that ended before its first checkpoint."""
        return checkpoint.latest(self.folder / "checkpoints") if self._existing else None

    def saved(self) -> str:
        """Return the manifest of the newest checkpoint, which identifies the trained weights; empty without one."""
        saved = self._newest_checkpoint()
        return (saved / checkpoint.MANIFEST).read_text(encoding="utf-8") if saved else ""

    def points(self) -> list[tuple[int, Path]]:
        """Return the updates of the points that kept their weights, and the folders that hold these."""
        folder = self.folder / "points"
        if not self.has_folder:
            return []
        found = [(update, folder / f"{update:06d}") for update in checkpoint.steps(folder) if update]
        return [(update, point) for update, point in found if any(point.glob("*.safetensors"))]

    def export(
        self,
        out: str | Path = "",
        format: Format = "diffusers",
        *,
        weights: Weights = "",
        checkpoint: int | None = None,
        scale: float = 1.0,
    ) -> Path:
        """Write the trained weights for other tools, as `alignkit.runs.export.export` does, and return the folder."""
        if not self.has_folder:
            raise AlignkitError("export: found no run folder; train one with alignkit train --out FOLDER")
        return export(self, self.folder, self.policy, out, format, weights=weights, checkpoint=checkpoint, scale=scale)

    # sampling

    def policy(self) -> Policy:
        """Load the model of this run, and its `weights` if it was trained."""
        if self._policy is None:
            saved = self._newest_checkpoint()
            if saved is None and self._existing:
                raise ConfigError(
                    f"{self.folder}: no checkpoint to sample from; train the run first with "
                    f"alignkit train --resume {self.folder}"
                )
            self._policy = self.load_policy(
                "cuda" if torch.cuda.is_available() and self.config.train.device != "cpu" else "cpu"
            )
            if saved is not None:
                self.weights = exported(checkpoint.load(saved))
        return self._policy

    def sample(self, prompts: Sequence[str], steps: int | None = None, seed: int = 0, count: int = 1) -> Samples:
        """Sample `count` images for each prompt, in that order. Returns a list, which a notebook shows as a grid.

        Image i of a seed starts from the same noise at any number of steps.
        """
        return Samples(image for batch in self.sample_batches(prompts, steps, seed, count) for image in batch)

    def sample_batches(
        self, prompts: Sequence[str], steps: int | None = None, seed: int = 0, count: int = 1
    ) -> Iterator[Samples]:
        """Yield the images of `sample`, `evaluate.batch_size` at a time."""
        sampler, policy = self.sampler(steps), self.policy()
        texts = [text for text in prompts for _ in range(count)]
        for start in range(0, len(texts), self.config.evaluate.batch_size):
            part = texts[start : start + self.config.evaluate.batch_size]
            with policy.using(self.weights):
                images = sample_images(policy, sampler, part, [(seed, start + i) for i in range(len(part))])
            array = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
            found = Samples()
            for text, pixels in zip(part, array, strict=True):
                found.append(Image.fromarray(pixels))
                found[-1].info["prompt"] = text
            yield found
