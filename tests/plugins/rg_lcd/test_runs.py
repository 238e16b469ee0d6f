"""Runs of RG-LCD: pre-training, resuming, and that either form works on a toy."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.rollout import sample
from alignkit.runs.display import Display
from alignkit.runs.loop import Loop
from alignkit.runs.run import Run
from alignkit.testing.algorithm import assert_goes_on_from_its_checkpoint
from alignkit.training import checkpoint
from alignkit.training.trainer import Trainer
from method_checks import toy_images

MakeTrainer = Callable[..., Trainer]
MakeRun = Callable[..., Run]

DIRECT: dict[str, Any] = {"algorithm.name": "rg_lcd"}
PROXY: dict[str, Any] = {
    **DIRECT, "algorithm.proxy": True, "surrogate.patch": 2, "surrogate.width": 16, "surrogate.layers": 3,
    "surrogate.heads": 2, "algorithm.proxy_rows": 3,
}  # fmt: skip


def test_a_later_run_starts_from_a_proxy_that_was_pre_trained(tiny_run: MakeRun) -> None:
    first = tiny_run("lrm", {**PROXY, "surrogate.warmup": 2, "train.updates": 0, "evaluate.prompts": ""})
    assert list(first.train()) == []
    second = tiny_run("run", {**PROXY, "surrogate.init": str(first.folder)})
    trainer = Loop(second, second.folder, second.accelerator(), Display(None, 1)).trainer
    saved = checkpoint.latest(first.folder / "checkpoints")
    assert saved is not None and trainer.ctx.surrogate is not None
    kept = checkpoint.load(saved)["trainer"]["surrogate"]
    assert all(torch.equal(p, kept[name]) for name, p in trainer.ctx.surrogate.module().state_dict().items())


@pytest.mark.parametrize("settings", [DIRECT, {**PROXY, "surrogate.warmup": 1}])
def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(
    make_trainer: MakeTrainer, tmp_path: Path, settings: dict[str, Any]
) -> None:
    (metrics,) = assert_goes_on_from_its_checkpoint(make_trainer, {**settings, "train.learning_rate": 1e-2}, tmp_path)
    assert math.isfinite(metrics["reward"]) and metrics["grad_norm"] > 0


TOY = {
    "model.lora_rank": 8, "train.rows_per_update": 8, "train.rows_per_pass": 8, "train.learning_rate": 1e-2,
    "evaluate.prompts": "", "algorithm.beta": 500.0,
}  # fmt: skip


def rise(trainer: Trainer) -> float:
    """Return by how much a run raises its reward on samples from the same noise; images are read off the latents."""
    ctx = trainer.ctx
    toy_images(trainer)
    noises = torch.randn(8, 3, *ctx.policy.latent_shape, generator=torch.Generator().manual_seed(7))
    prompt = ctx.policy.encode(["a red circle", "a blue square"] * 4)

    def reward() -> float:
        return ctx.policy.decode(sample(ctx.policy, ctx.sampler, prompt, noises)).mean().item()

    before = reward()
    while not trainer.finished:
        list(trainer.round())
    return reward() - before


def test_the_reward_rises_along_its_gradient(make_trainer: MakeTrainer) -> None:
    assert rise(make_trainer({**DIRECT, **TOY, "train.updates": 10})) > 0.004


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_reward_rises_along_the_gradient_of_its_proxy(make_trainer: MakeTrainer, sign: float) -> None:
    settings = {
        "algorithm.proxy_rows": 8, "surrogate.learning_rate": 3e-3, "surrogate.latent_groups": 9,
        "surrogate.weight_decay": 0.0, "train.updates": 20, "reward.brightness.weight": sign,
    }  # fmt: skip
    assert sign * rise(make_trainer({**PROXY, **TOY, **settings})) > 0.004
