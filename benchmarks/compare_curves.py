"""Draw trained reward and pixel check over the samples and minutes of the runs of compare_methods.py, as SVG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from compare_figures import GAP, LEGEND, RIGHT, WIDTH, legend, svg_file
from compare_report import by_method, final
from compare_tables import TABLES

from alignkit.page import curves

LEFT, PANEL, TITLE, ROOM = 0.5, 1.2, 0.36, 0.42
"""Inches: the numbers at the left, a panel's height, the title of a block, and the space below a panel."""
REWARDS = {"trained": "trained reward", "pixel_check": "pixel check, held out"}
AXES = ("samples", "minutes")


@dataclass(frozen=True)
class Curves:
    """The runs of one row of a table: a panel for each reward and measure of progress."""

    title: str
    seeds: Sequence[Sequence[Mapping[str, Any]]]
    """The points of each run, as `compare_methods.py` writes them."""

    @property
    def steps(self) -> list[int]:
        return [int(k) for k in self.seeds[0][0]["values"]]

    def over(self, axis: str) -> list[float]:
        """Return the place of each point, mean over the runs."""
        return [float(value) for value in np.mean([[point[axis] for point in run] for run in self.seeds], axis=0)]

    def values(self, reward: str, steps: int) -> list[tuple[float, float, float]]:
        """Return mean, smallest and largest value of the runs at each point."""
        found = np.array([[point["values"][str(steps)][reward] for point in run] for run in self.seeds])
        return [(float(c.mean()), float(c.min()), float(c.max())) for c in found.T]


def of_algorithm(results: Mapping[str, Any], algorithm: str) -> list[Curves]:
    """Return the rows of one algorithm whose runs have points."""
    found = []
    for table in TABLES.values():
        for name, runs in by_method(final(results, table), table):
            seeds = [run["points"] for run in runs if run.get("points")]
            if name in table.methods and table.methods[name].algorithm == algorithm and seeds:
                found.append(Curves(f"{table.title}: {name}", seeds))
    return found


def draw(rows: Sequence[Curves], title: str) -> str:
    """Draw rows of a table below each other. Returns an SVG file, which also says in words what it shows."""
    steps = sorted({k for row in rows for k in row.steps})
    height = LEGEND + len(rows) * (TITLE + len(AXES) * (PANEL + ROOM))
    width = (WIDTH - LEFT - RIGHT - GAP - LEFT) / 2
    with curves.drawing((WIDTH, height)) as (figure, result):
        legend(figure, steps, height, "mean over seeds; shaded: their range")
        top = height - LEGEND
        for row in rows:
            figure.text(0.04 / WIDTH, (top - 0.07) / height, row.title, va="center", weight="bold", color=curves.INK)
            top -= TITLE
            for axis in AXES:
                top -= PANEL
                for column, (reward, name) in enumerate(REWARDS.items()):
                    left = LEFT + column * (width + GAP + LEFT)
                    axes = figure.add_axes((left / WIDTH, top / height, width / WIDTH, PANEL / height))
                    axes.patch.set_visible(False)
                    axes.set_title(f"{name}, over {axis}", fontsize=8, loc="left", color=curves.INK, pad=4)
                    for k in row.steps:
                        place, x = steps.index(k), row.over(axis)
                        mean, low, high = zip(*row.values(reward, k), strict=True)
                        shade = curves.stand_in(place)
                        axes.fill_between(x, low, high, color=shade, alpha=0.15, lw=0)
                        axes.plot(x, mean, color=shade, marker=curves.MARKERS[place], ms=3.5, lw=1.4)
                top -= ROOM
    return svg_file(result[0], title, _words(rows))


def _words(rows: Sequence[Curves]) -> list[str]:
    return [
        f"{row.title}, {name}, {k} step{'s' * (k > 1)}: "
        + ", ".join(
            f"{mean:.3f} at {samples:.0f} samples"
            for samples, (mean, _, _) in zip(row.over("samples"), row.values(reward, k), strict=True)
        )
        for row in rows
        for reward, name in REWARDS.items()
        for k in row.steps
    ]
