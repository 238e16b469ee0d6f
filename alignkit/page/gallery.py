"""The images of the page: prompts in four orders, before and after training, and over the points of a run."""

from __future__ import annotations

import base64
import io
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image as Pillow
from PIL import features

from alignkit.page.record import Array, Record, trained

ORDERS = ("best", "worst", "most changed", "random")
"""Prompts by the largest rise and the largest fall of the trained reward, by the change of pixels, and at random."""
PER_ORDER = 12
SEED = 0
"""Seed of the random order."""
SHARP = 128
"""Largest edge of an image that is embedded as it is."""
LARGE, SMALL = 320, 128
"""Largest edges of other images, in the gallery and in the strip."""
MARKUP = 500
"""Characters around an image in the page, with its label."""
COMPARED = 16
"""Prompts over which the change of pixels is measured at every point."""
BROKEN = (OSError, ValueError, SyntaxError, Pillow.DecompressionBombError)
"""Errors of files that are no images."""


@dataclass(frozen=True)
class Shown:
    """An image in the page."""

    data: str
    """A data URL; empty: the file is missing or could not be read."""
    scores: Mapping[str, float]
    steps: int
    sharp: bool = False
    """Whether its pixels are enlarged without smoothing."""
    label: str = ""
    """Text in front of the score."""
    marked: bool = False
    """Whether it has a frame."""
    held_out: float | None = None
    """Score of the first held-out reward."""

    @property
    def main(self) -> float | None:
        """The trained reward."""
        return trained(self.scores)


@dataclass(frozen=True)
class Line:
    """Images of one set of weights, by number of steps, or of one number of steps, by point."""

    label: str
    run: int
    """Place of the run, from 0; -1: before training, for all runs."""
    images: Sequence[Shown]
    base: int | None = None
    """Place of the line to compare with; None: none."""


@dataclass(frozen=True)
class Card:
    """A prompt with its images."""

    prompt: str
    lines: Sequence[Line]
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Its place in each of `ORDERS` that it belongs to, from 0."""


class Budget:
    """Room for images in the page, in characters."""

    def __init__(self, room: int) -> None:
        self.room = room

    def take(self, card: Card) -> bool:
        """Take the room of a card; False, and nothing taken, if there is too little."""
        images = [image for line in card.lines for image in line.images]
        texts = sum(6 * len(name) + 40 for image in images for name in image.scores)  # 6: of an escaped character
        size = sum(len(image.data) + MARKUP for image in images) + texts + 6 * len(card.prompt)
        if size > self.room:
            return False
        self.room -= size
        return True


def embed(path: Path, largest: int) -> tuple[str, bool]:
    """Return a data URL of an image, and whether its pixels may be seen.

    An image whose edges are at most `SHARP` is embedded as it is, a larger one at an edge of at most `largest`. The URL
    is empty if the file cannot be read.
    """
    try:
        with Pillow.open(path) as opened:
            opened.draft("RGB", (largest, largest))
            image = opened.convert("RGB")
    except BROKEN:
        return "", False
    return encode(image, largest)


def encode(image: Pillow.Image, largest: int) -> tuple[str, bool]:
    """Return a data URL of an image, and whether its pixels may be seen, as `embed` does."""
    image = image.convert("RGB")
    sharp, content = max(image.size) <= SHARP, io.BytesIO()
    kind = "png" if sharp else "webp" if features.check("webp") else "jpeg"
    if not sharp:
        image.thumbnail((largest, largest), Pillow.Resampling.LANCZOS)
    image.save(content, kind, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}", sharp


def small_pixels(path: Path) -> Array | None:
    """Return the pixels of an image at an edge of at most 64, in [0, 1]; None if it cannot be read."""
    try:
        with Pillow.open(path) as opened:
            opened.draft("RGB", (64, 64))
            small = opened.convert("RGB")
            small.thumbnail((64, 64))
    except BROKEN:
        return None
    return np.asarray(small, dtype=np.float64) / 255


def change(before: Array | None, after: Array | None) -> float:
    """Return the root mean square of the change of `small_pixels`, 0 to 1; NaN if one of both could not be read."""
    if before is None or after is None or before.shape != after.shape:
        return math.nan
    return float(np.sqrt(np.mean((before - after) ** 2)))


def drift(record: Record, steps: int) -> dict[int, float]:
    """Return by point the mean change of pixels from the images before training, at a number of steps."""
    start = record.points[0].images if 0 in record.points else {}
    keys = sorted(key for key in start if key[1] == steps)[:COMPARED]
    before = {key: small_pixels(start[key].path) for key in keys}
    found = {}
    for update, point in record.points.items():
        changes = [change(before[key], small_pixels(point.images[key].path)) for key in keys if key in point.images]
        if known := [value for value in changes if not math.isnan(value)]:
            found[update] = sum(known) / len(known)
    return found


def shared(records: Sequence[Record]) -> tuple[list[int], list[int]]:
    """Return places of prompts and numbers of steps with images before and after training in all of the runs, with the
    same prompts."""
    common: set[tuple[int, int, str]] | None = None
    for record in records:
        if not record.end or 0 not in record.points:
            return [], []
        before, after = record.points[0].images, record.points[record.end].images
        here = {(*key, before[key].prompt) for key in before.keys() & after.keys()}
        common = here if common is None else common & here
    keys = {(place, number) for place, number, _ in common or ()}
    steps = sorted({number for _, number in keys})
    return sorted({place for place, _ in keys if all((place, number) in keys for number in steps)}), steps


def ordered(records: Sequence[Record], places: Sequence[int], steps: Sequence[int]) -> dict[str, list[int]]:
    """Return places of prompts by name of the order; rise and change are means over runs and numbers of steps."""
    rises, changes = {}, {}
    for place in places:
        keys = [(place, number) for number in steps]
        both = [(r.points[0].images[key], r.points[r.end].images[key]) for r in records for key in keys]
        scores = [(trained(before.scores), trained(after.scores)) for before, after in both]
        risen = [after - before for before, after in scores if before is not None and after is not None]
        if risen:
            rises[place] = sum(risen) / len(risen)
        changed = [change(small_pixels(before.path), small_pixels(after.path)) for before, after in both]
        changes[place] = float(np.nan_to_num(changed).mean())
    by_rise = sorted(rises, key=rises.__getitem__)
    return {
        "best": by_rise[::-1],
        "worst": by_rise,
        "most changed": sorted(changes, key=changes.__getitem__, reverse=True),
        "random": random.Random(SEED).sample(list(places), len(places)),
    }


def gallery(
    records: Sequence[Record], orders: Mapping[str, Sequence[int]], steps: Sequence[int], budget: Budget
) -> list[Card]:
    """Return the cards of the first prompts of every order, as many as there is room for."""
    cards: dict[int, Card] = {}
    ranks: dict[int, dict[str, int]] = {}
    for rank in range(PER_ORDER):
        for name, places in orders.items():
            if rank >= len(places):
                continue
            place = places[rank]
            if place not in cards:
                card = Card(records[0].points[0].images[place, steps[0]].prompt, _lines(records, place, steps))
                if not budget.take(card):
                    return [Card(c.prompt, c.lines, ranks[p]) for p, c in cards.items()]
                cards[place] = card
            ranks.setdefault(place, {})[name] = rank
    return [Card(card.prompt, card.lines, ranks[place]) for place, card in cards.items()]


def _lines(records: Sequence[Record], place: int, steps: Sequence[int]) -> list[Line]:
    """Return the images before training, once if they are the same in all runs, and those of each run after it."""
    starts, ends = ([[_shown(r, update, place, n) for n in steps] for r in records] for update in (0, None))
    if all(start == starts[0] for start in starts):
        lines = [Line("before", -1, starts[0])]
        several = len(records) > 1
        return lines + [Line(r.name if several else "after", i, ends[i], base=0) for i, r in enumerate(records)]
    lines = []
    for run, record in enumerate(records):
        lines.append(Line(f"{record.name}, before", run, starts[run]))
        lines.append(Line(record.name, run, ends[run], base=2 * run))
    return lines


def _shown(record: Record, update: int | None, place: int, steps: int, strip: bool = False) -> Shown:
    """Return an image of the point `update`; None: of the run's end."""
    point = record.end if update is None else update
    image = record.points[point].images.get((place, steps))
    label = f"{point:,}" if strip else ""
    if image is None:
        return Shown("", {}, steps, label=label)
    data, sharp = embed(image.path, SMALL if strip else LARGE)
    held_out = next((image.scores[name] for name in record.held_out if name in image.scores), None)
    marked = strip and record.exported is not None and point == record.end
    return Shown(data, image.scores, steps, sharp, label, marked, held_out)


def strips(records: Sequence[Record], places: Sequence[int], steps: Sequence[int], budget: Budget) -> list[Card]:
    """Return for each prompt its images at every point: a line for each run and number of steps."""
    cards = []
    for place in places:
        lines = []
        for run, record in enumerate(records):
            name = f"{record.name}, " if len(records) > 1 else ""
            for count in steps:
                images = [_shown(record, update, place, count, strip=True) for update in record.points]
                lines.append(Line(f"{name}{count} step{'s' * (count > 1)}", run, images))
        card = Card(records[0].points[0].images[place, steps[0]].prompt, lines)
        if not budget.take(card):
            break
        cards.append(card)
    return cards
