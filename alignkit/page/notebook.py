"""Display in the cell of a notebook. Outside of a notebook, nothing is shown and IPython is not imported."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

from rich.progress import TaskID

from alignkit.page.cells import macro

INTERVAL = 0.25
"""Seconds between two updates of a display."""


def in_notebook() -> bool:
    """Whether this is the kernel of a notebook; False in a terminal, also in that of IPython."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


class Cell:
    """An output of the cell that is running, replaced in place."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._shown = 0.0

    def show(self, html: str, text: str) -> None:
        """Display the output, or replace what was displayed before; `text` is for where HTML cannot be shown."""
        from IPython.display import display

        bundle = {"text/html": html, "text/plain": text}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)
        self._shown = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the last output is old enough to be replaced by one that differs a little."""
        return time.monotonic() - self._shown >= INTERVAL


class CellProgress:
    """One progress bar in a cell, with those methods of `rich.progress.Progress` that an evaluation calls."""

    def __init__(self) -> None:
        self._cell, self._started = Cell(), time.monotonic()
        self._description, self._done, self._total = "", 0.0, 1.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._show("stopped" if kind else f"done in {clock(time.monotonic() - self._started)}", ended=True)

    def add_task(self, description: str, total: float) -> TaskID:
        """Begin a bar in the place of the one before."""
        self._description, self._done, self._total = description, 0.0, total
        self._show(description)
        return TaskID(0)

    def advance(self, task: TaskID, advance: float = 1) -> None:
        """Add to what is done."""
        self._done += advance
        if self._cell.due:
            self._show(self._description)

    def remove_task(self, task: TaskID) -> None:
        """Leave the bar to the next one."""

    def _show(self, text: str, ended: bool = False) -> None:
        share = 1.0 if ended else self._done / self._total
        shown = text if ended else f"{text}: {share:.0%}"
        self._cell.show(macro("bar", share, shown), shown)


def clock(seconds: float) -> str:
    """Format a duration as minutes and seconds, of an hour and more with hours."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
