"""Show a run in the cell of a notebook."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from alignkit.evaluation.rows import Row
from alignkit.page.cells import macro, main_rows
from alignkit.page.figures import FIRST, MEANINGS
from alignkit.page.notebook import Cell, clock
from alignkit.page.record import rows_of
from alignkit.runs.display import WINDOW, Display, sparkline

SHOWN = (*FIRST, "images_per_second", "memory_gib")
"""Metrics that are shown first to last, together with terms of the loss."""
WARNINGS = 5
"""Warnings that are shown; the last ones."""


class CellDisplay(Display):
    """The view of a run in a notebook: one output of the cell, replaced in place, which stays as the run ends."""

    def __init__(self, title: str, folder: Path, total: int, warmup: int = 0) -> None:
        super().__init__(None, total, warmup)
        self._title, self._folder = title, folder
        self._cell = Cell()
        self._values: dict[str, list[float]] = {}
        self._rows: Sequence[Row] = ()
        self._notes: list[str] = []
        self._warnings: list[str] = []
        self._started = time.monotonic()
        self._ended = False

    def __enter__(self) -> Self:
        self.stage("loading")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        spent = clock(time.monotonic() - self._started)
        if self._ended and kind is None:
            self.stage(f"finished in {spent}: {self.total} updates")
        else:
            self._notes = [f'resume with: alignkit.load(resume="{self._folder}")'] * (self._step > 0)
            self.stage(f"stopped after {spent} at update {self._step} of {self.total}")

    def stage(self, text: str, log: bool = True) -> None:
        super().stage(text, log)
        self._show()

    def seen(self, step: int, metrics: Mapping[str, float]) -> None:
        super().seen(step, metrics)
        for name, value in metrics.items():
            if name in SHOWN or name.endswith("_loss"):
                self._values.setdefault(name, []).append(value)

    def update(self, step: int, metrics: Mapping[str, float], seconds: float) -> None:
        super().update(step, metrics, seconds)
        if self._cell.due or step == self.total:
            self._show()

    def record(self, record: Mapping[str, Any]) -> None:
        if "warning" in record:
            self._warnings.append(str(record["warning"]))
        elif "verdict" in record or "exported" in record:
            self._notes.append(str(record.get("text", "")))
            self._ended |= "exported" in record
        elif rows := list(rows_of(record.get("point", record.get("evaluation")))):
            self._rows, self._notes = rows, []
        else:
            return
        self._show()

    def results(self, paths: Mapping[str, Path], command: Sequence[str]) -> None:
        self._notes += [f"{name}: {path}" for name, path in paths.items()]

    def _show(self) -> None:
        status = self._stage
        if not status:
            progress = self._progress() if not self._step else f"update {self._step} of {self.total}"
            status = f"{progress}, {self._time_left()}"
        metrics = [
            (name, MEANINGS.get(name, ""), values[-1], _mean(values[-WINDOW:]), _curve(values))
            for name, values in sorted(self._values.items(), key=lambda item: _place(item[0]))
        ]
        html = macro(
            "training", self._title, str(self._folder), self._step / max(self.total, 1), status, metrics, WINDOW,
            main_rows(self._rows), self._notes, self._warnings[-WARNINGS:], max(0, len(self._warnings) - WARNINGS),
        )  # fmt: skip
        self._cell.show(html, ", ".join([status, *(f"reward {value:.4g}" for value in self._rewards[-1:])]))


def _curve(values: Sequence[float]) -> str:
    return sparkline([value for value in values if math.isfinite(value)])


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _place(name: str) -> int:
    return SHOWN.index(name) if name in SHOWN else len(FIRST)
