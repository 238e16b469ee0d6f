"""Record and show the progress of a run: `metrics.jsonl`, the live table, image grids, the page at the end."""

from __future__ import annotations

import io
import json
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from torch import Tensor

from alignkit.errors import AlignkitError
from alignkit.evaluation.hacking import verdict
from alignkit.evaluation.rows import Row
from alignkit.evaluation.table import one_line, table
from alignkit.files import write_file
from alignkit.page.page import keep_page
from alignkit.runs.grid import draw_grid

FIRST = ("reward", "surrogate_score", "pair_accuracy", "rank_correlation", "surrogate", "loss", "grad_norm")
"""Order in which metrics are shown, by prefix. Other metrics follow."""
WINDOW = 20
"""Number of updates in the running mean of the table."""


class Report:
    """The record of one run in `folder`, and its display on `console` (None: nothing is shown).

    `metrics.jsonl` has one JSON object per line, in the order of events: an update {"step", metrics..., "seconds",
    "images_per_second"}, an evaluation {"step", "evaluation": [...]}, its verdict on reward hacking {"step", "verdict",
    "text"}, a point {"step", "point": [...], "seconds"}, the exported weights {"step", "exported": update, "weights":
    "best", "average" or "last", "text"} or a warning {"step", "warning"}; a value that is not finite is null. To resume
    from a checkpoint, pass the `lines` of the report at that time: later lines are dropped, so the file becomes that of
    an uninterrupted run except for times. Only one of several processes `writes`.

    As a context, it writes the page about the run at the end, also after an AlignkitError.
    """

    def __init__(self, folder: Path, console: Console | None, total: int, lines: int = 0, writes: bool = True) -> None:
        self.folder, self.console, self.total, self._writes = folder, console if writes else None, total, writes
        self.step = 0
        self._path = folder / "metrics.jsonl"
        kept = self._path.read_text(encoding="utf-8").splitlines(keepends=True)[:lines] if lines else []
        if len(kept) < lines or (kept and not kept[-1].endswith("\n")):
            raise AlignkitError(f"{self._path}: found {len(kept)} lines, expected the {lines} of the checkpoint")
        if writes:
            write_file(self._path, "".join(kept))
        self.lines = len(kept)
        """Lines in `metrics.jsonl`."""
        records = [json.loads(line) for line in kept]
        self._warnings = {record["warning"] for record in records if "warning" in record}
        self.step = max((record["step"] for record in records), default=0)
        self._recent: dict[str, deque[float]] = {}
        self._first_step, self._started = self.step, time.monotonic()
        self._last = self._started
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self.console is not None and self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._writes and (kind is None or issubclass(kind, AlignkitError)):
            keep_page(self.folder, self.warn)

    def update(self, step: int, metrics: Mapping[str, float], images: int = 0) -> None:
        """Record an update that has just ended, and the number of images scored in it. Step 0 is the warm-up."""
        now = time.monotonic()
        seconds = now - self._last
        if step == 0:
            self._started = now
        self.step = step
        times = {"seconds": seconds} | ({"images_per_second": images / seconds} if images and seconds else {})
        self._append({"step": step, **metrics, **times})
        for name, value in {**metrics, **times}.items():
            self._recent.setdefault(name, deque(maxlen=WINDOW)).append(value)
        self._show()
        self._last = time.monotonic()

    def note(self, message: str) -> None:
        """Show a message, without a record."""
        self._print(Text(message))

    def warn(self, message: str) -> None:
        """Show and record a message, once per run."""
        if message in self._warnings:
            return
        self._warnings.add(message)
        self._append({"step": self.step, "warning": message})
        self._print(Text(f"warning: {message}", style="yellow"))

    def evaluation(self, step: int, rows: Sequence[Row], weights: int | None = None) -> None:
        """Record and show an evaluation, and its verdict on reward hacking if there are held-out rewards.

        `weights` is the update whose weights were evaluated; by default the last.
        """
        if not rows:
            return
        self._append({"step": step, "evaluation": [asdict(row) for row in rows]})
        update = step if weights is None else weights
        self._print(table(rows, title=f"after {update} of {self.total} updates" if update else "before training"))
        if (found := verdict(rows)) is not None:
            self._append({"step": step, "verdict": found.outcome, "text": found.text})
            self._print(Text(found.text, style="bold red" if found.outcome == "hacking" else ""))
        self._last = time.monotonic()

    def point(self, step: int, rows: Sequence[Row]) -> None:
        """Record a point and show it in one line."""
        if not rows:
            return
        seconds = time.monotonic() - self._last
        self._append({"step": step, "point": [asdict(row) for row in rows], "seconds": seconds})
        found = verdict(rows)
        hacking = found is not None and found.outcome == "hacking"
        line = f"point {step}/{self.total}  {one_line(rows)}{'  reward hacking' * hacking}"
        self._print(Text(line, style="bold red" if hacking else ""))
        self._last = time.monotonic()

    def exported(self, step: int, update: int, weights: str, text: str) -> None:
        """Record and show the update whose weights are exported."""
        self._append({"step": step, "exported": update, "weights": weights, "text": text})
        self._print(Text(text))

    def grid(self, step: int, images: Tensor, prompts: Sequence[str], columns: Sequence[str]) -> Path:
        """Save images (P, M, 3, H, W), uint8 or in [0, 1], as `samples/<step>.png`: one row per prompt."""
        path = self.folder / "samples" / f"{step:06d}.png"
        if self._writes:
            content = io.BytesIO()
            draw_grid(images, prompts, columns).save(content, "PNG")
            write_file(path, content.getvalue())
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

    def _print(self, message: Any) -> None:
        if self.console is not None:
            self.console.print(message, soft_wrap=not isinstance(message, Table))

    def _show(self) -> None:
        names = sorted(self._recent, key=_place)
        if self._live is not None:
            shown = Table("metric", title=f"update {self.step} of {self.total}, {self._time_left()}")
            shown.add_column("now", justify="right")
            shown.add_column(f"mean of {WINDOW}", justify="right")
            for name in names:
                values = self._recent[name]
                shown.add_row(Text(name), f"{values[-1]:.4g}", f"{sum(values) / len(values):.4g}")
            self._live.update(shown, refresh=True)
        else:
            line = "  ".join(f"{name} {self._recent[name][-1]:.4g}" for name in names)
            self._print(Text(f"{self.step}/{self.total}  {line}  {self._time_left()}"))

    def _time_left(self) -> str:
        done = self.step - self._first_step
        if done <= 0:
            return "warming up"
        seconds = round((time.monotonic() - self._started) / done * (self.total - self.step))
        hours, minutes = divmod(seconds // 60, 60)
        return f"{hours}:{minutes:02d}:{seconds % 60:02d} left"


def _place(name: str) -> int:
    return next((place for place, start in enumerate(FIRST) if name.startswith(start)), len(FIRST))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value
