"""One self-contained HTML page about one run or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alignkit import __version__
from alignkit.errors import AlignkitError
from alignkit.files import write_file
from alignkit.page import facts, figures
from alignkit.page.gallery import Budget, embed, gallery, ordered, shared, strips
from alignkit.page.record import UPDATES, Record, read_record
from alignkit.page.template import template
from alignkit.page.wins import win_rates

FILE = "report.html"
"""Name of the page in a run folder."""
LARGEST = 5_000_000
"""Bytes that a page stays below."""
MOST_RUNS = 8
"""Runs of one page: as many as there are colours."""
GRID = 1200
"""Largest edge of an image grid."""
MOST_WARNINGS = 50
MARK = b'<meta name="generator" content="alignkit'
"""Words by which a page is known, which alone may be written over."""


def write_page(folders: Sequence[str | Path], out: Path | None = None) -> Path:
    """Write the page about the runs in `folders` and return its path; by default in the folder of the only run.

    Raises AlignkitError for a folder without the record of a run, and for a file that cannot be written.
    """
    if len(folders) > MOST_RUNS:
        raise AlignkitError(f"report: found {len(folders)} runs, expected at most {MOST_RUNS}; compare them in parts")
    records = [read_record(Path(folder)) for folder in folders]
    path = out or (Path(folders[0]) / FILE if len(folders) == 1 else Path(FILE))
    if path.is_file() and MARK not in path.read_bytes()[:2000]:
        raise AlignkitError(f"{path}: found another file than a page of alignkit here; choose another name with --out")
    write_file(path, render(records).encode("utf-8", "replace"))  # half of a surrogate pair cannot be encoded
    return path


def keep_page(folder: Path, warn: Callable[[str], object]) -> None:
    """Write the page into the folder of a run; call `warn` if that fails, since the run itself does not need it."""
    try:
        write_page([folder])
    except Exception as error:  # whatever it is, it must not end a run
        reason = str(error) if isinstance(error, AlignkitError) else f"{type(error).__name__}: {error}"
        warn(f"report: {folder / FILE} was not written ({reason}); try again with: alignkit report {folder}")


def render(records: Sequence[Record]) -> str:
    """Return the page as HTML."""
    _name_apart(records)
    left_out: list[str] = [f"{record.name}: {fault}" for record in records for fault in record.faults]
    limits = figures.ranges(records)
    points = figures.point_charts(records, limits)
    shown, folded, metrics_left = figures.metric_charts(records, limits)
    steps, drifts = figures.step_charts(records), figures.drift_charts(records)
    wins = win_rates(records)
    context: dict[str, Any] = {
        "records": records,
        "facts": [facts.facts(record) for record in records],
        "table": facts.table(records),
        "axes": list(limits),
        "warmed": any(record.axes[UPDATES][0] < 1 for record in records if record.axes),
        "charts": {"points": points, "shown": shown, "folded": folded, "steps": steps, "drifts": drifts},
        "wins": wins,
        "grids": [],
        "left_out": left_out,
        "most_warnings": MOST_WARNINGS,
        "version": __version__,
    }
    left_out += _missing(records, context)
    if metrics_left:
        left_out.append(f"No chart of {', '.join(metrics_left)}: no finite value, or more than {figures.MOST} metrics")
    page = template("page.html")
    room = LARGEST * 9 // 10 - len(page.render(context, cards=[], strips=[]).encode("utf-8", "replace"))
    return page.render(context | _images(records, room, left_out))


def _images(records: Sequence[Record], room: int, left_out: list[str]) -> dict[str, Any]:
    """Return gallery and strips that fit into `room` characters, and add to `left_out` how much of them does not."""
    places, steps = shared(records)
    if not places:
        if any(record.end for record in records):
            left_out.append(
                "No gallery: there is no prompt with readable images before and after training in every run"
            )
        return {"cards": [], "strips": [], "grids": _grids(records)}
    orders = ordered(records, places, steps)
    chosen = list(dict.fromkeys(found[0] for found in orders.values() if found))
    budget = Budget(room // 3)
    rows = strips(records, chosen, steps, budget)
    cards = gallery(records, orders, steps, Budget(room - room // 3 + budget.room))
    if len(cards) < len(places):
        left_out.append(f"The gallery shows {len(cards)} of {len(places)} prompts; the images of all are in points/")
    if len(rows) < len(chosen):
        left_out.append(
            f"The strip shows {len(rows)} of {len(chosen)} prompts, since more would make the file too large"
        )
    return {"cards": cards, "strips": rows, "steps": steps}


def _grids(records: Sequence[Record]) -> list[tuple[int, str]]:
    """Return places of runs and their newest image grid as a data URL."""
    # The name stopped.png comes after all numbers.
    newest = [max((record.folder / "samples").glob("*.png"), default=None) for record in records]
    found = [(run, embed(path, GRID)[0]) for run, path in enumerate(newest) if path is not None]
    return [(run, data) for run, data in found if data]


def _missing(records: Sequence[Record], context: dict[str, Any]) -> list[str]:
    """Return a line for each section that has no data."""
    charts = context["charts"]
    reasons = {
        "No table of rewards: there is neither an evaluation nor a point (evaluate.prompts, evaluate.points)": context[
            "table"
        ],
        "No curves: there is no update yet": charts["shown"] or charts["folded"],
        "No curves of rewards at points, gallery or strip: there is no point (evaluate.points)": any(
            record.points for record in records
        ),
        "No win rates: there is no point after training": context["wins"] or not any(r.points for r in records),
    }
    return [reason for reason, found in reasons.items() if not found]


def _name_apart(records: Sequence[Record]) -> None:
    """Give runs whose folders have the same name their paths as names."""
    names = [record.name for record in records]
    for record in records:
        if names.count(record.name) > 1:
            record.name = str(record.folder)
