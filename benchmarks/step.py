"""Profile of a LaSRO update: time for sampling, decoding, reward, surrogate, generator and bookkeeping.

    python benchmarks/step.py [--updates 5] [--model shapes_lcm] [--set KEY=VALUE ...]

It times the methods of the parts in a real run; the remaining time is bookkeeping (data, pairs, trackers, averages,
clipping, metrics). Exits with 1 if bookkeeping takes more than LIMIT.
"""

from __future__ import annotations

import argparse
import functools
import io
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from rich.console import Console
from rich.table import Table

import alignkit
from alignkit.config.toml import parse_assignment
from alignkit.models.diffusers_policy import DiffusersPolicy
from alignkit.registry import default_registry
from alignkit.rewards.checked import CheckedReward

LIMIT = 0.05
BOOKKEEPING = "bookkeeping"
MEANING = {
    "sampling": "the policy's trajectories, without gradient",
    "decoding": "latents to images for scoring",
    "encoding": "texts to features and captioned images to latents",
    "reward": "the true reward of the images",
    "surrogate": "the surrogate's scores and its own updates",
    "generator": "the policy's loss (including teacher and surrogate), its gradient and step",
    BOOKKEEPING: "everything else",
}


class Clock:
    """Time by category; nested timed calls do not count for the outer call."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.phase = "sampling"
        self._inner: list[float] = []

    def time(self, owner: Any, name: str, category: str | Callable[[], str]) -> None:
        """Replace the method by a timed version."""
        method = getattr(owner, name)

        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            label = category if isinstance(category, str) else category()
            self._inner.append(0.0)
            start = now()
            try:
                return method(*args, **kwargs)
            finally:
                total = now() - start
                self.seconds[label] += total - self._inner.pop()
                if self._inner:
                    self._inner[-1] += total

        setattr(owner, name, timed)

    def enter(self, owner: Any, name: str, phase: str) -> None:
        """Replace the method by a version that sets the phase for the calls from then on."""
        method = getattr(owner, name)

        @functools.wraps(method)
        def entering(*args: Any, **kwargs: Any) -> Any:
            self.phase = phase
            return method(*args, **kwargs)

        setattr(owner, name, entering)


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(overrides: dict[str, Any], updates: int, skipped: int = 1) -> tuple[dict[str, float], float]:
    """Return the seconds of `updates` updates by category and in total, after `skipped` updates that do not count."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "algorithm.name": "lasro",
            "output": f"{folder}/run",
            "evaluate.prompts": "",
            "train.checkpoint_every": 0,
            "train.updates": skipped + updates + 1,  # the last one writes a checkpoint and is not timed
            "surrogate.warmup": 0,
        }
        run = alignkit.load(None, {**settings, **overrides})
        clock, registry = Clock(), default_registry()
        algorithm = registry.get("algorithm", run.config.algorithm.name)
        assert run.config.surrogate is not None
        surrogate = registry.get("surrogate", run.config.surrogate.name)
        for name, phase in {"collect": "sampling", "surrogate_loss": "surrogate", "loss": "generator"}.items():
            clock.enter(algorithm, name, phase)
        clock.time(DiffusersPolicy, "denoise", lambda: clock.phase)
        clock.time(DiffusersPolicy, "decode", "decoding")
        clock.time(DiffusersPolicy, "encode", "encoding")
        clock.time(DiffusersPolicy, "encode_images", "encoding")
        clock.time(CheckedReward, "__call__", "reward")
        clock.time(surrogate, "score", lambda: "generator" if clock.phase == "generator" else "surrogate")
        clock.time(Accelerator, "backward", lambda: clock.phase)
        clock.time(torch.autograd, "grad", lambda: clock.phase)  # gradients at predicted latents, in the policy's loss
        clock.time(AcceleratedOptimizer, "step", lambda: clock.phase)
        training = run.train(Console(file=io.StringIO()))
        for _ in range(skipped):
            next(training)
        clock.seconds.clear()
        start = now()
        for _ in range(updates):
            next(training)
        total = now() - start
        del training  # end it before its folder is deleted
    return dict(clock.seconds), total


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
parser.add_argument("--updates", type=int, default=5)
parser.add_argument("--model", default="shapes_lcm")
parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
options = parser.parse_args()
taken, total = measure({"model.name": options.model, **dict(map(parse_assignment, options.set))}, options.updates)
taken[BOOKKEEPING] = total - sum(taken.values())
table = Table("part", "share", "seconds per update", "content")
for part, meaning in MEANING.items():
    spent = taken.get(part, 0.0)
    table.add_row(part, f"{spent / total:.1%}", f"{spent / options.updates:.4f}", meaning)
Console().print(table)
if taken[BOOKKEEPING] > LIMIT * total:
    sys.exit(f"bookkeeping takes more than {LIMIT:.0%}")
