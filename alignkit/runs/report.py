"""Record and show the progress of a run: `metrics.jsonl`, the display, image grids, the page at the end."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import torch
from PIL import Image
from rich.text import Text

from alignkit.errors import AlignkitError
from alignkit.evaluation.hacking import verdict
from alignkit.evaluation.rows import Row
from alignkit.evaluation.table import one_line, table
from alignkit.files import write_file
from alignkit.page.page import keep_page
from alignkit.page.record import EVENTS
from alignkit.runs.display import Display
from alignkit.runs.trackers import Trackers

SAMPLES = "samples"
"""The folder of a run folder that keeps image grids."""
STOPPED = "stopped.png"
"""The image grid of a run that was stopped."""


class Report:
    """The record of one run in `folder`, shown on `display`.

    `metrics.jsonl` has one JSON object per line, in the order of events: an update {"step", metrics..., "seconds",
    "images_per_second", "memory_gib"}, an evaluation {"step", "evaluation": [...]}, its verdict on reward hacking
    {"step", "verdict", "text"}, a point {"step", "point": [...], "seconds"}, the exported weights {"step", "exported":
    update, "weights": "best", "average" or "last", "text"} or a warning {"step", "warning"}; a value that is not finite
    is null. To resume from a checkpoint, pass the `lines` of the report at that time: later lines are dropped, so the
    file becomes that of an uninterrupted run except for times and memory. Only one of several processes `writes`.
    `trackers` get all of it as well.

    As a context, it writes the page about the run at the end, also after an AlignkitError or where the caller leaves.
    """

    def __init__(
        self, folder: Path, display: Display, lines: int = 0, writes: bool = True, trackers: Trackers | None = None
    ) -> None:
        self.folder, self._display, self._writes, self._trackers = folder, display, writes, trackers
        self._path = folder / "metrics.jsonl"
        kept = self._path.read_text(encoding="utf-8").splitlines(keepends=True)[:lines] if lines else []
        if len(kept) < lines or (kept and not kept[-1].endswith("\n")):
            raise AlignkitError(f"{self._path}: found {len(kept)} lines, expected the {lines} of the checkpoint")
        if writes:
            write_file(self._path, "".join(kept))
            (folder / SAMPLES / STOPPED).unlink(missing_ok=True)  # the run goes on
        self.lines = len(kept)
        """Lines in `metrics.jsonl`."""
        records = [json.loads(line) for line in kept]
        self._warnings = {record["warning"] for record in records if "warning" in record}
        self.step = max((record["step"] for record in records), default=0)
        for record in records:
            if EVENTS.isdisjoint(record):
                display.seen(record["step"], {name: value for name, value in record.items() if value is not None})
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fault in self._trackers.close() if self._trackers is not None else ():
            self.warn(fault)
        if self._writes and (kind is None or issubclass(kind, AlignkitError | GeneratorExit)):
            keep_page(self.folder, self.warn)

    def update(self, step: int, metrics: Mapping[str, float], images: int = 0) -> None:
        """Record an update that has just ended, and the number of images scored in it. Step 0 is the warm-up."""
        seconds = time.monotonic() - self._last
        self.step = step
        speed = {"images_per_second": images / seconds} if images and seconds else {}
        known = {**metrics, "seconds": seconds, **speed, "memory_gib": memory_gib()}
        self._append({"step": step, **known})
        self._display.update(step, known, seconds)
        self._last = time.monotonic()

    def end_round(self) -> None:
        """Show the round that has ended."""
        self._display.end_round()

    def warn(self, message: str) -> None:
        """Show and record a message, once per run."""
        if message in self._warnings:
            return
        self._warnings.add(message)
        self._append({"step": self.step, "warning": message})
        self._display.message(Text(f"warning: {message}", style="yellow"))

    def evaluation(self, step: int, rows: Sequence[Row], weights: int | None = None) -> None:
        """Record and show an evaluation, and its verdict on reward hacking if there are held-out rewards.

        `weights` is the update whose weights were evaluated; by default the last.
        """
        if not rows:
            return
        self._append({"step": step, "evaluation": [asdict(row) for row in rows]})
        update = step if weights is None else weights
        title = f"after {update} of {self._display.total} updates" if update else "before training"
        self._display.message(table(rows, title=title), detail=not update)
        if (found := verdict(rows)) is not None:
            self._append({"step": step, "verdict": found.outcome, "text": found.text})
            self._display.message(Text(found.text, style="bold red" if found.outcome == "hacking" else ""))
        self._last = time.monotonic()

    def point(self, step: int, rows: Sequence[Row]) -> None:
        """Record a point and show it in one line."""
        if not rows:
            return
        seconds = time.monotonic() - self._last
        self._append({"step": step, "point": [asdict(row) for row in rows], "seconds": seconds})
        found = verdict(rows)
        hacking = found is not None and found.outcome == "hacking"
        self._display.point(step, rows)
        line = f"point {step}/{self._display.total}  {one_line(rows)}{'  reward hacking' * hacking}"
        self._display.message(Text(line, style="bold red" if hacking else ""), detail=not hacking)
        self._last = time.monotonic()

    def exported(self, step: int, update: int, weights: str, text: str) -> None:
        """Record and show the update whose weights are exported."""
        self._append({"step": step, "exported": update, "weights": weights, "text": text})
        self._display.message(Text(text))

    def grid(self, step: int, sheet: Image.Image, stopped: bool = False) -> Path:
        """Save a grid of images as `samples/<step>.png`, or as `samples/stopped.png` if the run is `stopped`."""
        path = self.folder / SAMPLES / (STOPPED if stopped else f"{step:06d}.png")
        if self._writes:
            content = io.BytesIO()
            sheet.save(content, "PNG")
            write_file(path, content.getvalue())
            if self._trackers is not None and not stopped:
                for fault in self._trackers.image("images/evaluation", sheet, step):
                    self.warn(fault)
        self._last = time.monotonic()
        return path

    def _append(self, record: Mapping[str, Any]) -> None:
        if not self._writes:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        except OSError as error:
            raise AlignkitError(f"{self._path}: could not be written ({error.strerror})") from error
        self.lines += 1
        self._display.record(record)
        for fault in self._trackers.record(_finite(record)) if self._trackers is not None else ():
            self.warn(fault)


def memory_gib() -> float:
    """Return the peak memory of tensors on the GPU so far; without a GPU, the memory of the process now."""
    used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
    return float(used) / 2**30


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value
