"""Forward the record of a run to TensorBoard and Weights & Biases, through accelerate."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from accelerate.utils import gather_object
from PIL import Image

from alignkit.config.load import RunConfig, to_toml
from alignkit.errors import AlignkitError, ConfigError
from alignkit.files import write_file
from alignkit.page.gallery import COMPARED, change, small_pixels
from alignkit.page.record import EVENTS
from alignkit.runs.points import Point, point_grid, read_point

FOLDER = "trackers"
"""The folder of a run folder for the files of trackers."""
WANDB_ID = "wandb_id.txt"
"""Name of the file in `FOLDER` with the id of the run in Weights & Biases, by which a resumed run goes on in it."""
PROJECT = "alignkit"
"""The project of Weights & Biases that runs belong to."""
AXIS = "update"
"""Name of the horizontal axis in Weights & Biases, whose own steps may not go back."""
LARGEST = 2048
"""Largest edge of an image that is logged."""
SPEED = ("seconds", "images_per_second", "memory_gib")
HINTS = {"wandb": "; log in with wandb login, or set WANDB_MODE=offline in the environment"}
MEANS = {
    "mean": ("after", "before"), "mean_low": ("after_low", "before_low"), "mean_high": ("after_high", "before_high"),
    "difference": ("difference",), "difference_low": ("low",), "difference_high": ("high",),
}  # fmt: skip
"""Values of a row that are logged, and the fields that they are read from: the first that there is."""


class Trackers:
    """The trackers of a run, in its main process; in others, and if the run has none, all calls do nothing.

    Each value is logged at its update, from 1; evaluations and points before training are at 0, and rounds of the
    warm-up at 0 and below. A tracker that fails is left out from then on: the run itself does not need it.
    """

    def __init__(self, accelerator: Accelerator, config: RunConfig, folder: Path, after: int | None = None) -> None:
        """Start the trackers that `config` names; their files go to `folder / FOLDER`.

        `after` is the update that a resumed run goes on from, so that TensorBoard hides what it has of later ones;
        None: the run starts at the beginning. Raises ConfigError, in all processes, if one cannot start.
        """
        self._folder = folder
        self._warmup = config.surrogate.warmup if config.surrogate else 0
        self.rounds = 0
        """Rounds so far; read during the warm-up alone."""
        self._running: list[GeneralTracker] = []
        refused: list[ConfigError | None] = []
        for name in config.train.trackers:
            refused.append(None)
            if not accelerator.is_main_process:
                continue
            try:
                self._running.append(_start(name, config, folder, after))
            except Exception as error:  # trackers raise what they like: of a server, of a login, of the disk
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                refused[-1] = ConfigError(f"train.trackers: {name} could not start ({reason}){HINTS.get(name, '')}")
        for fault in gather_object(refused) if refused else ():
            if fault is not None:
                raise fault

    def record(self, record: Mapping[str, Any]) -> list[str]:
        """Log a record of `metrics.jsonl`; return a line for each tracker that failed."""
        if not self._running:
            return []
        place = int(record["step"])
        if EVENTS.isdisjoint(record) and place == 0:
            self.rounds += 1
            place = self.rounds - self._warmup
        values = dict(_values(record))
        faults = []
        if "point" in record:
            try:
                start, now = (read_point(self._folder, update) for update in (0, place))
                values |= _drift(start, now)
                faults += self.image("images/points", point_grid(start, now if place else None), place)
            except AlignkitError as error:
                faults.append(f"trackers: the images of the point at {place} were not logged ({error})")
        return faults + self._each(lambda tracker: _log(tracker, values, place))

    def image(self, name: str, image: Image.Image, place: int) -> list[str]:
        """Log an image, reduced to `LARGEST` pixels; return a line for each tracker that failed."""
        if not self._running:
            return []
        small = image.copy()
        small.thumbnail((LARGEST, LARGEST))
        return self._each(lambda tracker: _log_image(tracker, name, small, place))

    def close(self) -> list[str]:
        """Write what has not been written yet, and end; return a line for each tracker that failed."""
        faults = self._each(lambda tracker: tracker.finish())
        self._running = []
        return faults

    def _each(self, call: Callable[[Any], object]) -> list[str]:
        faults = []
        for tracker in [*self._running]:
            try:
                call(tracker)
            except Exception as error:
                self._running.remove(tracker)
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                faults.append(f"train.trackers: {tracker.name} failed and is left out from now on ({reason})")
        return faults


def _start(name: str, config: RunConfig, folder: Path, after: int | None) -> GeneralTracker:
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    if name == "tensorboard":
        board = TensorBoardTracker(FOLDER, folder, purge_step=-(2**31) if after is None else after + 1)
        board.start()
        text = "\n".join(f"    {line}" for line in to_toml(config).splitlines())  # indented: code in Markdown
        board.log({"settings": text}, step=0)
        return board
    kept = folder / FOLDER / WANDB_ID
    own_id = kept.read_text(encoding="utf-8").strip() if kept.exists() else ""
    if not own_id:
        own_id = uuid.uuid4().hex[:16]
        write_file(kept, own_id)
    wandb = WandBTracker(PROJECT, dir=str(folder / FOLDER), name=folder.name, id=own_id, resume="allow")
    wandb.start()
    wandb.store_init_configuration(dict(_flat(asdict(replace(config, stated=None)))))  # settings alone
    wandb.run.define_metric(AXIS)
    wandb.run.define_metric("*", step_metric=AXIS)
    return wandb


def _log(tracker: GeneralTracker, values: Mapping[str, float | str], place: int) -> None:
    if tracker.name == "wandb":
        tracker.log({**values, AXIS: place})
    else:
        tracker.log(dict(values), step=place)


def _log_image(tracker: TensorBoardTracker | WandBTracker, name: str, image: Image.Image, place: int) -> None:
    if tracker.name == "wandb":
        tracker.log({AXIS: place})
        tracker.log_images({name: [image]})
    else:
        tracker.log_images({name: np.asarray(image)[None]}, step=place, dataformats="NHWC")


def _values(record: Mapping[str, Any]) -> Iterator[tuple[str, float | str]]:
    """Yield names and values of a record; values that are missing or not finite are left out."""
    found: Iterator[tuple[str, Any]]
    kind = next((kind for kind in ("evaluation", "point") if kind in record), None)
    if kind is not None:
        found = (
            (f"{kind}/{row['reward']}/{row['num_steps']}_steps/{name}", value)
            for row in record[kind]
            for name, fields in MEANS.items()
            if (value := next((row[field] for field in fields if row[field] is not None), None)) is not None
        )
    elif "text" in record:
        found = iter([(next(key for key in ("verdict", "exported") if key in record), record["text"])])
    elif "warning" in record:
        found = iter([("warning", record["warning"])])
    else:
        names = (name for name in record if name != "step")
        found = ((f"{'speed' if name in SPEED else 'train'}/{name}", record[name]) for name in names)
    for name, value in found:
        if isinstance(value, str) or (isinstance(value, int | float) and math.isfinite(value)):
            yield name, value


def _drift(start: Point, now: Point) -> dict[str, float]:
    """Return by number of steps the mean change of pixels since before training, as the page shows it."""
    changes: dict[int, list[float]] = {}
    for key in (key for key in start if key in now):
        found = changes.setdefault(key[1], [])
        if len(found) < COMPARED:
            found.append(change(small_pixels(start[key].path), small_pixels(now[key].path)))
    means = {f"drift/{steps}_steps": sum(found) / len(found) for steps, found in changes.items()}
    return {name: mean for name, mean in means.items() if math.isfinite(mean)}


def _flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, int | float | str]]:
    """Yield the values of a config under dotted keys, as trackers take them: numbers, strings, and JSON of the rest."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value if isinstance(value, int | float | str) else json.dumps(value)
