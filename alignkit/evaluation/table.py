"""Format evaluation rows for the terminal: as a table, or in one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.table import Table

from alignkit.evaluation.rows import TOTAL, Row
from alignkit.evaluation.wins import WinRate


def table(rows: Sequence[Row], title: str = "", wide: bool = False) -> Table:
    """Format rows of one kind of prompts. A total that equals one of its parts is shown once, under the part's name.
    Without a title, it has lines about runs whose settings are not the paper's.

    With `wide` the table also has the intervals of the means, and is about 110 columns wide.
    """
    from rich import box
    from rich.table import Table

    compared = any(row.after is not None for row in rows)
    several = len({row.run for row in rows}) > 1
    texts = ["reward", *(["run"] if several else []), *(["update"] if any(r.update is not None for r in rows) else [])]
    headings = ["steps", *texts, "before", *(["after", "change", "95 % interval"] if compared else [])]
    counts = sorted({row.count for row in rows})
    which = {"unseen": "that were not trained on", "seen": "of the training file"}
    caption = f"means over {' to '.join(map(str, counts))} prompts {which[rows[0].prompts]}" if rows else None

    def mean(value: float | None, low: float | None, high: float | None) -> str:
        return f"{value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if wide and low is not None else "")

    # Without `wide`, the table fits into 80 columns.
    departures = dict.fromkeys((row.run, row.departure) for row in rows if row.departure)
    notes = "\n".join(f"{run}: {departure}" if several else departure for run, departure in departures)
    shown = Table(
        title=title or notes or None, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
        min_width=len(caption or ""),
    )  # fmt: skip
    for heading in headings:
        # Names may wrap to a second line; numbers never do.
        is_text = heading in texts
        shown.add_column(heading, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    for row in rows:
        if row.reward == TOTAL and any(r is not row and replace(r, reward=TOTAL) == row for r in rows):
            continue
        cells = [
            str(row.num_steps),
            *("end" if getattr(row, name) is None else str(getattr(row, name)) for name in texts),
            mean(row.before, row.before_low, row.before_high),
        ]
        if compared:
            cells += [
                mean(row.after, row.after_low, row.after_high),
                f"{row.difference:+.3f}",
                f"[{row.low:+.3f}, {row.high:+.3f}]",
            ]
        shown.add_row(*(cell.removeprefix("-") if cell == "-0.000" else cell for cell in cells))
    return shown


def wins_table(wins: Sequence[WinRate]) -> Table:
    """Format win rates."""
    from rich import box
    from rich.table import Table

    kinds = len({rate.prompts for rate in wins}) > 1
    shown = Table(title=f"win rates by {wins[0].reward}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in (["prompts"] * kinds) + ["first", "second"]:
        shown.add_column(heading, overflow="fold")
    for heading in ("steps", "first wins", "95 % interval", "ties"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for rate in wins:
        cells = [rate.first, rate.second, str(rate.num_steps), f"{rate.rate:.3f}"]
        shown.add_row(*[rate.prompts] * kinds, *cells, f"[{rate.low:.3f}, {rate.high:.3f}]", f"{rate.ties:.3f}")
    return shown


def by_reward(rows: Sequence[Row]) -> tuple[str, dict[str, list[str]]]:
    """Return the numbers of steps, as "1, 2 steps", and value and change at each of them for the trained reward and the
    held-out ones, without their parts."""
    steps = sorted({row.num_steps for row in rows})
    found: dict[str, dict[int, str]] = {}
    for row in rows:
        if row.reward == TOTAL or (row.held_out and "/" not in row.reward):
            now = f"{row.before:.3f}" if row.after is None else f"{row.after:.3f} ({row.difference:+.3f})"
            found.setdefault(row.reward, {})[row.num_steps] = now
    values = {name: [one.get(number, "not scored") for number in steps] for name, one in found.items()}
    return f"{', '.join(map(str, steps))} step{'s' * (steps != [1])}", values


def one_line(rows: Sequence[Row]) -> str:
    """Format what `by_reward` returns in one line."""
    steps, found = by_reward(rows)
    shown = "; ".join(f"{name} {', '.join(values)}" for name, values in found.items())
    return f"{shown} at {steps}"
