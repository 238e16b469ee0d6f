"""Show what runs changed: images of the same prompts and noise before training and after each run, with scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import torch
from PIL import Image as Pillow
from torch import Tensor

from alignkit.errors import AlignkitError
from alignkit.evaluation.rows import TOTAL, Row
from alignkit.page.record import Image, Record, read_record
from alignkit.runs.grid import EDGE, draw_grid
from alignkit.runs.points import load_images

TITLE = 46
"""Number of characters that fit above an image."""
SAME = 2.0
"""Largest mean difference, in levels of 0 to 255, of images that count as equal: machines round differently."""
EXPORTED = {"best": "best point", "average": "average of the end", "last": "average of the end, not the exported last"}
"""Words for the weights whose images are shown, by the rule by which the run exports."""


@dataclass(frozen=True)
class _Column:
    """A run, and its images at one number of steps: before training, and with the weights that it exports."""

    record: Record
    before: list[Image]
    after: list[Image]
    means: list[Row]
    """The rewards over all prompts: the trained one, and those held out without their parts."""
    shown: str
    """The weights that `after` is of."""

    @property
    def folder(self) -> Path:
        return self.record.folder

    @property
    def method(self) -> str:
        """The algorithm, and what of its settings is not the paper's."""
        name = str(self.record.section("algorithm").get("name", "unknown algorithm"))
        return f"{name} ({self.record.departure})" if self.record.departure else name

    @property
    def title(self) -> str:
        method = self.method
        if len(method) > TITLE:
            method = f"{method.partition(' (')[0]} (not the paper's)"
        return f"{method}\n{self.folder.name}: {self.shown}"

    def caption(self, place: int, changed: bool) -> str:
        """Return the scores of an image after training with their change, or those before."""
        before, after = self.before[place].scores, self.after[place].scores
        return ", ".join(
            _score(row.reward, after.get(row.reward), before.get(row.reward))
            if changed
            else _score(row.reward, before.get(row.reward))
            for row in self.means
        )


Pick = Literal["spread", "rise", "fall"]


def gallery(runs: Sequence[str | Path], rows: int = 8, steps: int | None = None, pick: Pick = "spread") -> Pillow.Image:
    """Show images that runs kept at their points: a row for each prompt, a column before training, one for each run.

    `runs` are folders of ended runs, `rows` the largest number of prompts, and `steps` the number of sampler steps, by
    default the first of the first run. With `pick` "spread", prompts are sorted by the trained reward before training,
    in the first run, of equals by their order in the file, and taken at evenly spaced quantiles; with "rise" and "fall"
    they are those whose trained reward rose or fell most, on average over the runs. A prompt without a score is left
    out, and the image says how prompts were picked. No model is loaded. Raises AlignkitError if a run has no points or
    has not ended, or if runs differ in prompts, noise or the images before training.
    """
    if not runs or rows < 1:
        raise AlignkitError(f"gallery: found {len(runs)} runs and {rows} rows, expected at least one of each")
    records = [read_record(Path(run)) for run in runs]
    number = min(_steps(records[0])) if steps is None else steps
    columns = [_column(record, number) for record in records]
    first, *others = columns
    for other in others:
        _check_alike(first, other)
    if pick == "spread":
        chosen = _quantiles([image.scores.get(TOTAL) for image in first.before], rows)
    else:
        chosen = _largest([_rise(columns, place) for place in range(len(first.before))], rows, pick == "fall")
    if not chosen:
        raise AlignkitError(f"{first.folder}: found no score before training, expected a trained reward")
    before = _images(first.before, chosen)
    model = Path(str(first.record.section("model").get("name", ""))).name
    for other in others:
        _check_images(first, other, before, _images(other.before, chosen))
    return draw_grid(
        torch.stack([before, *(_images(column.after, chosen) for column in columns)], dim=1),
        [first.before[place].prompt for place in chosen],
        [f"before\n{model}", *(column.title for column in columns)],
        EDGE,  # smaller images are enlarged to it by the next integer factor
        [[first.caption(p, False), *(column.caption(p, True) for column in columns)] for p in chosen],
        _notes(columns, len(chosen), number, pick),
    )


def _steps(record: Record) -> set[int]:
    """Return the numbers of steps of the images at the exported point. Raises AlignkitError if there are none."""
    folder = record.folder
    if record.exported is None:
        raise AlignkitError(f"{folder}: the run has not ended; resume it with alignkit train --resume {folder}")
    if not record.points:
        raise AlignkitError(
            f"{folder}: the run has no points, whose images are shown; train one with evaluate.points above 0, "
            "evaluate.prompts and a reward"
        )
    found = [record.points[update].images if update in record.points else {} for update in (0, record.end)]
    common = {number for _, number in found[0]} & {number for _, number in found[1]}
    if not common:
        reasons = "; ".join(fault for fault in record.faults if fault.startswith("points/"))
        why = f": {reasons}" if reasons else ", expected those that it kept when it trained"
        raise AlignkitError(f"{folder}: found no images of updates 0 and {record.end} in points/{why}")
    return common


def _column(record: Record, number: int) -> _Column:
    """Return the images of a run at a number of steps. Raises AlignkitError if there are none."""
    if number not in (found := _steps(record)):
        raise AlignkitError(
            f"{record.folder}: found images of {', '.join(map(str, sorted(found)))} steps, expected {number}; choose "
            "with --steps"
        )
    before, after = record.points[0].images, record.points[record.end].images
    places = sorted(place for place, steps in before.keys() & after.keys() if steps == number)
    rows = [row for row in record.points[record.end].rows if row.num_steps == number and "/" not in row.reward]
    exported = record.exported or {}
    shown = f"{EXPORTED.get(str(exported.get('weights')), 'exported')}, update {record.end} of {record.total}"
    return _Column(
        record,
        [before[place, number] for place in places],
        [after[place, number] for place in places],
        [row for row in rows if row.reward == TOTAL or row.held_out],
        shown,
    )


def _check_alike(one: _Column, other: _Column) -> None:
    """Raise AlignkitError if two runs were measured on different prompts or noise."""
    prompts = zip_longest((image.prompt for image in one.before), (image.prompt for image in other.before))
    for place, (expected, found) in enumerate(prompts):
        if expected != found:
            raise AlignkitError(
                f"{other.folder}: prompt {place} of its points is {_quoted(found)}, that of {one.folder} "
                f"{_quoted(expected)}; expected runs with the same evaluate.prompts and evaluate.points_limit"
            )
    seed, its = (column.record.section("evaluate").get("seed") for column in (one, other))
    if seed != its:
        raise AlignkitError(
            f"{other.folder}: evaluate.seed is {its}, that of {one.folder} {seed}; expected the same, for equal noise"
        )


def _quoted(prompt: str | None) -> str:
    return "missing" if prompt is None else repr(prompt)


def _check_images(one: _Column, other: _Column, before: Tensor, its: Tensor) -> None:
    """Raise AlignkitError if the images of two runs before training differ."""
    if before.shape != its.shape or (before.float() - its.float()).abs().mean((1, 2, 3)).max() > SAME:
        raise AlignkitError(
            f"{other.folder}: its images before training differ from those of {one.folder}; expected runs of one model "
            "with one sampler"
        )


def _quantiles(scores: Sequence[float | None], count: int) -> list[int]:
    """Return the places of at most `count` scores at evenly spaced quantiles, the lowest first."""
    places = [place for _, place in sorted((score, place) for place, score in enumerate(scores) if score is not None)]
    count = min(count, len(places))
    return [places[(2 * i + 1) * len(places) // (2 * count)] for i in range(count)]


def _rise(columns: Sequence[_Column], place: int) -> float | None:
    """Return the mean change of the trained reward of a prompt over the runs; None where a score is missing."""
    rises = []
    for column in columns:
        before, after = (images[place].scores.get(TOTAL) for images in (column.before, column.after))
        if before is None or after is None:
            return None
        rises.append(after - before)
    return sum(rises) / len(rises)


def _largest(values: Sequence[float | None], count: int, smallest: bool) -> list[int]:
    """Return the places of the `count` largest values, or of the smallest; of equals the first."""
    known = [(value if smallest else -value, place) for place, value in enumerate(values) if value is not None]
    return [place for _, place in sorted(known)[:count]]


def _images(kept: Sequence[Image], places: Sequence[int]) -> Tensor:
    return load_images([kept[place] for place in places])


def _score(name: str, value: float | None, before: float | None = None) -> str:
    words = name.replace("_", " ")
    if value is None:
        return f"{words} not scored"
    change = "" if before is None else f" ({round(value - before, 2) + 0.0:+.2f})"  # + 0.0: no -0.00
    return f"{words} {value:.2f}{change}"


def _notes(columns: Sequence[_Column], count: int, number: int, pick: Pick) -> list[str]:
    """State how the prompts were chosen, and what each run changed over all prompts of its points."""
    first, several = columns[0], len(columns) > 1
    how = (
        f"sorted by the reward before training{f' ({first.folder.name})' * several}, evenly spaced quantiles"
        if pick == "spread"
        else f"those whose reward {'rose' if pick == 'rise' else 'fell'} most{', mean of the runs' * several}: the "
        "extremes, and not typical"
    )
    notes = [
        f"{count} of {len(first.before)} held-out prompts at {number} step{'s' * (number > 1)}, the same noise in all "
        f"columns: {how}. In brackets: the change since before training."
    ]
    for column in columns:
        trained = " and ".join(str(reward.get("name")) for reward in column.record.settings.get("reward", ()))
        means = "; ".join(
            f"{row.reward.replace('_', ' ')} {row.before:.3f} to {row.after:.3f}, {row.difference:+.3f} "
            f"[{row.low:+.3f}, {row.high:+.3f}]"
            for row in column.means
        )
        notes.append(
            f"{column.folder.name}: {column.method}, {column.shown}, reward: {trained}. Means over all "
            f"{len(column.before)} prompts, with 95 % intervals of the change: {means}."
        )
        if any(_differ(mine.scores, its.scores) for mine, its in zip(first.before, column.before, strict=True)):
            notes.append(
                f"{column.folder.name} scores the images before training otherwise than {first.folder.name}, whose "
                "scores stand in the first column: compare changes, not values."
            )
    return notes


def _differ(one: Mapping[str, float | None], other: Mapping[str, float | None]) -> bool:
    mine, its = one.get(TOTAL), other.get(TOTAL)
    return mine is not None and its is not None and abs(mine - its) > 1e-3
