"""The charts of the page, chosen from what the records of runs hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from alignkit.evaluation.rows import TOTAL, Row
from alignkit.page import curves
from alignkit.page.curves import Series
from alignkit.page.facts import label, main_steps, steps_text
from alignkit.page.gallery import drift
from alignkit.page.record import AXES, SAMPLES, Record, value_of

FIRST = ("reward", "pair_accuracy", "rank_correlation", "surrogate_score", "loss", "grad_norm")
"""Metrics that are shown first; then terms of the loss, such as reference_loss; then all others, folded away."""
MEANINGS = {
    "reward": "training reward",
    "pair_accuracy": "surrogate agreement: share of pairs that it ranks as the reward does",
    "rank_correlation": "surrogate agreement: rank correlation with the reward",
    "surrogate_score": "score of the surrogate",
    "loss": "all terms together",
    "grad_norm": "gradient norm",
    "reference_loss": "drift: distance from the predictions before training",
    "images_per_second": "images a second",
    "memory_gib": "memory in GiB",
}
MOST = 24
"""Largest number of charts of metrics."""
NEUTRAL = 7
"""Colour of values before training."""


@dataclass(frozen=True)
class Chart:
    """A chart with its names, which the page escapes."""

    title: str
    subtitle: str
    svg: str
    keys: Sequence[tuple[str, int]]
    """Names of curves and their colours; empty where there is one curve."""
    note: str = ""


def ranges(records: Sequence[Record]) -> curves.Ranges:
    """Return the range of each axis over all runs; an axis on which nothing moves is left out."""
    found = {}
    for axis in AXES:
        places = [float(r.axes[axis][i]) for r in records if r.axes for i in (0, -1)]
        places += [point.place[axis] for r in records for point in r.points.values()]
        if not places or (axis == SAMPLES and not max(places)):
            continue
        found[axis] = min(0.0, *places), max(places) or 1.0
    return found


def point_charts(records: Sequence[Record], limits: curves.Ranges) -> list[Chart]:
    """Plot the trained reward and every held-out one at the points: a curve for each run or number of steps."""
    charts = []
    for reward in _rewards(records):
        numbers = sorted({row.num_steps for r in records for p in r.points.values() for row in p.rows})
        single = len(records) == 1
        for group in [numbers] if single else [[number] for number in numbers]:
            curve = [(run, r, n) for run, r in enumerate(records) for n in group]
            series = {
                (steps_text(n) if single else r.name): found
                for place, (run, r, n) in enumerate(curve)
                if (found := _at_points(r, reward, n, place if single else run)) is not None
            }
            if series:
                mark = records[0].points[records[0].end].place if single and records[0].exported else None
                at = "" if single else f"{steps_text(group[0])}; "
                charts.append(
                    Chart(
                        _title(records, reward),
                        f"{at}{'trained' if reward == TOTAL else 'held-out'}, at the points",
                        curves.over_progress(list(series.values()), limits, mark),
                        [(name, one.colour) for name, one in series.items()],
                    )
                )
    return charts


def _at_points(record: Record, reward: str, steps: int, colour: int) -> Series | None:
    """Return values at the points, and a band: the value before training plus the interval of the change."""
    found = [
        (p.place, row)
        for p in record.points.values()
        for row in p.rows
        if (row.reward, row.num_steps) == (reward, steps)
    ]
    found = [(place, row) for place, row in found if np.isfinite(value_of(row))]
    if not found:
        return None
    value = np.array([value_of(row) for _, row in found])
    low = np.array([row.before + (row.low or 0.0) for _, row in found])
    high = np.array([row.before + (row.high or 0.0) for _, row in found])
    places = {axis: np.array([place[axis] for place, _ in found]) for axis in AXES}
    return Series(colour, places, value, low, high, dotted=True, base=float(found[0][1].before))


def metric_charts(records: Sequence[Record], limits: curves.Ranges) -> tuple[list[Chart], list[Chart], list[str]]:
    """Plot metrics against progress. Returns the charts to show, those to fold away, and names that have none."""
    names = dict.fromkeys(name for r in records for name in r.metrics if "/" not in name)
    first = [name for name in FIRST if name in names]
    first += [name for name in names if name.endswith("_loss")]
    others = [name for name in names if name not in first]
    charts: dict[str, Chart] = {}
    left_out = []
    for name in [*first, *others]:
        chart = metric_chart(records, name, limits) if len(charts) < MOST else None
        if chart is None:
            left_out.append(name)
        else:
            charts[name] = chart
    shown, folded = ([charts[n] for n in group if n in charts] for group in (first, others))
    return shown, folded, left_out


def metric_chart(records: Sequence[Record], name: str, limits: curves.Ranges) -> Chart | None:
    """Plot one metric of all runs against progress; None if it has no finite value."""
    bins = max(30, curves.BINS * 2 // (1 + len(records)))
    keys, series, notes = [], [], []
    for run, record in enumerate(records):
        values = record.metrics.get(name)
        found = curves.reduced(record.axes, values, run, bins) if values is not None else None
        if values is None or found is None:
            continue
        one, window = found
        missing = record.unknown[name]
        notes += [f"mean of {window:,} updates"] * (window > 1)
        notes += [f"not finite in {missing:,} update{'s' * (missing > 1)}"] * (missing > 0)
        series.append(one)
        keys.append((record.name, run))
    if not series:
        return None
    note = "; ".join(dict.fromkeys(notes))
    return Chart(
        name, MEANINGS.get(name, ""), curves.over_progress(series, limits), keys if len(records) > 1 else [], note
    )


def step_charts(records: Sequence[Record]) -> list[Chart]:
    """Plot trained and held-out rewards by number of steps, before and after, with intervals of the means."""
    charts = []
    for reward in _rewards(records):
        groups: list[tuple[str, int, dict[int, tuple[float, float, float]]]] = []
        for run, record in enumerate(records):
            rows = [row for row in record.compared if row.reward == reward]
            before = _interval(rows, lambda row: (row.before, row.before_low, row.before_high))
            after = _interval(rows, lambda row: (row.after, row.after_low, row.after_high))
            if before and before not in [values for _, _, values in groups]:
                named = any(colour == NEUTRAL for _, colour, _ in groups)
                groups.append((f"before, {record.name}" if named else "before", NEUTRAL, before))
            if after:
                groups.append((record.name if len(records) > 1 else "after", run, after))
        if len({number for _, _, values in groups for number in values}) > 1:
            title = _title(records, reward)
            kind = "trained" if reward == TOTAL else "held-out"
            svg = curves.by_steps([(colour, values) for _, colour, values in groups])
            charts.append(
                Chart(title, f"{kind}, by number of steps", svg, [(name, colour) for name, colour, _ in groups])
            )
    return charts


def _interval(
    rows: Sequence[Row], values: Callable[[Row], tuple[float | None, float | None, float | None]]
) -> dict[int, tuple[float, float, float]]:
    found = {}
    for row in rows:
        mean, low, high = values(row)
        if mean is not None and np.isfinite(mean):
            found[row.num_steps] = mean, mean if low is None else low, mean if high is None else high
    return found


def drift_charts(records: Sequence[Record]) -> list[Chart]:
    """Plot rewards at the points against the change of pixels from the images before training."""
    single = len(records) == 1
    numbers = sorted({n for p in records[0].points.values() for _, n in p.images}) if single else []
    curve = [(r, n, i) for r in records for i, n in enumerate(numbers)]
    if not single:
        curve = [(r, main_steps(r), i) for i, r in enumerate(records)]
    changes = [drift(record, steps) for record, steps, _ in curve]
    charts = []
    for reward in _rewards(records):
        paths, keys = [], []
        for (record, steps, colour), changed in zip(curve, changes, strict=True):
            values = {
                update: value_of(row)
                for update, point in record.points.items()
                for row in point.rows
                if (row.reward, row.num_steps) == (reward, steps) and np.isfinite(value_of(row)) and update in changed
            }
            if len(values) > 1:
                paths.append((colour, np.array([changed[u] for u in values]), np.array(list(values.values()))))
                keys.append((steps_text(steps) if single else f"{record.name}, {steps_text(steps)}", colour))
        if paths:
            title = _title(records, reward)
            kind = "trained" if reward == TOTAL else "held-out"
            charts.append(Chart(title, f"{kind}, against drift", curves.trail(paths, "change of pixels"), keys))
    return charts


def _rewards(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys([TOTAL, *(name for record in records for name in record.held_out)]))


def _title(records: Sequence[Record], reward: str) -> str:
    names = {label(record, reward) for record in records}
    return names.pop() if len(names) == 1 else "trained reward"
