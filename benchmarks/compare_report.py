"""Render the tables of compare_methods.py in markdown."""

from __future__ import annotations

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
    seeds, prompts = values.shape
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(seeds, (resamples, seeds), generator=generator)
    column = torch.randint(prompts, (resamples, prompts), generator=generator)
    means = values.double()[row[:, :, None], column[:, None, :]].nanmean((1, 2))
    low, high = means.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(values.double().nanmean()), low, high


def render(results: Mapping[str, Any], table: Table) -> str:
    """Render the finished part of a table in markdown, or a sentence if no method was run."""
    here = final(results, table)
    base = next((r for r in here if not r["method"]), None)
    if base is None or not any(r["method"] for r in here):
        return "It has not been run.\n"
    parts = []
    for what, heading in (("trained", "The reward that is trained on"), ("pixel_check", "The pixel check")):
        columns = [f"{k} step{'s' * (k > 1)}" for k in table.steps]
        lines = [["method", *columns], ["---"] * (len(columns) + 1), ["base", *_cells([base], None, what, table)]]
        lines += [[m, *_cells(found, base, what, table)] for m, found in _by_method(here, table)]
        parts += [f"{heading}: mean, and change against the base with its interval.\n", _markdown(lines)]
    lines = [["method", "samples", "updates", "learning rate", "seeds", "drift", "minutes a run"], ["---"] * 7]
    for method, found in _by_method(here, table):
        drift = sum(sum(r["drift"].values()) / len(r["drift"]) for r in found) / len(found)
        minutes = sum(r["seconds"] for r in found) / len(found) / 60
        updates = sum(r["updates"] for r in found) / len(found)
        seeds = ", ".join(str(r["seed"]) for r in found)
        lines += [
            [method, str(found[0]["samples"]), f"{updates:.0f}", f"{found[0]['rate']:g}", seeds, f"{drift:.3f}",
             f"{minutes:.1f}"]
        ]  # fmt: skip
    parts += ["How it was trained; drift is the kernel distance of all images to the base's, mean over steps.\n"]
    parts += [_markdown(lines)]
    found = {r["git"] or "unknown" for r in here}
    commits = ", ".join(sorted(git[:7] + ", changed" * git.endswith("-dirty") for git in found))
    cpus = ", ".join(sorted({r["cpu"] for r in here}))
    torches = ", ".join(sorted({r["versions"]["torch"] for r in here}))
    parts += [f"`python benchmarks/compare_methods.py --tables {table.name}` on {commits}; {cpus}; torch {torches}.\n"]
    return "\n".join(parts)


def measured(results: Mapping[str, Any], algorithm: str) -> str:
    """Render the results of one algorithm, one line per variant and number of steps, or a sentence if none was run."""
    lines = [["table", "steps", "trained reward", "change", "pixel check", "change"], ["---"] * 6]
    for table in TABLES.values():
        here = final(results, table)
        base = next((r for r in here if not r["method"]), None)
        for method, found in _by_method(here, table) if base is not None else ():
            if table.methods[method].algorithm != algorithm:
                continue
            cells = {what: _cells(found, base, what, table) for what in ("trained", "pixel_check")}
            for at, k in enumerate(table.steps):
                split = [cells[what][at].partition(" (") for what in ("trained", "pixel_check")]
                name = f"{table.title}: {method}" if at == 0 else ""
                lines += [[name, str(k), *(part for mean, _, change in split for part in (mean, change[:-1]))]]
    return _markdown(lines) if len(lines) > 2 else "It has not been run in the comparison.\n"


def _by_method(results: Sequence[Mapping[str, Any]], table: Table) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    for method in table.methods:
        if found := [r for r in results if r["method"] == method]:
            yield method, found


def _cells(found: Sequence[Mapping[str, Any]], base: Mapping[str, Any] | None, what: str, table: Table) -> list[str]:
    texts = []
    for k in map(str, table.steps):
        values = torch.tensor([r["values"][k][what] for r in found])
        mean = float(values.nanmean())
        if base is None:
            texts.append(f"{mean:.3f}")
            continue
        change, low, high = interval(values - torch.tensor(base["values"][k][what]))
        texts.append(f"{mean:.3f} ({change:+.3f} [{low:+.3f}, {high:+.3f}])")
    return texts


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
