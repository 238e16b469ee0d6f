"""How far the gradients of a method's rounds agree: how many samples it takes until an update leads somewhere.

    python benchmarks/agreement.py [--rounds 24] [--tables lcm,turbo] [--methods ddpo,pso] [--set KEY=VALUE ...]

No policy is trained. Each round of a method of compare_methods.py draws its samples with the model as it is and gives
one gradient, the mean over its rows; the cosine between those of two rounds says how much of one is signal. With
a cosine of c, the mean over n rounds has a cosine of sqrt(n c / (1 + (n - 1) c)) with what all rounds together would
give; `half` is the number of samples at which that is 0.5. The interval of the cosine is a 95 % bootstrap over rounds.
A surrogate learns along, as it does in a run; the distillation term beside a reward is switched off.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from compare_methods import samples_of_a_round
from compare_tables import TABLES, Cell, Table
from rich.console import Console
from torch import Tensor

from alignkit import config
from alignkit.run import Run
from alignkit.toml import parse_assignment


def gradients(run: Run, rounds: int) -> Tensor:
    """(R, number of trained weights), one for each round that had something to learn from, of length one."""
    trainer, _ = run._build(run._accelerator())
    parameters, found = trainer.ctx.policy.parameters(), []
    while trainer.warming_up:
        list(trainer.round())
    for _ in range(rounds):
        with torch.no_grad():
            collected = trainer.algorithm.collect(trainer.batch(), trainer.ctx)
        trainer.batches += 1
        trainer._update_surrogate(collected)
        updates = list(trainer.algorithm.updates(collected, trainer.ctx))
        for rows in updates:
            trainer._backward(rows, lambda part: trainer.algorithm.loss(part, trainer.ctx))
        gradient = (
            torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]) if updates else torch.zeros(1)
        )
        for parameter in parameters:
            parameter.grad = None
        if bool(gradient.any()):
            found.append(gradient / gradient.norm())
    return torch.stack(found)


def agreement(found: Tensor, draws: int = 2000) -> tuple[float, float, float]:
    """Mean cosine between two rounds, and its 95 % interval over rounds drawn anew."""
    cosines, count = found @ found.T, len(found)
    drawn = torch.randint(count, (draws, count), generator=torch.Generator().manual_seed(0))
    different = drawn[:, :, None] != drawn[:, None, :]
    again = cosines[drawn[:, :, None], drawn[:, None, :]]
    means = (again * different).sum((1, 2)) / different.sum((1, 2))
    low, high = means.nanquantile(torch.tensor([0.025, 0.975])).tolist()
    return float((cosines.sum() - count) / (count * (count - 1))), low, high


def measure(table: Table, method: str, rounds: int, overrides: Mapping[str, Any]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        settings = {**Cell(table, method, 1e-4, 0, 0).settings(), "output": f"{folder}/run"}
        if "algorithm.distillation_weight" in settings:
            settings["algorithm.distillation_weight"] = 0.0
        settings |= overrides
        run = Run(config.load(None, settings))
        run.check()
        found = gradients(run, rounds)
        each = samples_of_a_round(run, table.methods[method])
    cosine, low, high = agreement(found)
    half = f"{math.ceil(each * (1 - cosine) / (3 * cosine))}" if low > 0 else "not found"
    return f"{method:<20} {each:>4} samples a round  cosine {cosine:+.4f} [{low:+.4f}, {high:+.4f}]  half {half}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--tables", default="lcm,turbo")
    parser.add_argument("--methods", default="", help="algorithms of the tables; empty: all")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    wanted, console = set(filter(None, options.methods.split(","))), Console(width=120, highlight=False)
    for name in options.tables.split(","):
        table = TABLES[name]
        console.print(f"{table.name}: {table.title}")
        for method, settings in table.methods.items():
            if not wanted or settings.algorithm in wanted:
                overrides = dict(map(parse_assignment, options.set))
                console.print(f"  {measure(table, method, options.rounds, overrides)}")


if __name__ == "__main__":
    main()
