"""The text of the page: settings and machine of a run, key numbers, and the table of rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from alignkit.config.recipes import NONE
from alignkit.evaluation.hacking import verdict
from alignkit.evaluation.rows import TOTAL, Row
from alignkit.page.record import MINUTES, SAMPLES, Record

MINUS = "\N{MINUS SIGN}"
OUTCOMES = {
    "hacking": ("bad", "Reward hacking"),
    "no sign": ("good", "No sign of reward hacking"),
    "no rise": ("plain", "No verdict on reward hacking"),
}
"""Outcomes of `evaluation.hacking`: class in the style sheet, and heading."""


@dataclass(frozen=True)
class TableRow:
    """A row of the table of rewards; numbers are formatted."""

    reward: str
    kind: str
    """"trained", "held-out", or "part" of another reward."""
    num_steps: int
    run: int
    """Place of the run, from 0."""
    count: int
    before: str
    before_range: str
    after: str
    after_range: str
    change: str
    change_range: str
    bar: tuple[float, float, float, float] | None
    """Places of 0, the low end, the mean and the high end of the change, from 0 to 100 over all of the table."""
    sense: str
    """"up" or "down" if the interval of the change lies above or below 0, else empty."""


def number(value: float | None, signed: bool = False, size: float | None = None) -> str:
    """Format a value with three decimals, or in short form if `size`, by default its own, is large or small."""
    if value is None or not math.isfinite(value):
        return "n/a"
    size = abs(value) if size is None else size
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    if size >= 1e4 or 0 < size < 5e-4:
        text = f"{value:+.2e}" if signed else f"{value:.2e}"
    return text.replace("-", MINUS)


def spread(low: float | None, high: float | None, signed: bool = False) -> str:
    """Format an interval; empty if there is none."""
    if low is None or high is None:
        return ""
    size = max(abs(low), abs(high))
    return f"[{number(low, signed, size)}, {number(high, signed, size)}]"


def label(record: Record, reward: str) -> str:
    """Return the name of a reward in headings: the only trained reward stands for the total."""
    names = [str(one.get("name", "")) for one in _tables(record.settings.get("reward"))]
    return (names[0] if len(names) == 1 else "trained rewards, weighted") if reward == TOTAL else reward


def steps_text(count: int) -> str:
    return f"{count} step{'s' * (count != 1)}"


def facts(record: Record) -> dict[str, str]:
    """Return the settings and circumstances of a run by heading; those that are not known are left out."""
    settings, environment = record.settings, record.environment
    algorithm, sampler, surrogate = (record.section(name) for name in ("algorithm", "sampler", "surrogate"))
    rewards = [_weighed(one) for one in _tables(settings.get("reward"))]
    regularisers = [_weighed(one) for one in _tables(settings.get("regulariser"))]
    processors = [str(environment.get("cpu") or "")] + [str(gpu) for gpu in environment.get("gpus") or ()]
    cores = environment.get("cpu_count")
    found = {
        "method": algorithm.get("name"),
        "settings": (record.departure or "no recipe, no addition to the paper") if settings else "",
        "model": record.section("model").get("name"),
        "trained on": " + ".join(rewards),
        "held out": ", ".join(record.held_out),
        "surrogate": surrogate.get("name"),
        "regularisers": ", ".join(regularisers),
        "sampler": f"{sampler.get('name')}, {steps_text(int(sampler.get('num_steps', 1)))}" if sampler else "",
        "updates": f"{record.last:,} of {record.total:,}",
        "samples scored": f"{record.axes[SAMPLES][-1]:,.0f}" if record.axes and record.axes[SAMPLES][-1] else "",
        "time": _duration(_minutes(record)),
        "seed": settings.get("seed"),
        "machine": ", ".join(text for text in processors if text) + (f", {cores} CPU cores" if cores else ""),
        "software": _software(environment),
        "commit": environment.get("git"),
    }
    return {name: str(value) for name, value in found.items() if value not in (None, "")}


def heading(record: Record) -> str:
    """Return method, model and rewards in one line."""
    rewards = " and ".join(str(one.get("name", "")) for one in _tables(record.settings.get("reward")))
    parts = [
        str(record.section("algorithm").get("name", "")),
        f"on {record.section('model').get('name')}" if record.section("model") else "",
        f"for {rewards}" if rewards else "",
    ]
    recipe = record.settings.get("recipe", "")
    return " ".join(part for part in parts if part) + (f", recipe {recipe}" if recipe not in NONE else "")


def circumstances(record: Record) -> str:
    """Return in one line whether the settings are the paper's, and how much was run where."""
    found = facts(record)
    parts = {
        name: found[name] for name in ("settings", "updates", "samples scored", "time", "machine") if name in found
    }
    words = {"updates": "{} updates", "samples scored": "{} samples"}
    return " \N{MIDDLE DOT} ".join(words.get(name, "{}").format(text) for name, text in parts.items())


def outcome(record: Record) -> tuple[str, str, str]:
    """Return class, heading and text of the verdict on reward hacking, of the last evaluation or of the end point."""
    found = record.verdict
    if found is None and (last := verdict(record.compared)):
        found = last.outcome, last.text
    if found is None:
        return "plain", "No verdict on reward hacking", "it takes a held-out reward, measured before and after training"
    text = found[1].removeprefix("no sign of ").removeprefix("reward hacking: ")
    return *OUTCOMES.get(found[0], OUTCOMES["no rise"]), text


def hacked_points(record: Record) -> list[int]:
    """Return the updates of the points at which the trained reward had risen and a held-out one had fallen."""
    found = {update: verdict(point.rows) for update, point in record.points.items()}
    return [update for update, one in found.items() if one is not None and one.outcome == "hacking"]


def exported(record: Record) -> str:
    """Return in a line which weights the run exports and why."""
    if record.exported is not None:
        text = str(record.exported.get("text", ""))
        return text[:1].upper() + text[1:]
    if record.settings and record.last >= record.total:
        return "No record of exported weights"
    return f"The run has not ended: {record.last:,} of {record.total:,} updates, and no weights are exported yet"


def main_steps(record: Record) -> int:
    """Return the number of steps of the run's sampler if it was measured, else the largest one."""
    measured = {row.num_steps for row in record.compared} or {n for p in record.points.values() for _, n in p.images}
    own = record.section("sampler").get("num_steps")
    return own if own in measured else max(measured, default=0)


def key_rows(record: Record) -> list[Row]:
    """Return the rows of the total and of held-out rewards at the main number of steps, if there is a comparison."""
    steps, names = main_steps(record), [TOTAL, *record.held_out]
    return [r for r in record.compared if r.num_steps == steps and r.reward in names and r.difference is not None]


def table(records: Sequence[Record]) -> list[TableRow]:
    """Return the rows of all runs by reward and number of steps; without a comparison, those before training.

    A total that equals one of its parts is shown once, under the part's name.
    """
    found: list[tuple[int, Row]] = []
    for run, record in enumerate(records):
        rows = record.compared or list(record.evaluations.get(0, record.points[0].rows if 0 in record.points else ()))
        found += [(run, row) for row in rows if row.reward != TOTAL or not repeated(row, rows)]
    ends = [0.0, *(end for _, row in found for end in (row.low, row.high) if end is not None and math.isfinite(end))]
    names = list(dict.fromkeys(row.reward for _, row in found))
    found.sort(key=lambda item: (names.index(item[1].reward), item[1].num_steps, item[0]))
    return [_formatted(run, row, min(ends), max(ends)) for run, row in found]


def repeated(row: Row, rows: Sequence[Row]) -> bool:
    """Whether a total equals one of its parts."""
    return any(other is not row and replace(other, reward=TOTAL) == row for other in rows)


def _formatted(run: int, row: Row, lowest: float, highest: float) -> TableRow:
    low, high, middle = row.low, row.high, row.difference
    bar = None
    if low is not None and high is not None and middle is not None and highest > lowest:
        scale = 100 / (highest - lowest)
        bar = -lowest * scale, (low - lowest) * scale, (middle - lowest) * scale, (high - lowest) * scale
    return TableRow(
        row.reward,
        "part" if "/" in row.reward else "held-out" if row.held_out else "trained",
        row.num_steps,
        run,
        row.count,
        number(row.before),
        spread(row.before_low, row.before_high),
        "" if row.after is None else number(row.after),
        spread(row.after_low, row.after_high),
        "" if middle is None else number(middle, signed=True),
        spread(low, high, signed=True),
        bar,
        "up" if low is not None and low > 0 else "down" if high is not None and high < 0 else "",
    )


def _tables(found: Any) -> list[Mapping[str, Any]]:
    return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []


def _weighed(one: Mapping[str, Any]) -> str:
    weight = one.get("weight", 1.0)
    return f"{one.get('name')}{'' if weight == 1 else f' (weight {weight:g})'}"


def _minutes(record: Record) -> float:
    last = float(record.axes[MINUTES][-1]) if record.axes else 0.0
    return max([last, *(point.place[MINUTES] for point in record.points.values())])


def _duration(minutes: float) -> str:
    seconds = round(minutes * 60)
    if not seconds:
        return ""
    hours, minute, second = seconds // 3600, seconds // 60 % 60, seconds % 60
    text = f"{hours} h {minute} min" if hours else f"{minute} min {second} s" if minute else f"{second} s"
    return f"{text} of updates and points"


def _software(environment: Mapping[str, Any]) -> str:
    versions = environment.get("versions")
    names = ("alignkit", "torch", "diffusers")
    shown = (
        [f"{name} {versions[name]}" for name in names if versions.get(name)] if isinstance(versions, Mapping) else []
    )
    python = environment.get("python")
    return ", ".join([*shown, *([f"Python {python}"] if python else [])])
