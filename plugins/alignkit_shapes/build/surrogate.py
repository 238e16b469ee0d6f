"""Stage 5: the surrogate of `attribute_binding` after LaSRO's first stage, which later runs may start from."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from safetensors.torch import load_file, save_file

import alignkit


def train(out: Path, run: Path, rounds: int = 120, seed: int = 5) -> None:
    """Score `rounds` rounds of samples of `shapes_lcm` and learn from them; the policy stays as it is."""
    overrides = {
        "algorithm.name": "lasro", "algorithm.replay": rounds, "surrogate.init": "", "surrogate.warmup": rounds,
        "surrogate.learning_rate": 4e-4, "algorithm.surrogate_steps": 5, "algorithm.samples": 8, "data.batch_size": 12,
        "algorithm.reference_samples": 0,
        "train.updates": 0, "evaluate.limit": 8, "evaluate.steps": [2], "model.lora_rank": 4,
        "seed": seed, "output": str(run),
    }  # fmt: skip
    job = alignkit.load(resume=run) if run.exists() else alignkit.load(None, overrides)
    for _ in job.train(Console(width=140)):
        pass
    save_file({name: tensor.half() for name, tensor in load_file(run / "surrogate.safetensors").items()}, out)
