"""Show a run: a live view on a terminal, one line a round elsewhere."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from alignkit.evaluation.rows import Row
from alignkit.evaluation.table import by_reward

LINE = 100
"""Longest line of a round, in characters."""
WINDOW = 20
"""Updates in a running mean."""
SPARKS = "▁▂▃▄▅▆▇█"
SPARKLINE = 20
"""Longest sparkline, in characters."""
AGREEMENT = {"pair_accuracy": "pairs right", "rank_correlation": "rank correlation"}
"""Metrics of the agreement of the surrogate with the reward, and their names in the view."""
HEAD = ("reward", "loss", "grad_norm", "seconds", "images_per_second", "memory_gib", *AGREEMENT)
"""Metrics that the view shows by name; `verbose` adds the others."""


class Display:
    """The view of a run on `console` (None: nothing is shown).

    On a terminal a view stays below the messages, fits 80 columns and 24 lines, and goes when the run ends. `verbose`
    adds all metrics to it, as far as there is room, and to the lines of a log.
    """

    def __init__(self, console: Console | None, total: int, warmup: int = 0, verbose: bool = False) -> None:
        """`total` updates of the policy follow `warmup` rounds."""
        self.console, self.total, self.warmup, self.verbose = console, total, warmup, verbose
        self._stage = ""
        self._step = self._warmed = 0
        """Updates and rounds of the warm-up that are done."""
        self._metrics: dict[str, float] = {}
        self._rewards: list[float] = []
        self._start: list[float] = []
        """Rewards of samples from before the first update."""
        self._point: tuple[int, Sequence[Row]] | None = None
        self._pace: tuple[int, float] | None = None
        """Updates and rounds done when this process began to train, or to update the policy, and the time then."""
        self._last = 0.0
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self.console is not None and self.console.is_terminal:
            self._live = Live(console=self.console, get_renderable=self.view, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def results(self, paths: Mapping[str, Path], command: Sequence[str]) -> None:
        """Print where the results are, and a command to try next."""
        for name, path in paths.items():
            self.message(f"{name:<7}  {path}")
        self.message(f"{'next':<7}  {shlex.join(command)}")

    def message(self, message: str | Text | Table, detail: bool = False) -> None:
        """Print a message above the view. A `detail` is left out if there is a view, except with `verbose`."""
        if self.console is not None and not (detail and self._live is not None and not self.verbose):
            shown = Text(message) if isinstance(message, str) else message
            # Lines of a log stay whole, for programs that search it.
            self.console.print(shown, soft_wrap=self._live is None and not isinstance(message, Table))

    def stage(self, text: str, log: bool = True) -> None:
        """Show what the run does now, other than training; in a log only with `log`."""
        self._stage = text
        if log and self._live is None:
            self.message(text)

    def seen(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take up a recorded update; step 0 is a round of the warm-up."""
        self._step = step
        self._warmed += step == 0
        self._metrics.update(metrics)
        reward = metrics.get("reward")
        if reward is not None:
            self._rewards.append(reward)
            if step <= 1:
                self._start.append(reward)

    def update(self, step: int, metrics: Mapping[str, float], seconds: float) -> None:
        """Show an update that took `seconds`; step 0 is a round of the warm-up."""
        self._last = time.monotonic()
        if self._pace is None or (step and not self._step):
            self._pace = (self._step + self._warmed, self._last - seconds)
        self.seen(step, metrics)
        self._stage = ""

    def end_round(self) -> None:
        """Print a line about the round that has ended, if there is no view."""
        if self._live is None and self._pace is not None:
            self.message(self.line())

    def record(self, record: Mapping[str, Any]) -> None:
        """Take in a record of `metrics.jsonl` that was just written; a view of all of them shows what it needs."""

    def point(self, step: int, rows: Sequence[Row]) -> None:
        """Show the rows of a point in the view."""
        self._point = (step, rows)

    def line(self) -> str:
        """Return the state in one line of at most `LINE` characters; longer with `verbose`."""
        known = {name: value for name in HEAD if (value := self._metrics.get(name)) is not None}
        names = {"pair_accuracy": "pairs right", "grad_norm": "grad", "images_per_second": "images/s"}
        shown = [f"{names.get(name, name)} {known[name]:.4g}" for name in ("reward", *names, "loss") if name in known]
        if self.verbose:
            shown += [f"{name} {value:.4g}" for name, value in self._others()]
        first, last = self._progress(), self._time_left()
        while not self.verbose and len("  ".join([first, *shown, last])) > LINE:
            shown.pop()
        return "  ".join([first, *shown, last])

    def view(self) -> RenderableType:
        """Return the state as it fits the width and height of the terminal."""
        if self.console is None or self._pace is None:
            return Spinner("dots", Text(self._stage)) if self._stage else Text()
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True, min_width=16)
        grid.add_column(overflow="ellipsis", no_wrap=True)
        known = self._metrics
        if self._rewards:
            now = self._rewards[-WINDOW:]
            text = Text.assemble((f"{sum(now) / len(now):.3f}", "bold green"), f"  mean of {len(now)}")
            if self._start:
                text.append(f", {sum(self._start) / len(self._start):.3f} before training")
            if self.console.encoding.startswith("utf"):
                text.append(f"  {sparkline(self._rewards)}", "green")
            grid.add_row("reward", text)
        if self._point is not None:
            step, rows = self._point
            steps, changes = by_reward(rows)
            grid.add_row(
                "held-out prompts", f"at {steps}, after {step} updates" if step else f"at {steps}, before training"
            )
            for name, values in changes.items():
                grid.add_row(Text(f"  {name}"), ", ".join(values))
        agreement = [f"{known[name]:.2f} {text}" for name, text in AGREEMENT.items() if name in known]
        if agreement:
            grid.add_row("surrogate", ", ".join(agreement))
        losses = [f"{known['loss']:.4g}"] if "loss" in known else []
        if "grad_norm" in known:
            losses.append(f"gradient norm {known['grad_norm']:.3g}")
        if losses:
            grid.add_row("loss", ", ".join(losses))
        units = {"seconds": "s an update", "images_per_second": "images/s", "memory_gib": "GiB"}
        grid.add_row("speed, memory", ", ".join(f"{known[n]:.3g} {unit}" for n, unit in units.items() if n in known))
        if self.verbose:
            for name, value in self._others()[: max(self.console.height - grid.row_count - 5, 0)]:
                grid.add_row(Text(name, "dim"), f"{value:.4g}")
        top = Table.grid(padding=(0, 2))
        done, whole = self._step + self._warmed, self.total + max(self.warmup, self._warmed)
        top.add_row(self._progress(), ProgressBar(whole, done, width=30), self._time_left())
        below = [Spinner("dots", Text(self._stage))] if self._stage else []
        return Group(Text(), top, grid, *below)

    def _others(self) -> list[tuple[str, float]]:
        return [(name, value) for name, value in self._metrics.items() if name not in HEAD]

    def _progress(self) -> str:
        if self._warmed and not self._step:
            return f"warm-up {self._warmed}/{max(self.warmup, self._warmed)}"
        return f"{self._step}/{self.total}"

    def _time_left(self) -> str:
        """Return the time left at the pace of this process so far."""
        if self._pace is None:
            return ""
        before, started = self._pace
        rounds = self.total - self._step + (0 if self._step else max(self.warmup - self._warmed, 0))
        pace = (self._last - started) / max(self._step + self._warmed - before, 1)
        seconds = round(max(pace * rounds - (time.monotonic() - self._last), 0))
        hours, minutes = divmod(seconds // 60, 60)
        return f"{hours}:{minutes:02d}:{seconds % 60:02d} left"


def sparkline(values: Sequence[float], width: int = SPARKLINE) -> str:
    """Return values as blocks between their least and largest mean of a column; "" if there are fewer than two."""
    if len(values) < 2:
        return ""
    columns = min(width, len(values))
    edges = [len(values) * column // columns for column in range(columns + 1)]
    means = [sum(values[low:high]) / (high - low) for low, high in pairwise(edges)]
    least, most = min(means), max(means)
    scale = (len(SPARKS) - 1) / (most - least) if most > least else 0.0
    return "".join(SPARKS[round((mean - least) * scale)] for mean in means)
