"""The record of a run, read from its folder: settings, machine, `metrics.jsonl` and the files of its points."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from alignkit.config.recipes import departure_of
from alignkit.errors import AlignkitError
from alignkit.evaluation.rows import TOTAL, Row
from alignkit.files import parse_json, parse_toml, read_json, read_text

Array = np.ndarray[Any, np.dtype[np.float64]]
UPDATES, SAMPLES, MINUTES = "updates", "samples", "minutes"
AXES = (UPDATES, SAMPLES, MINUTES)
"""Measures of progress."""
EVENTS = frozenset({"evaluation", "verdict", "point", "exported", "warning"})
"""Keys that set other records of `metrics.jsonl` apart from those of updates."""
TIMES = ("step", "seconds")
OPTIONAL = ("after", "difference", "low", "high", "before_low", "before_high", "after_low", "after_high")
"""Numbers of an evaluation's row that may be missing."""
TAIL = 2**18
"""Bytes at the end of `metrics.jsonl` that hold at least one record."""
IMAGE_FILE = re.compile(r"(\d+)_(\d+)steps\.\w+")


@dataclass(frozen=True)
class Image:
    """An image of a point."""

    path: Path
    prompt: str
    scores: Mapping[str, float]
    """By name of the reward or part; those that could not be scored are missing."""


@dataclass(frozen=True)
class Point:
    """A point of a run."""

    place: Mapping[str, float]
    """Its place on each of `AXES`."""
    rows: Sequence[Row]
    images: Mapping[tuple[int, int], Image]
    """By place of the prompt and number of steps; empty if the files are not there."""


@dataclass
class Record:
    """All that the page shows of one run. Nothing in it is loaded with a model."""

    folder: Path
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Contents of `run.toml`."""
    settings_text: str = ""
    departure: str = ""
    """The part of the settings that is not the paper's; empty: none."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    metrics: dict[str, Array] = field(default_factory=dict)
    """By name: a value for each update, NaN where there is none."""
    unknown: dict[str, int] = field(default_factory=dict)
    """By name of the metric: the number of updates in which it was measured and not finite."""
    axes: dict[str, Array] = field(default_factory=dict)
    """By name of `AXES`: the place of each update. Rounds of the warm-up lie at update 0 and below."""
    evaluations: dict[int, list[Row]] = field(default_factory=dict)
    points: dict[int, Point] = field(default_factory=dict)
    verdict: tuple[str, str] | None = None
    """Outcome and text of the last verdict on reward hacking."""
    exported: Mapping[str, Any] | None = None
    """The record of the exported weights; None: the run has not ended."""
    warnings: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """A line for everything that could not be read."""

    @property
    def last(self) -> int:
        """The last update; 0 if there is none."""
        return int(max(self.axes[UPDATES], default=0)) if self.axes else 0

    @property
    def total(self) -> int:
        """The updates that the run is to have; the last one if the settings do not say."""
        planned = self.section("train").get("updates")
        return planned if isinstance(planned, int) else self.last

    @property
    def compared(self) -> list[Row]:
        """Rows with the values after training: of the last evaluation, else of the exported or last point."""
        evaluated = [rows for _, rows in sorted(self.evaluations.items()) if any(row.after is not None for row in rows)]
        if evaluated:
            return evaluated[-1]
        return list(self.points[self.end].rows) if self.end else []

    @property
    def source(self) -> str:
        """The origin of `compared`, in words."""
        if any(row.after is not None for rows in self.evaluations.values() for row in rows):
            return "the last evaluation"
        return f"the point at update {self.end:,}" if self.end else "the evaluation before training"

    @property
    def end(self) -> int:
        """The point whose weights are exported; the last point if they belong to none, 0 if there is none."""
        update = self.exported.get("exported") if self.exported else None
        return update if update in self.points else max(self.points, default=0)

    @property
    def held_out(self) -> list[str]:
        """Names of the held-out rewards, without their parts."""
        rows = [*self.compared, *(row for point in self.points.values() for row in point.rows)]
        return list(dict.fromkeys(row.reward for row in rows if row.held_out and "/" not in row.reward))

    def section(self, name: str) -> Mapping[str, Any]:
        """Return a section of the settings; empty if it is missing."""
        found = self.settings.get(name, {})
        return found if isinstance(found, Mapping) else {}


def read_record(folder: Path) -> Record:
    """Read the folder of a run. Raises AlignkitError if it holds no `metrics.jsonl`."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise AlignkitError(
            f"{folder}: no metrics.jsonl here; expected the folder of a run (alignkit train --out FOLDER)"
        )
    record = Record(folder, folder.resolve().name)
    _read_settings(record)
    try:
        found = read_json(folder / "environment.json")
        record.environment = found if isinstance(found, Mapping) else {}
    except (OSError, ValueError) as error:
        record.faults.append(f"environment.json: {_reason(error)}, so machine and commit are not shown")
    _read_metrics(record, path)
    return record


def last_update(folder: Path) -> int:
    """Return the last update in `metrics.jsonl`, from its end alone; 0 if there is none."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        with suppress(ValueError, KeyError, TypeError, OverflowError):
            return int(parse_json(line, halves=True)["step"])
    return 0


def _read_settings(record: Record) -> None:
    path = record.folder / "run.toml"
    try:
        record.settings_text = read_text(path)
        record.settings = parse_toml(record.settings_text)
    except (OSError, ValueError) as error:
        record.faults.append(f"run.toml: {_reason(error)}, so settings are not shown")
        return
    recipe = str(record.settings.get("recipe", ""))
    try:
        record.departure = departure_of(recipe, _plugins(record.settings))
    except AlignkitError as error:  # a plugin of the run is not on this machine
        reason = str(error).splitlines()[0]
        record.faults.append(f"run.toml: additions to the paper were not looked for ({reason})")


def _plugins(settings: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield kind, name and fields of the plugins that may depart from a paper."""
    for kind in ("algorithm", "sampler", "surrogate", "regulariser"):
        found = settings.get(kind, [])
        for one in found if isinstance(found, list) else [found]:
            if isinstance(one, Mapping) and "name" in one:
                yield kind, str(one["name"]), one


def _read_metrics(record: Record, path: Path) -> None:
    layouts: dict[tuple[str, ...], tuple[list[int], list[list[Any]]]] = {}  # places and values of updates, by keys
    places: list[tuple[int, float, float]] = []
    points: dict[int, tuple[list[Row], float, float]] = {}
    samples, seconds, broken = 0.0, 0.0, 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                event = parse_json(line, halves=True)
                step = int(event["step"])
            except (ValueError, KeyError, TypeError, OverflowError):
                broken += 1
                continue
            spent = _finite(event.get("seconds")) or 0.0
            if "seconds" in event and EVENTS.isdisjoint(event):
                seconds += spent
                samples += (_finite(event.get("images_per_second")) or 0.0) * spent
                where, values = layouts.setdefault(tuple(event), ([], []))
                where.append(len(places))
                values.append(list(event.values()))
                places.append((step, samples, seconds / 60))
            elif "warning" in event:
                record.warnings.append(str(event["warning"]))
            elif "verdict" in event:
                record.verdict = str(event["verdict"]), str(event.get("text", ""))
            elif "exported" in event:
                record.exported = event
            elif rows := list(rows_of(event.get("point", event.get("evaluation")))):
                if "point" in event:
                    seconds += spent
                    points[step] = rows, samples, seconds / 60
                else:
                    record.evaluations[step] = rows
    if broken:
        record.faults.append(f"metrics.jsonl: {broken} line{'s' * (broken > 1)} could not be read")
    for names, (where, values) in layouts.items():
        for name, column in zip(names, _numbers(values).T, strict=True):
            if name not in TIMES:
                record.metrics.setdefault(name, np.full(len(places), math.nan))[where] = column
                record.unknown[name] = record.unknown.get(name, 0) + int(np.count_nonzero(np.isnan(column)))
    if places:
        record.axes = dict(zip(AXES, np.array(places, dtype=np.float64).T, strict=True))
        warmup = int(np.sum(record.axes[UPDATES] <= 0))
        record.axes[UPDATES][:warmup] = np.arange(1 - warmup, 1)
    for update, (rows, scored, minutes) in sorted(points.items()):
        place = dict(zip(AXES, (float(update), scored, minutes), strict=True))
        record.points[update] = Point(place, rows, read_images(record, update))


def _numbers(rows: list[list[Any]]) -> Array:
    """Return values as an array, NaN for what is no number."""
    try:
        return np.array(rows, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return np.array([[value if isinstance(value, float) else math.nan for value in row] for row in rows])


def rows_of(found: Any) -> Iterator[Row]:
    """Yield the rows of an evaluation or point that are complete; a mean that is null is NaN."""
    for item in found if isinstance(found, list) else ():
        with suppress(AttributeError, TypeError, ValueError, KeyError):
            ends: dict[str, Any] = {name: _finite(item.get(name)) for name in OPTIONAL}
            before = _finite(item["before"])
            yield Row(
                str(item["reward"]),
                int(item["num_steps"]),
                int(item["count"]),
                math.nan if before is None else before,
                held_out=bool(item.get("held_out", False)),
                **ends,
            )


def read_images(record: Record, update: int) -> dict[tuple[int, int], Image]:
    """Read the images of a point, by place of the prompt and number of steps, and add to the faults of `record`."""
    folder = record.folder / "points" / f"{update:06d}"
    try:
        entries = read_json(folder / "scores.json", halves=True)
    except (OSError, ValueError) as error:
        record.faults.append(f"points/{folder.name}/scores.json: {_reason(error)}, so its images are not shown")
        return {}
    images = {}
    for entry in entries if isinstance(entries, list) else ():
        # The whole name must match, so none leads out of the folder.
        match = IMAGE_FILE.fullmatch(str(entry.get("file"))) if isinstance(entry, Mapping) else None
        if match is not None and (path := folder / match[0]).is_file():
            scores = entry.get("scores")
            known = scores if isinstance(scores, Mapping) else {}
            finite = {name: value for name, found in known.items() if (value := _finite(found)) is not None}
            images[int(match[1]), int(match[2])] = Image(path, str(entry.get("prompt", "")), finite)
    return images


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _reason(error: OSError | ValueError) -> str:
    return "missing" if isinstance(error, FileNotFoundError) else f"could not be read ({error})".replace("\n", " ")


def trained(scores: Mapping[str, float]) -> float | None:
    """Return the trained reward of an image; of a run without one, the first score; None if it has no score."""
    return scores.get(TOTAL, next(iter(scores.values()), None))


def value_of(row: Row) -> float:
    """Return the mean of a row after training, or before if there is none after."""
    return row.before if row.after is None else row.after
