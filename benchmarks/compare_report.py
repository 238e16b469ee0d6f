"""Render the tables of compare_methods.py in markdown."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from compare_tables import TABLES, Table, tuning_cells
from torch import Tensor

RESULT = "result.json"
RESULTS = Path(__file__).parent / "results"


def read(folder: Path) -> dict[str, Any]:
    """Return the results of all cells, by the name of the cell."""
    return {
        file.parent.relative_to(folder).as_posix(): json.loads(file.read_text())
        for file in sorted(folder.rglob(RESULT))
    }


def trained_mean(result: Mapping[str, Any]) -> float:
    """Return the mean of the trained reward over prompts and steps."""
    return float(torch.tensor([v["trained"] for v in result["values"].values()]).nanmean())


def final(results: Mapping[str, Any], table: Table) -> list[Mapping[str, Any]]:
    """Return the results of a table to show: the base, and the runs at the best of the learning rates that were run."""
    grids = {m: [results[c.key] for c in tuning_cells(table, m) if c.key in results] for m in table.methods}
    best = {method: max(tried, key=trained_mean)["rate"] for method, tried in grids.items() if tried}
    shown = []
    for key, r in results.items():
        if r["table"] != table.name or r["tuning"]:
            continue
        if (method := table.methods.get(r["method"])) is not None:
            rate, samples = method.rate or best.get(r["method"], r["rate"]), method.samples or table.samples
            if r["rate"] != rate or not key.endswith(f"-{samples}"):
                continue
        shown.append(r)
    return shown


def interval(values: Tensor, resamples: int = 2000) -> tuple[float, float, float]:
    """Return the mean of `values` (seeds, prompts) and its 95 % bootstrap interval over both seeds and prompts."""
    return _interval(tuple(map(tuple, values.double().tolist())), resamples)


@functools.cache  # tables, pages and figures show the same intervals
def _interval(numbers: tuple[tuple[float, ...], ...], resamples: int) -> tuple[float, float, float]:
    values = torch.tensor(numbers, dtype=torch.float64)
    seeds, prompts = _resamples(values.shape, resamples)
    sums, known = ((seeds @ part * prompts).sum(1) for part in (values.nan_to_num(), (~values.isnan()).double()))
    low, high = (sums / known).nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(values.nanmean()), low, high


@functools.cache
def _resamples(shape: tuple[int, ...], resamples: int) -> list[Tensor]:
    """Return for each axis how often each of its places is in each resample with replacement: (resamples, places)."""
    generator = torch.Generator().manual_seed(0)
    counts = []
    for size in shape:
        chosen = torch.randint(size, (resamples, size), generator=generator)
        ones = torch.ones(chosen.shape, dtype=torch.float64)
        counts.append(torch.zeros_like(ones).scatter_add_(1, chosen, ones))
    return counts


def changes(
    found: Sequence[Mapping[str, Any]], base: Mapping[str, Any], what: str, table: Table
) -> dict[int, tuple[float, float, float, float]]:
    """Return the mean, the change against the base and its 95 % interval, by number of steps."""
    numbers = {}
    for k in table.steps:
        values = torch.tensor([r["values"][str(k)][what] for r in found])
        numbers[k] = (float(values.nanmean()), *interval(values - torch.tensor(base["values"][str(k)][what])))
    return numbers


HEADINGS = {"trained": "The reward that is trained on", "pixel_check": "The pixel check"}


def render(results: Mapping[str, Any], table: Table) -> str:
    """Render the finished part of a table in markdown, or a sentence if no method was run."""
    if not was_run(results, table):
        return "It has not been run.\n"
    return "\n".join([*(values(results, table, what) for what in HEADINGS), training(results, table)])


def was_run(results: Mapping[str, Any], table: Table) -> bool:
    """Return whether the base and a method of the table were run."""
    methods = {bool(r["method"]) for r in final(results, table)}
    return methods == {True, False}


def values(results: Mapping[str, Any], table: Table, what: str) -> str:
    """Render means and changes of one reward, "trained" or "pixel_check", of a table that was run."""
    here = final(results, table)
    base = next(r for r in here if not r["method"])
    columns = [f"{k} step{'s' * (k > 1)}" for k in table.steps]
    means = [f"{torch.tensor(base['values'][str(k)][what]).nanmean():.3f}" for k in table.steps]
    lines = [["method", *columns], ["---"] * (len(columns) + 1), ["base", *means]]
    lines += [[m, *_cells(found, base, what, table)] for m, found in by_method(here, table)]
    return f"{HEADINGS[what]}: mean, and change against the base with its interval.\n\n{_markdown(lines)}"


def training(results: Mapping[str, Any], table: Table) -> str:
    """Render how the methods of a table that was run were trained, and by which command."""
    here = final(results, table)
    lines = [["method", "samples", "updates", "learning rate", "seeds", "drift", "minutes a run"], ["---"] * 7]
    for method, found in by_method(here, table):
        drift = sum(sum(r["drift"].values()) / len(r["drift"]) for r in found) / len(found)
        minutes = sum(r["seconds"] for r in found) / len(found) / 60
        updates = sum(r["updates"] for r in found) / len(found)
        seeds = ", ".join(str(r["seed"]) for r in found)
        lines += [
            [method, str(found[0]["samples"]), f"{updates:.0f}", f"{found[0]['rate']:g}", seeds, f"{drift:.3f}",
             f"{minutes:.1f}"]
        ]  # fmt: skip
    commits = ", ".join(
        sorted(git[:7] + ", changed" * git.endswith("-dirty") for git in {r["git"] or "unknown" for r in here})
    )
    cpus = ", ".join(sorted({r["cpu"] for r in here}))
    torches = ", ".join(sorted({r["versions"]["torch"] for r in here}))
    origin = f"`python benchmarks/compare_methods.py --tables {table.name}` on {commits}; {cpus}; torch {torches}."
    text = "How it was trained; drift is the kernel distance of all images to the base's, mean over steps."
    return f"{text}\n\n{_markdown(lines)}\n{origin}\n"


def measured(results: Mapping[str, Any], algorithm: str) -> str:
    """Render the results of one algorithm, one line per variant and number of steps, or a sentence if none was run."""
    lines = [["table", "steps", "trained reward", "change", "pixel check", "change"], ["---"] * 6]
    for table in TABLES.values():
        here = final(results, table)
        base = next((r for r in here if not r["method"]), None)
        for method, found in by_method(here, table) if base is not None else ():
            if table.methods[method].algorithm != algorithm:
                continue
            cells = {what: _cells(found, base, what, table) for what in ("trained", "pixel_check")}
            for at, k in enumerate(table.steps):
                split = [cells[what][at].partition(" (") for what in ("trained", "pixel_check")]
                name = f"{table.title}: {method}" if at == 0 else ""
                lines += [[name, str(k), *(part for mean, _, change in split for part in (mean, change[:-1]))]]
    return _markdown(lines) if len(lines) > 2 else "It has not been run in the comparison.\n"


def by_method(results: Sequence[Mapping[str, Any]], table: Table) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Yield the methods of a table that were run, in its order, and their results."""
    for method in table.methods:
        if found := [r for r in results if r["method"] == method]:
            yield method, found


def _cells(found: Sequence[Mapping[str, Any]], base: Mapping[str, Any], what: str, table: Table) -> list[str]:
    return [
        f"{mean:.3f} ({change:+.3f} [{low:+.3f}, {high:+.3f}])"
        for mean, change, low, high in changes(found, base, what, table).values()
    ]


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
