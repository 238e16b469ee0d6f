"""Points of a run: a few held-out prompts, measured and kept at evenly spaced updates."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from alignkit.data.decode import UNREADABLE, open_image
from alignkit.errors import AlignkitError
from alignkit.evaluation.choice import choose
from alignkit.evaluation.measure import Measurement, compare
from alignkit.evaluation.rows import Row
from alignkit.page.record import Image as PointImage
from alignkit.page.record import Record, read_images
from alignkit.records import Example
from alignkit.runs.grid import GRID, comparison, reduced

PNG_SIZE = 256
"""Largest edge of an image that is kept as PNG; larger ones are JPEG."""


def planned(count: int, updates: int) -> list[int]:
    """Return `count` evenly spaced updates, the last one included; all of them if there are fewer."""
    return sorted({-(-i * updates // count) for i in range(1, count + 1)} if updates else ())


class Points:
    """The points of a run so far, and the best weights among them."""

    def __init__(self, updates: Sequence[int], held_out: Sequence[str]) -> None:
        """`updates` are those to measure at, `held_out` the names of the held-out rewards."""
        self.updates, self._held_out = updates, held_out
        self.rows: dict[int, list[Row]] = {}
        """Rows by update, without the point before training."""
        self.best: dict[str, Tensor] | None = None
        """Weights of the point that `choose` returns; None if it returns none."""
        self._start: Measurement | None = None

    def due(self, last: int, now: int) -> bool:
        """Whether to measure after the updates in (last, now], or before training."""
        if self._start is None:
            return bool(self.updates)
        return now not in self.rows and any(last < update <= now for update in self.updates)

    def compare(self, found: Measurement) -> list[Row]:
        """Return the rows of a point, compared with the start if `found` is not the start itself."""
        if self._start is None:
            return compare(found, held_out=self._held_out)
        return compare(self._start, found, self._held_out)

    def add(self, update: int, found: Measurement, rows: Sequence[Row], average: Mapping[str, Tensor]) -> None:
        """Add a point, the first one being the start, and keep a copy of `average` if that is the best so far."""
        if self._start is None:
            self._start = replace(found, images=found.images[:0])
            return
        self.rows[update] = list(rows)
        if choose(self.rows).update == update:
            self.best = {name: value.detach().cpu().clone() for name, value in average.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {
            "start": self._start.state_dict() if self._start else None,
            "rows": {update: [asdict(row) for row in rows] for update, rows in self.rows.items()},
            "best": self.best,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._start = Measurement.from_state(state["start"]) if state["start"] else None
        self.rows = {update: [Row(**row) for row in rows] for update, rows in state["rows"].items()}
        self.best = state["best"]


def exported(state: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Return the weights that a checkpoint's run exports: of a run that has not ended, the average."""
    trainer, run = state["trainer"], state["run"]
    rule, weights = run.get("exported", "average"), trainer["average"]
    if rule == "last":
        weights = trainer["policy"]
    elif rule == "best" and run["points"]["best"] is not None:
        weights = run["points"]["best"]
    return dict(weights)


def write_point(
    folder: Path,
    found: Measurement,
    examples: Sequence[Example],
    steps: Sequence[int],
    export: Callable[[Path], object] | None = None,
) -> None:
    """Write the images and `scores.json` of a point into `folder`, and the weights with `export`.

    `found` holds the images (P, K, 3, H, W) of all P examples at K numbers of steps. Image files are named by the place
    of the prompt, from 0, and the number of steps. Raises AlignkitError if a file cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        ending = "png" if max(found.images.shape[-2:]) <= PNG_SIZE else "jpg"
        scores = []
        for place, example in enumerate(examples):
            for column, number in enumerate(steps):
                file = f"{place:03d}_{number}steps.{ending}"
                array = found.images[place, column].permute(1, 2, 0).numpy()
                Image.fromarray(array).save(partial / file, quality=95)
                values = {name: float(v[place]) for (k, name), v in found.values.items() if k == number}
                known = {name: value if math.isfinite(value) else None for name, value in values.items()}
                scores.append({"file": file, "prompt": example.text, "steps": number, "scores": known})
        (partial / "scores.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")
        if export is not None:
            export(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise AlignkitError(f"{folder}: could not be written ({error}); make room") from error


def load_images(kept: Sequence[PointImage]) -> Tensor:
    """Read images of points, reduced to `EDGE` pixels: (N, 3, h, w) uint8. Raises AlignkitError for a broken one."""
    found = []
    for file in (image.path for image in kept):
        try:
            with open_image(file) as image:
                found.append(reduced(image))
        except UNREADABLE as error:
            raise AlignkitError(f"{file}: cannot be read ({error}); expected an image as the run wrote it") from error
    return torch.stack(found)


def read_point(folder: Path, update: int) -> dict[tuple[int, int], PointImage]:
    """Read the images of a point of the run in `folder`, by place of the prompt and number of steps, in that order.

    Raises AlignkitError if there are none.
    """
    record = Record(folder, folder.name)
    found = read_images(record, update)
    if not found:
        raise AlignkitError(f"{folder}: no images of the point at {update} ({'; '.join(record.faults)})")
    return dict(sorted(found.items()))


Point = Mapping[tuple[int, int], PointImage]


def point_grid(start: Point, now: Point | None = None, names: Sequence[str] = ()) -> Image.Image:
    """Show the first `GRID` prompts of a point: before training, and next to that `now` if it is given.

    Both are as `read_point` returns them. `names` are the rewards whose scores stand under the images; by default all,
    without their parts. Raises AlignkitError if an image is missing.
    """
    steps = list(dict.fromkeys(number for _, number in start))
    keys = [key for key in start if key[0] < GRID]
    points = [start] if now is None else [start, now]
    missing = next((key for point in points for key in keys if key not in point), None)
    if missing is not None or len(keys) % len(steps):
        raise AlignkitError(f"{start[keys[0]].path.parent}: images are missing here or at a later point")
    columns = [load_images([point[key] for key in keys]).unflatten(0, (-1, len(steps))) for point in points]
    scores = [[point[key].scores for key in keys] for point in points]
    return comparison(columns, [start[key].prompt for key in keys[:: len(steps)]], steps, scores, names)
