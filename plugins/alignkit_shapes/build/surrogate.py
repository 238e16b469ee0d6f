"""Stage 6: the surrogate of `attribute_binding`, from which later runs can start.

LaSRO's first stage trains it; then it is trained further on the samples of policies that exploit its errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import load_file, save_file

import alignkit
from alignkit_shapes.build import prompts


def train(out: Path, run: Path, rounds: int = 250, updates: int = 400, seed: int = 5) -> None:
    """Train on `rounds` rounds of samples of `shapes_lcm`, then together with policies that are discarded.

    The rounds use many prompts of their own, samples with nearly the same layout, and soft answers of the VQA model,
    which distinguish almost any two samples. But ranking samples well is not enough for a gradient that improves them.

    So each policy starts from `shapes_lcm` and follows the surrogate until it exploits an error of the surrogate; the
    samples of both models from the same noises correct the surrogate. The next policy can be trained for longer.
    """
    first, second = (run.with_name(f"{run.name}-{leg}") for leg in (1, 2))
    texts = run.with_name(f"{run.name}-prompts")
    prompts.write(texts, train=4000, held_out=1, test=0, seed=70)
    _run(first, seed, {
        "data.prompts": str(texts / "train.txt"), "reward.attribute_binding.mode": "soft",
        "surrogate.warmup": rounds, "train.updates": 1, "algorithm.replay": rounds, "surrogate.init": "",
        "algorithm.samples": 8, "algorithm.reference_samples": 0, "algorithm.negatives": 3,
        "algorithm.noise_correlation": 0.8, "algorithm.surrogate_steps": 12, "surrogate.learning_rate": 2e-4,
    })  # fmt: skip
    _run(second, seed + 1, {
        "surrogate.init": str(first / "surrogate.safetensors"), "train.updates": updates, "algorithm.replay": updates,
        "algorithm.restart_every": 30, "algorithm.surrogate_steps": 2, "algorithm.pairs_per_update": 96,
        "algorithm.policy_steps": 1, "regulariser": [], "train.learning_rate": 2e-4,
    })  # fmt: skip
    trained = load_file(second / "surrogate.safetensors")
    save_file({name: tensor.half() for name, tensor in trained.items()}, out)


def _run(folder: Path, seed: int, overrides: dict[str, Any]) -> None:
    """Run `lasro` for its surrogate; the policy is discarded. An interrupted run is resumed."""
    evaluation = {"evaluate.limit": 8, "evaluate.every": 0, "evaluate.points": 0, "evaluate.steps": [2]}
    settings = {"algorithm.name": "lasro", "seed": seed, "output": str(folder), **evaluation, **overrides}
    job = alignkit.load(resume=folder) if folder.exists() else alignkit.load(None, settings)
    for _ in job.train(Console(width=140)):
        pass
