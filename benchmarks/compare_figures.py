"""Draw the changes of compare_methods.py with their intervals, as SVG files with light and dark colours."""

from __future__ import annotations

import csv
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compare_report import by_method, changes, final
from compare_tables import TABLES, Table

from alignkit.page import curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EIGHT_MINUTES = Path(__file__).parent / "eight_minutes.csv"
"""What `alignkit evaluate` printed for the runs of eight minutes: mean before, change and its interval."""
WIDTH, LEFT, RIGHT, GAP = 6.4, 1.42, 0.2, 0.26
"""Inches: the figure, the names at its left, the edge, and the space between two panels."""
TITLE, HEADING, AXIS, LINE = 0.22, 0.24, 0.3, 0.125
"""Inches: the title of a block, the heading of a panel, the space below a panel, and one interval."""
LEGEND = 0.3
"""Inches at the top."""

Change = tuple[float, float, float]
"""A change, and the lower and upper end of its 95 % interval."""


@dataclass(frozen=True)
class Block:
    """Rows that share their axes: two panels next to each other."""

    title: str
    """Empty where the page names it."""
    panels: tuple[str, str]
    rows: Mapping[str, Sequence[Mapping[int, Change]]]
    """By name of the row, for each panel: changes by number of steps."""


def of_table(results: Mapping[str, Any], table: Table) -> list[Block]:
    """Return the rows of a table as one block; none if it has not been run."""
    found = _block(results, table, list(table.methods), "")
    return [found] if found.rows else []


def of_algorithm(results: Mapping[str, Any], algorithm: str) -> list[Block]:
    """Return the rows of one algorithm, a block for each table in which it was run."""
    blocks = []
    for table in TABLES.values():
        names = [name for name, method in table.methods.items() if method.algorithm == algorithm]
        blocks.append(_block(results, table, names, table.title))
    return [block for block in blocks if block.rows]


def _block(results: Mapping[str, Any], table: Table, names: Sequence[str], title: str) -> Block:
    here = final(results, table)
    base = next((r for r in here if not r["method"]), None)
    found = {name: runs for name, runs in by_method(here, table) if name in names} if base is not None else {}
    rows = {
        name: [
            {k: (change, low, high) for k, (_, change, low, high) in changes(runs, base, what, table).items()}
            for what in ("trained", "pixel_check")
        ]
        for name, runs in found.items()
    }
    size = "jpeg_compressibility" in str(table.settings.get("reward"))
    return Block(title, ("trained reward" + ", minus kilobytes" * size, "pixel check, held out"), rows)


def of_eight_minutes() -> list[Block]:
    """Return the runs of eight minutes."""
    rows: dict[str, Any] = {}
    for line in eight_minutes():
        panels = rows.setdefault(line["run"], ({}, {}))
        for panel, what in zip(panels, ("vqa", "pixel"), strict=True):
            panel[int(line["steps"])] = tuple(float(line[f"{what}_{part}"]) for part in ("change", "low", "high"))
    return [Block("", ("VQA model, trained", "pixel check, held out"), rows)]


def eight_minutes() -> list[dict[str, str]]:
    """Read the lines of the runs of eight minutes."""
    with EIGHT_MINUTES.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def draw(blocks: Sequence[Block], title: str) -> str:
    """Draw blocks below each other. Returns an SVG file, which also says in words what it shows."""
    inner = [sum(_height(row) for row in block.rows.values()) for block in blocks]
    steps = sorted({k for block in blocks for row in block.rows.values() for panel in row for k in panel})
    height = LEGEND + sum(inner) + sum(HEADING + AXIS + TITLE * bool(block.title) for block in blocks)
    panel = (WIDTH - LEFT - RIGHT - GAP) / 2
    with curves.drawing((WIDTH, height)) as (figure, result):
        legend(figure, steps, height, "change, 95 % interval; filled: it excludes 0")
        top = height - LEGEND
        for block, size in zip(blocks, inner, strict=True):
            if block.title:
                middle = (top - TITLE / 2) / height
                figure.text(0.04 / WIDTH, middle, block.title, va="center", weight="bold", color=curves.INK)
                top -= TITLE
            top -= HEADING + size
            for i, name in enumerate(block.panels):
                left = (LEFT + i * (panel + GAP)) / WIDTH
                axes = figure.add_axes((left, top / height, panel / WIDTH, size / height))
                _panel(axes, block, i, steps)
                axes.set_title(name, fontsize=8, loc="left", color=curves.INK, pad=4)
            top -= AXIS
    return svg_file(result[0], title, _words(blocks))


def _height(row: Sequence[Mapping[int, Change]]) -> float:
    return max(len(panel) for panel in row) * LINE + LINE


def _panel(axes: Axes, block: Block, at: int, steps: Sequence[int]) -> None:
    axes.patch.set_visible(False)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.locator_params(axis="x", nbins=4)
    axes.margins(x=0.09)
    axes.axvline(0, color=curves.INK, lw=0.9)
    y, places = 0.0, []
    for number, row in enumerate(block.rows.values()):
        size = _height(row)
        if number % 2 == 0:
            axes.axhspan(y, y + size, color=curves.GRID, alpha=0.28, lw=0, zorder=0)
        places.append(y + size / 2)
        for line, (k, (change, low, high)) in enumerate(row[at].items()):
            here, place = y + LINE * (line + 1), steps.index(k)
            shade = curves.stand_in(place)
            clear = low > 0 or high < 0
            axes.hlines(here, low, high, color=shade, lw=1.5)
            axes.plot(
                [change], [here], color=shade, marker=curves.MARKERS[place], ms=5, ls="", markeredgewidth=1.2,
                markerfacecolor=shade if clear else curves.SURFACE,
            )  # fmt: skip
        y += size
    axes.set_ylim(y, 0)
    names = ["\n".join(textwrap.wrap(name, 22)) for name in block.rows] if at == 0 else [""] * len(places)
    axes.set_yticks(places, names)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+g}".replace("-", "\N{MINUS SIGN}") if value else "0")


def legend(figure: Figure, steps: Sequence[int], height: float, note: str) -> None:
    """Name the markers of the numbers of steps at the top of a figure of `height` inches, with a note at the right."""
    axes = figure.add_axes((0, 1 - 0.26 / height, 1, 0.26 / height))
    axes.set_axis_off()
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(0, 1)
    for place, k in enumerate(steps):
        x = 0.12 + place * 0.72
        shade = curves.stand_in(place)
        axes.plot([x], [0.5], color=shade, marker=curves.MARKERS[place], ms=5.5, ls="")
        axes.text(x + 0.1, 0.5, f"{k} step{'s' * (k > 1)}", va="center", color=curves.INK)
    axes.text(WIDTH - RIGHT, 0.5, note, va="center", ha="right", color=curves.INK)


def _words(blocks: Sequence[Block]) -> list[str]:
    return [
        f"{block.title + ': ' if block.title else ''}{name}, {panel}, {k} step{'s' * (k > 1)}: "
        f"{change:+.3f} [{low:+.3f}, {high:+.3f}]"
        for block in blocks
        for name, row in block.rows.items()
        for panel, values in zip(block.panels, row, strict=True)
        for k, (change, low, high) in values.items()
    ]


def svg_file(svg: str, title: str, words: Sequence[str]) -> str:
    """Return an element of the report page as a file of its own, with the colours of the page's style sheet.

    `words` says line by line what the figure shows.
    """
    style = (Path(curves.__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
    schemes = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    light, dark = (" ".join(re.findall(r"--(?:c\d|ink2|line|card): [^;]+;", scheme)) for scheme in schemes)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" \\1>\n'
        f"<title>{escape(title)}</title>\n<desc>\n{escape(chr(10).join(words), quote=False)}\n</desc>\n"
        f"<style>:root {{ {light} }} @media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }} "
        f"text {{ font-family: system-ui, sans-serif }}</style>"
    )
    svg = re.sub(r'<svg (viewBox="[^"]*") aria-hidden="true">', head, svg, count=1)
    return svg.replace(curves.PREFIX, "").strip() + "\n"
