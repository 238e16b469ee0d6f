"""Charts as SVG: metrics and points against updates, samples and minutes; rewards by number of steps and against drift.

An SVG holds numbers alone; names stand in the page, which escapes them. Colours are those of the page's style sheet, so
a chart follows its light and dark scheme.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from alignkit.page.record import AXES, MINUTES, Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 160
"""Largest number of places at which a curve of one run has a value; curves of several runs have fewer."""
LARGEST = 1e100
"""Larger values are shown as this one: sums of values at the limit of a float overflow."""
FEW = 20
"""Largest number of values that have a marker each."""
INK, GRID, SURFACE = "#000901", "#000902", "#000903"
"""Stand-ins for colours of the style sheet: matplotlib takes no variables."""
PREFIX = "this-chart-"
"""Beginning of every id in an SVG, which a page replaces by one for each chart."""
DASHES: Sequence[Any] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
MARKERS = "osD^vPXp"
SIZE = (4.4, 2.45)
"""Inches; the page scales a chart to its place."""
Ranges = Mapping[str, tuple[float, float]]
"""Smallest and largest value on each of `AXES`."""


@dataclass(frozen=True)
class Series:
    """One curve."""

    colour: int
    """Number of its colour, of eight, and of its line style and marker."""
    x: Mapping[str, Array]
    """Places by name of the axis."""
    y: Array
    low: Array | None = None
    """Lower edge of a band, with `high`; alone, a thin line."""
    high: Array | None = None
    dotted: bool = False
    """Whether every value has a marker."""
    base: float | None = None
    """Value before training, a thin line."""


def reduced(x: Mapping[str, Array], y: Array, colour: int, bins: int = BINS) -> tuple[Series, int] | None:
    """Return a metric with at most `bins` values, and the number of updates in each mean; None if it has no value.

    The line is a running mean; the band is the range of the values at each place, or the values themselves if every
    place is one update.
    """
    known = np.flatnonzero(np.isfinite(y))
    if not len(known):
        return None
    values = np.clip(y[known], -LARGEST, LARGEST)
    size = math.ceil(len(known) / bins)
    starts = np.arange(0, len(known), size)
    counts = np.diff([*starts, len(known)])
    reach = len(starts) // 30
    window = np.ones(2 * reach + 1)
    keep = slice(reach, reach + len(starts))
    mean = np.convolve(np.add.reduceat(values, starts), window)[keep] / np.convolve(counts, window)[keep]
    middles = known[starts + counts // 2]
    low, high = (values, None) if size == 1 else (edge.reduceat(values, starts) for edge in (np.minimum, np.maximum))
    places = {axis: place[middles] for axis, place in x.items()}
    band = low if reach or size > 1 else None
    return Series(colour, places, mean, band, high, dotted=len(mean) <= FEW), size * (2 * reach + 1)


def over_progress(series: Sequence[Series], ranges: Ranges, mark: Mapping[str, float] | None = None) -> str:
    """Plot against all axes of `ranges`, of which the style sheet shows one. `mark` is the place of a vertical line."""
    with _chart() as (axes, result):
        axes.set_xlim(0, 1)
        axes.set_xticks([])
        for axis, (first, last) in ranges.items():
            span = (last - first) or 1.0

            def share(place: Any, first: float = first, span: float = span) -> Any:
                return (place - first) / span

            for one in series:
                _plot(axes, one, share(one.x[axis]), axis)
            if mark is not None:
                axes.axvline(share(mark[axis]), color=INK, lw=0.8, ls=(0, (1, 2)), gid=axis)
            for tick in _ticks(first, last, whole=axis != MINUTES):
                axes.axvline(share(tick), color=GRID, lw=0.6, zorder=0, gid=axis)
                axes.text(
                    share(tick), -0.045, _number(tick), transform=axes.get_xaxis_transform(), ha="center", va="top",
                    color=INK, gid=axis,
                )  # fmt: skip
            axes.text(
                1, -0.155, axis, transform=axes.transAxes, ha="right", va="top", color=INK, gid=axis, fontweight="bold"
            )
        _limit(axes, series)
    return result[0]


def by_steps(groups: Sequence[tuple[int, Mapping[int, tuple[float, float, float]]]]) -> str:
    """Plot mean and interval by number of steps for each group: its colour and (mean, low, high) by number of steps."""
    steps = sorted({number for _, values in groups for number in values})
    with _chart() as (axes, result):
        for place, (colour, values) in enumerate(groups):
            shift = (place - (len(groups) - 1) / 2) * min(0.12, 0.5 / len(groups))
            x = np.array([steps.index(number) + shift for number in values])
            mean, low, high = (np.array([value[i] for value in values.values()]) for i in range(3))
            axes.plot(
                x, mean, color=stand_in(colour), ls=DASHES[colour % 4], lw=1.4, marker=MARKERS[colour % 8], ms=5,
                markeredgecolor=SURFACE,
            )  # fmt: skip
            axes.vlines(x, low, high, color=stand_in(colour), lw=1.4)
        axes.set_xticks(range(len(steps)), [str(number) for number in steps])
        axes.set_xlim(-0.4, len(steps) - 0.6)
        axes.set_xlabel("number of steps", loc="right", fontweight="bold")
    return result[0]


def trail(paths: Sequence[tuple[int, Array, Array]], label: str) -> str:
    """Plot paths through points, (colour, x, y) each; the last point is the largest."""
    with _chart() as (axes, result):
        for colour, x, y in paths:
            shade = stand_in(colour)
            axes.plot(x, y, color=shade, ls=DASHES[colour % 4], lw=1.2, marker="o", ms=2.5)
            axes.plot(x[-1:], y[-1:], color=shade, marker=MARKERS[colour % 8], ms=8, markeredgecolor=SURFACE)
        axes.set_xlabel(label, loc="right", fontweight="bold")
    return result[0]


def _plot(axes: Axes, one: Series, x: Array, gid: str) -> None:
    shade = stand_in(one.colour)
    if one.base is not None:
        axes.axhline(one.base, color=shade, lw=0.7, ls=(0, (1, 1.5)), gid=gid)
    if one.low is not None and one.high is not None and len(x) > 1:
        axes.fill_between(x, one.low, one.high, color=shade, alpha=0.18, lw=0, gid=gid)
    elif one.low is not None:
        axes.plot(x, one.low, color=shade, alpha=0.35, lw=0.7, gid=gid)
    marker = MARKERS[one.colour % 8] if one.dotted or len(x) == 1 else ""
    axes.plot(
        x, one.y, color=shade, ls=DASHES[one.colour % 4], lw=1.5, marker=marker, ms=4.5, markeredgecolor=SURFACE,
        markeredgewidth=0.5, gid=gid,
    )  # fmt: skip


def _limit(axes: Axes, series: Sequence[Series]) -> None:
    """Fit the vertical axis to curves and bands, without the outermost hundredth of the bands at each end."""
    bands = [edge for one in series for edge in (one.low, one.high) if edge is not None]
    edges = np.concatenate([*bands, []])
    edges = edges[np.isfinite(edges)]
    bases = [one.base for one in series if one.base is not None]
    shown = np.concatenate([*(one.y for one in series), bases])
    if len(edges):
        shown = np.append(shown, np.quantile(edges, 0.01, method="lower"))
        shown = np.append(shown, np.quantile(edges, 0.99, method="higher"))
    shown = shown[np.isfinite(shown)]
    low, high = (np.min(shown), np.max(shown)) if len(shown) else (0.0, 1.0)
    room = (high - low) / 16 or max(abs(high) / 16, 1e-6)
    axes.set_ylim(low - room, high + room)


@contextmanager
def _chart() -> Iterator[tuple[Axes, list[str]]]:
    """Give axes to plot into, and a list that holds the SVG afterwards."""
    with drawing(SIZE) as (figure, result):
        axes = figure.add_axes((0.115, 0.21, 0.875, 0.76))
        axes.patch.set_visible(False)
        axes.locator_params(axis="y", nbins=5)
        yield axes, result


@contextmanager
def drawing(size: tuple[float, float]) -> Iterator[tuple[Figure, list[str]]]:
    """Give a figure of `size` inches, and a list that holds its SVG afterwards, an element for a page.

    Colours are those of `stand_in`, `INK`, `GRID` and `SURFACE`. No setting of the user's matplotlib counts.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    result: list[str] = []
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none", "svg.hashsalt": "alignkit", "text.parse_math": False, "font.size": 8,
                "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
                "axes.edgecolor": GRID, "axes.labelcolor": INK, "axes.grid": True, "axes.grid.axis": "y",
                "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.6, "xtick.color": INK,
                "ytick.color": INK, "xtick.major.size": 0, "ytick.major.size": 0, "text.color": INK,
                "axes.formatter.useoffset": False, "axes.formatter.limits": (-4, 5),
            }
        )  # fmt: skip
        figure = Figure(size)
        FigureCanvasSVG(figure)
        yield figure, result
        target = io.StringIO()
        empty = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(target, format="svg", transparent=True, metadata=empty)
    result.append(_inline(target.getvalue()))


def _inline(svg: str) -> str:
    """Return an SVG file as an element of a page: only classes instead of ids, colours as variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>|\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', svg, count=1)
    svg = re.sub(rf' id="({"|".join(AXES)})"', r' class="\1"', svg)
    svg = re.sub(
        r' id="(?:figure|axes|patch|text|line2d|xtick|ytick|matplotlib\.axis|LineCollection)_?[\d.]*"', "", svg
    )
    svg = re.sub(r" font-family:[^;\"]*;?", "", svg)
    svg = re.sub(r' d="[^"]*"', lambda m: re.sub(r"(\.\d)\d+", r"\1", m[0].replace("\n", " ")), svg)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{PREFIX}", svg)
    svg = re.sub(r"#0001(\d\d)", lambda m: f"var(--c{int(m[1])})", svg)
    for shade, name in ((INK, "ink2"), (GRID, "line"), (SURFACE, "card")):
        svg = svg.replace(shade, f"var(--{name})")
    return re.sub(r"\n\s*", "\n", svg)


def stand_in(index: int) -> str:
    """Return the stand-in for a colour of the style sheet, of eight."""
    return f"#0001{index % 8:02d}"


def _ticks(first: float, last: float, whole: bool) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    found = MaxNLocator(5, steps=[1, 2, 5, 10], integer=whole).tick_values(first, last)
    return [float(tick) for tick in found if first <= tick <= last]


def _number(value: float) -> str:
    for size, ending in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            return f"{value / (1e3 if ending == ' k' else size):g}{ending}"
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")
