"""The curves of a run as one image: for a cell of a notebook, a file or another page."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path

from alignkit.errors import AlignkitError
from alignkit.files import write_file
from alignkit.page import figures
from alignkit.page.curves import PREFIX
from alignkit.page.figures import Chart
from alignkit.page.record import Record
from alignkit.page.template import colours, template
from alignkit.registry import nearest

ACROSS = 3
"""Charts of a line."""
WIDTH, HEIGHT, HEAD = 330, 224, 46
"""Size of a chart with its names, and of the names, in units of the image."""
CHARACTER = 5.6
"""Width of a character of a key, about."""
FIXED = {"ink2": "#767676", "line": "rgb(128, 128, 128, .35)", "card": "none"}
"""Colours that stand for those of the page; with those of curves, they can be read on white and on black."""
ILLEGAL = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML does not have."""


class Plot:
    """Curves as one SVG, with colours for light and dark ground. A notebook shows it; `save` writes it."""

    def __init__(self, charts: Sequence[Chart]) -> None:
        self.charts = charts
        """The charts, in the order in which they stand in the image."""
        self.svg = _svg(charts)
        """The image."""

    def save(self, path: str | Path) -> Path:
        """Write the image to an .svg file, in the place of one that is there. Raises AlignkitError if it cannot be."""
        path = Path(path)
        if path.suffix.lower() != ".svg":
            raise AlignkitError(f"plot: found the name {path}, expected one that ends with .svg")
        write_file(path, self.svg)
        return path

    def __repr__(self) -> str:
        return f"Plot({', '.join(chart.title for chart in self.charts)})"

    def _repr_html_(self) -> str:
        # An image, and not an <svg>: notebooks that are not trusted remove the latter.
        data = base64.b64encode(self.svg.encode()).decode()
        width = WIDTH * min(ACROSS, len(self.charts))
        return f'<img src="data:image/svg+xml;base64,{data}" alt="curves of the run" width="{width}">'


def plot(record: Record, metrics: Sequence[str], against: str) -> Plot:
    """Plot metrics against "updates", "samples" or "minutes"; without metrics, rewards at the points and the main ones.

    Raises AlignkitError for another name, and for a run without an update.
    """
    limits = figures.ranges([record])
    if not record.metrics:
        raise AlignkitError(f"plot: {record.folder} has no update yet, so there is no curve")
    if against not in limits:
        raise AlignkitError(f"plot: found against={against!r}, expected one of {', '.join(limits)}")
    names = list(record.metrics)
    for name in metrics:
        if name not in names:
            raise AlignkitError(f"plot: found {name!r}, expected one of {', '.join(names)}{nearest(name, names)}")
    chosen = {against: limits[against]}
    if metrics:
        return Plot([chart for name in metrics if (chart := figures.metric_chart([record], name, chosen)) is not None])
    shown, _, _ = figures.metric_charts([record], chosen)
    return Plot([*figures.point_charts([record], chosen), *shown])


def _svg(charts: Sequence[Chart]) -> str:
    fixed = FIXED | colours()
    placed = []
    for index, chart in enumerate(charts):
        keys, left = [], 8.0
        for name, colour in chart.keys:
            keys.append((left, name[:24], fixed[f"c{colour % 8}"]))
            left += 22 + CHARACTER * len(name[:24])
        svg = re.sub(r"var\(--(\w+)\)", lambda match: fixed[match[1]], chart.svg.replace(PREFIX, f"chart-{index}-"))
        svg = svg.replace("<svg ", f'<svg x="0" y="{HEAD}" width="{WIDTH}" height="{HEIGHT - HEAD}" ', 1)
        below = "; ".join(filter(None, (chart.subtitle, chart.note)))
        placed.append((index % ACROSS * WIDTH, index // ACROSS * HEIGHT, chart.title, below, keys, svg))
    width, height = WIDTH * min(ACROSS, max(1, len(charts))), HEIGHT * -(-len(charts) // ACROSS)
    text = template("plot.svg").render(charts=placed, width=width, height=height, ink=FIXED["ink2"])
    return ILLEGAL.sub("\N{REPLACEMENT CHARACTER}", text)
