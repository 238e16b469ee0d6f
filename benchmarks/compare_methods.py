"""The papers' comparisons at small scale, on the embedded world: every method generates the same number of samples.

    python benchmarks/compare_methods.py                         # everything: a day on one core
    python benchmarks/compare_methods.py --tables turbo --methods sdpo,ddpo --seeds 0 --cells 1
    python benchmarks/compare_methods.py --render
    python benchmarks/compare_methods.py --quick --out runs/quick

A table is a model, a sampler, the numbers of steps it is evaluated at, and methods. A cell is one run: a method, a
learning rate, a seed. Each method is first run once with each rate of the table's grid, with seed TUNING_SEED; the rate
with the best trained reward on *training* prompts, mean over the numbers of steps, is then run with every seed. A cell
ends after the round in which it reaches its number of samples (`Method.samples_per_prompt`). Tuning runs are not
shorter, because the rate that raises a reward fastest may lose it again. The number of updates and of queries of the
reward is up to the method. Every cell uses the same noises for the held-out prompts. A final cell is also measured at
ten points on its way, for the curves of docs/algorithms.

A finished cell writes `result.json` into its folder in `--out` and is not run again; an interrupted one continues from
its checkpoint. So the comparison can be run cell by cell, extended by seeds and methods, and divided among processes
with different tables or methods. `benchmarks/results`, the default, holds the results that docs/results.md shows
(`make docs` writes them there); to reproduce them from scratch, name another folder. `--render` prints the tables of
the existing results. Intervals are 95 % bootstrap intervals over seeds and prompts.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from compare_report import RESULT, RESULTS, read, render, trained_mean
from compare_tables import TABLES, Cell, Method, Table, quick, tuning_cells
from rich.console import Console
from torch import Tensor

from alignkit.config import load as config
from alignkit.data.prompts import read_examples
from alignkit.errors import ConfigError
from alignkit.evaluation import measure as evaluation
from alignkit.evaluation.statistics import kernel_distance
from alignkit.files import write_file
from alignkit.interfaces import Algorithm, Context
from alignkit.page.record import MINUTES, read_record
from alignkit.records import Batch
from alignkit.runs.folder import environment
from alignkit.runs.points import planned
from alignkit.runs.run import Run
from alignkit.training import checkpoint
from alignkit_shapes.models import FOLDER, WEIGHTS

PIXEL_CHECK = "pixel_check"
POINTS, POINT_PROMPTS = 10, 64
"""Places, evenly spaced over its samples, at which a final cell is measured, and the number of prompts."""
TRAIN, HELD_OUT = FOLDER / "prompts" / "train.txt", FOLDER / "prompts" / "held_out.txt"


@functools.cache
def weights() -> str:
    """Return a hash of the embedded weights, 16 hex digits."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(WEIGHTS.rglob("*.safetensors")):
        digest.update(f"{file.relative_to(WEIGHTS).as_posix()} ".encode() + file.read_bytes())
    return digest.hexdigest()


def where() -> dict[str, Any]:
    """Return versions, commit and CPU that a cell is run on."""
    found = environment()
    return {key: found[key] for key in ("versions", "git", "cpu")}


class Budgeted(Run):
    """A run that ends after a number of rounds, including those before an interruption."""

    rounds, limit = 0, 0

    def algorithm(self) -> Algorithm[Any, Any]:
        algorithm = super().algorithm()
        collect = algorithm.collect

        def counted(batch: Batch, ctx: Context) -> Any:
            self.rounds += 1
            if self.rounds >= self.limit:
                self.stop()
            return collect(batch, ctx)

        algorithm.collect = counted  # type: ignore[method-assign]
        return algorithm


def samples_of_a_round(run: Run, method: Method) -> int:
    fields, source = run.config.algorithm.fields, method.samples_per_prompt
    if source == "rows":
        return run.config.train.rows_per_update
    each = 2 * fields["pairs"] if source == "2 pairs" else fields[source]
    return run.config.data.batch_size * int(each)


def train(cell: Cell, folder: Path, rounds: int = 0) -> tuple[Run, dict[str, Any]]:
    """Train the cell in `folder`, or continue it, up to this number of rounds that generate samples; 0: to its end.

    Returns the run, and its samples, updates and seconds so far. These are the seconds of its rounds, without loading.
    """
    if (folder / "run.toml").is_file() and checkpoint.latest(folder / "checkpoints") is None:
        shutil.rmtree(folder)  # interrupted before the first checkpoint
    existing = (folder / "run.toml").is_file()
    source = (folder / "run.toml", {}) if existing else (None, {**cell.settings(), "output": str(folder)})
    run = Budgeted(config.load(*source), folder=folder if existing else None)
    saved = checkpoint.latest(folder / "checkpoints") if existing else None
    run.rounds = checkpoint.load(saved)["trainer"]["batches"] if saved else 0
    method = cell.table.methods[cell.method]
    rounds = rounds or rounds_of(run, cell)
    run.limit = method.free_rounds + rounds
    if run.rounds < run.limit:
        for _ in run.train(Console(quiet=True)):
            pass
    record = read_record(folder)
    seconds = 60 * float(record.axes[MINUTES][-1])
    samples = rounds * samples_of_a_round(run, method)
    return run, {"samples": samples, "updates": record.last, "seconds": round(seconds, 1)}


def rounds_of(run: Run, cell: Cell) -> int:
    """Return the number of rounds in which the cell generates its samples."""
    return -(-cell.samples // samples_of_a_round(run, cell.table.methods[cell.method]))


def measure(run: Run, table: Table, prompts: Path, limit: int, average: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return trained reward and pixel check of every prompt by number of steps, and features of the images."""
    policy, examples = run.policy(), read_examples(prompts)[:limit]
    rewards, ((trained, _, _),) = run.with_measured([PIXEL_CHECK]), run.trained_rewards()
    rewards.load(policy.device)
    with policy.using(average):
        found = evaluation.measure(
            policy, run.sampler(), rewards, examples, table.steps, run.config.evaluate.seed,
            run.config.evaluate.batch_size, grid_size=1, features=policy.features, samples=table.images,
        )  # fmt: skip
    values = {
        str(k): {
            "trained": [round(v, 4) for v in found.values[k, trained].tolist()],
            "pixel_check": [round(v, 4) for v in found.values[k, PIXEL_CHECK].tolist()],
        }
        for k in table.steps
    }
    return {"values": values, "features": found.features}


# The comparison


class Comparison:
    """The cells that were run, with their results in a folder."""

    def __init__(self, folder: Path, prompts: int, points: int, console: Console) -> None:
        self.folder, self.prompts, self.points, self.console = folder, prompts, points, console
        self.results = read(folder)
        self._features: dict[str, dict[int, Tensor]] = {}

    def has(self, cell: Cell) -> bool:
        """Whether the cell was run. Raises ConfigError if it was run with settings other than the current ones."""
        found = self.results.get(cell.key)
        if found is None:
            return False
        now = json.loads(json.dumps(self._settings(cell)))
        changed = sorted(k for k in now.keys() | found["settings"].keys() if now.get(k) != found["settings"].get(k))
        if changed:
            raise ConfigError(
                f"{self.folder / cell.key}: was run with other settings ({', '.join(changed)}); choose another --out, "
                "or remove the folder"
            )
        return True

    def _settings(self, cell: Cell) -> dict[str, Any]:
        """Return the settings of a cell without the defaults of models and methods.

        Those follow from the commit, and are written to `resolved`.
        """
        table = cell.table
        evaluation = {"steps": table.steps, "prompts": self.prompts, "images": table.images}
        return {**cell.settings(), **evaluation, "weights": weights()}

    def run(self, cell: Cell) -> None:
        """Train and evaluate the cell, and write its result."""
        self.console.print(f"[bold]{cell.key}[/]")
        table, outcome = cell.table, {}
        if cell.method:
            outcome["points"] = self._points(cell) if self.points and not cell.tuning else []
            run, ended = train(cell, self.folder / cell.key)
            outcome |= ended
            run.policy()  # loads the trained weights
            outcome["resolved"] = config.to_toml(replace(run.config, output="")).replace(str(FOLDER), FOLDER.name)
        else:
            run = Run(config.load(None, cell.settings()))
        # Rates are chosen on training prompts, so that held-out prompts have no influence on the choice.
        found = measure(run, table, TRAIN if cell.tuning else HELD_OUT, self.prompts, run.weights)
        drift = {}
        if cell.method and not cell.tuning:
            base = self._base_features(table)
            drift = {str(k): round(kernel_distance(base[k], found["features"][k])[0], 4) for k in table.steps}
        elif not cell.method:
            self._features[table.name] = found["features"]
        self.results[cell.key] = {
            "table": table.name, "method": cell.method, "rate": cell.rate, "seed": cell.seed, "tuning": cell.tuning,
            **outcome, "values": found["values"], "drift": drift, **where(), "settings": self._settings(cell),
        }  # fmt: skip
        (self.folder / cell.key).mkdir(parents=True, exist_ok=True)
        write_file(self.folder / cell.key / RESULT, json.dumps(self.results[cell.key]))
        self._measured(cell).unlink(missing_ok=True)
        for k, values in found["values"].items():
            means = "  ".join(f"{name} {sum(v) / len(v):.3f}" for name, v in values.items())
            self.console.print(f"  {k} steps: {means}")

    def _points(self, cell: Cell) -> list[dict[str, Any]]:
        """Train the cell to its end in parts; return what was measured before, between and after them.

        Each has samples, minutes, and the means of both rewards over the first held-out prompts, by number of steps.
        """
        folder = self.folder / cell.key
        start = Run(config.load(None, {**cell.settings(), "output": str(folder)}))
        ends = [0, *planned(self.points, rounds_of(start, cell))]
        file = self._measured(cell)
        points = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        for rounds in ends[len(points) :]:
            run, at = train(cell, folder, rounds) if rounds else (start, {"samples": 0, "seconds": 0.0})
            table = replace(cell.table, images=1)
            run.policy()
            found = measure(run, table, HELD_OUT, min(POINT_PROMPTS, self.prompts), run.weights if rounds else {})
            means = {
                k: {name: round(float(torch.tensor(v).nanmean()), 4) for name, v in values.items()}
                for k, values in found["values"].items()
            }
            points.append({"samples": at["samples"], "minutes": round(at["seconds"] / 60, 2), "values": means})
            write_file(file, json.dumps(points))  # an interrupted cell cannot go back to it
        return points

    def _measured(self, cell: Cell) -> Path:
        """Return the file with the points of a cell that has not ended."""
        return self.folder / f"{cell.key}.points.json"

    def _base_features(self, table: Table) -> dict[int, Tensor]:
        if table.name not in self._features:
            run = Run(config.load(None, Cell(table).settings()))
            self._features[table.name] = measure(run, table, HELD_OUT, self.prompts, {})["features"]
        return self._features[table.name]

    def best_rate(self, table: Table, method: str) -> float:
        """Return the method's own rate, or that with the best trained reward on training prompts, mean over steps."""
        if own := table.methods[method].rate:
            return own
        cells = tuning_cells(table, method)
        return max(cells, key=lambda cell: trained_mean(self.results[cell.key])).rate


def cells(comparison: Comparison, table: Table, methods: Sequence[str], seeds: Sequence[int]) -> Iterator[Cell]:
    """Yield the cells of a table in order; the final cells of a method come after its tuning."""
    yield Cell(table)
    for method in methods:
        yield from tuning_cells(table, method)
    for seed in seeds:
        for method in methods:
            samples = table.methods[method].samples or table.samples
            yield Cell(table, method, comparison.best_rate(table, method), seed, samples)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder with a subfolder for each run")
    parser.add_argument("--tables", default=",".join(TABLES), help="names of tables, separated by commas")
    parser.add_argument(
        "--methods",
        default="",
        help="rows of the tables or algorithms, separated by commas without spaces; empty: all",
    )
    parser.add_argument("--seeds", default="0,1,2", help="seeds, separated by commas")
    parser.add_argument("--prompts", type=int, default=200, help="number of prompts to evaluate on")
    parser.add_argument("--cells", type=int, default=0, help="stop after this many cells; 0: run all")
    parser.add_argument("--quick", action="store_true", help="a smoke test: few samples, eight prompts, one seed")
    parser.add_argument("--render", action="store_true", help="print the tables of the existing results; run nothing")
    options = parser.parse_args(arguments)
    prompts, points = (8, 0) if options.quick else (options.prompts, POINTS)
    comparison = Comparison(options.out, prompts, points, Console(width=100))
    tables = [quick(TABLES[name]) if options.quick else TABLES[name] for name in options.tables.split(",")]
    if options.render:
        for table in tables:
            print(f"### {table.title} ({table.paper})\n\n{render(comparison.results, table)}")
        return
    seeds = [0] if options.quick else [int(seed) for seed in options.seeds.split(",")]
    wanted = set(filter(None, re.split(r",(?! )", options.methods)))  # a comma followed by a space is part of a name
    known = {n for table in tables for name, method in table.methods.items() for n in (name, method.algorithm)}
    if unknown := sorted(wanted - known):
        raise ConfigError(
            f"--methods: found {unknown[0]!r}, expected one or more of {', '.join(map(repr, sorted(known)))}"
        )
    done = 0
    for table in tables:
        methods = [name for name, method in table.methods.items() if not wanted or wanted & {name, method.algorithm}]
        for cell in cells(comparison, table, methods, seeds):
            if comparison.has(cell):
                continue
            if options.cells and done == options.cells:
                return
            comparison.run(cell)
            done += 1


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
