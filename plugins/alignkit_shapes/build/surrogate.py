"""Stage 5: the surrogate of `attribute_binding` after LaSRO's first stage, which later runs may start from."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console

import alignkit


def train(out: Path, run: Path, rounds: int = 150, seed: int = 5) -> None:
    """Score `rounds` rounds of samples of `shapes_lcm` and learn from them; the policy stays as it is."""
    overrides = {
        "algorithm.name": "lasro", "algorithm.replay": rounds, "surrogate.init": "", "surrogate.warmup": rounds,
        "surrogate.learning_rate": 5e-4, "algorithm.surrogate_steps": 8, "train.updates": 0, "evaluate.limit": 8,
        "seed": seed, "output": str(run),
    }  # fmt: skip
    job = alignkit.load(resume=run) if run.exists() else alignkit.load(None, overrides)
    for _ in job.train(Console(width=140)):
        pass
    shutil.copyfile(run / "surrogate.safetensors", out)
