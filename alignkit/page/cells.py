"""HTML for the cells of a notebook: a run, the rows of an evaluation, images.

It has tables and images and no script, and reads well without its few styles: notebooks that are not trusted, and code
hosts, remove both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL.Image import Image

from alignkit.evaluation.hacking import verdict
from alignkit.evaluation.rows import TOTAL, Row
from alignkit.page import facts
from alignkit.page.gallery import SHARP, encode
from alignkit.page.record import Record
from alignkit.page.template import template

ACROSS = 4
"""Images of a line, where each has its own prompt."""
MOST = 64
"""Images that are shown."""
LARGEST = 256
"""Largest edge of an image, in pixels."""
HIDDEN = ("machine", "software", "commit")
"""Facts that are left to the page about the run."""


def macro(name: str, *values: Any) -> str:
    """Return the HTML of a macro of `cells.html`."""
    html = str(getattr(template("cells.html").module, name)(*values))
    return html.encode("utf-8", "replace").decode()  # a kernel cannot send half of a surrogate pair


def run_cell(record: Record) -> str:
    """Return settings, progress and results of a run."""
    found = {name: text for name, text in facts.facts(record).items() if name not in HIDDEN}
    outcome = facts.outcome(record) if record.verdict else None
    status = f"{facts.exported(record)}." if record.metrics else "Not trained yet."
    return macro("run", facts.heading(record), str(record.folder), status, found, main_rows(record.compared), outcome)


def rows_cell(rows: Sequence[Row]) -> str:
    """Return the rows of an evaluation as a table, with the verdicts on reward hacking."""
    groups = dict.fromkeys((row.prompts, row.run) for row in rows)
    verdicts = []
    for prompts, run in groups:
        if found := verdict([row for row in rows if (row.prompts, row.run) == (prompts, run)]):
            verdicts.append((", ".join(filter(None, (run, f"{prompts} prompts"))), found.text))
    departures = dict.fromkeys((row.run, row.departure) for row in rows if row.departure)
    return macro("evaluation", shown_rows(rows), verdicts, list(departures))


def shown_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows without totals that equal one of their parts."""
    return [row for row in rows if row.reward != TOTAL or not facts.repeated(row, rows)]


def main_rows(rows: Sequence[Row]) -> list[Row]:
    """Return `shown_rows` without those of parts of a reward."""
    return [row for row in shown_rows(rows) if "/" not in row.reward]


def images_cell(images: Sequence[tuple[Image, str]]) -> str:
    """Return images with their prompts in lines: those of one prompt together, under it, or several prompts a line."""
    groups: list[tuple[str, list[Image]]] = []
    for image, prompt in images[:MOST]:
        if groups and groups[-1][0] == prompt:
            groups[-1][1].append(image)
        else:
            groups.append((prompt, [image]))
    if all(len(found) == 1 for _, found in groups):
        shots = [(*_shot(found[0]), prompt) for prompt, found in groups]
        lines = [("", shots[start : start + ACROSS]) for start in range(0, len(shots), ACROSS)]
    else:
        lines = [(prompt, [(*_shot(image), "") for image in found]) for prompt, found in groups]
    return macro("images", lines, len(images) - MOST)


def _shot(image: Image) -> tuple[str, bool, int]:
    """Return the data URL of an image, whether its pixels may be seen, and its width on the screen."""
    data, sharp = encode(image, LARGEST)
    width = SHARP if sharp else round(LARGEST * image.width / max(image.size))
    return data, sharp, width
