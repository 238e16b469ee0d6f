"""Pairwise sample optimisation: golden values, both modes, what is refused, and that it learns."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.rollout import sample, seeded_noises
from alignkit.runs.run import Run
from alignkit.testing.losses import assert_one_pass_is_several
from alignkit.training.trainer import Trainer
from alignkit_preference.d3po import D3PO, preference_loss
from alignkit_preference.diffusion_dpo import preference_loss as dpo_loss
from alignkit_preference.noised import LatentPairs, NoisedPairs, errors
from alignkit_preference.pso import PSO, hinge, sigmoid_loss
from alignkit_preference.trajectory_pairs import Pairs
from method_checks import (
    assert_a_stopped_run_ends_with_the_same_bits,
    collect,
    updates,
    whole_updates,
)

MakeTrainer = Callable[..., Trainer]
OFFLINE = {"algorithm.mode": "offline"}


def distilled(weight: float) -> dict[str, Any]:
    return {"regulariser": [{"name": "lcd", "weight": weight}]}


def test_the_online_loss_is_golden_and_flat_beyond_the_clamp() -> None:
    ratios = torch.tensor([[0.0, 0.0], [0.05, -0.02], [0.2, -0.2]], dtype=torch.float64, requires_grad=True)
    found = preference_loss(ratios, 50.0, PSO().clip_range)
    assert found.tolist() == pytest.approx([math.log(2), 0.02975042, 4.39017e-5], rel=1e-5)
    assert 50 * (math.log(1.1) - math.log(0.9)) == pytest.approx(10.0335348)
    found.sum().backward()
    assert ratios.grad is not None and not ratios.grad[2].any()
    assert ratios.grad[1, 0] < 0 < ratios.grad[1, 1] and ratios.grad[0].tolist() == [-25.0, 25.0]


def test_the_offline_losses_are_golden() -> None:
    now, before = torch.tensor([[0.30, 0.50], [0.4, 0.1]]), torch.tensor([[0.35, 0.45], [0.4, 0.1]])
    # margins of .05 + .05 and 0
    assert sigmoid_loss(now, before, 5.0).tolist() == pytest.approx([math.log1p(math.exp(-0.5)), math.log(2)])
    assert torch.allclose(sigmoid_loss(now, before, 5.0), dpo_loss(now, before, 10.0))  # which has a half
    assert hinge(now, 5.5).tolist() == pytest.approx([0.0, 1 + 5.5 * 0.3])
    assert hinge(now, 4.0).tolist() == pytest.approx([0.2, 1 + 4 * 0.3])


def test_online_it_is_d3po_with_a_beta_of_50_and_two_noises(make: MakeTrainer) -> None:
    assert PSO()._beta == 50.0 and not PSO().shared_noise
    trainer = make("pso", {"sampler.num_steps": 3})
    (rows,) = updates(trainer)
    assert isinstance(rows, Pairs)
    first = rows.select((rows.k[:, 0] == 0).nonzero()[:, 0])
    assert not torch.equal(first.x[:, 0], first.x[:, 1])
    assert bool((rows.rewards[:, 0] > rows.rewards[:, 1]).all())
    assert sorted(rows.k.flatten().tolist()) == [0, 0, 1, 1]  # two prompts, two steps with a likelihood
    with torch.no_grad():
        for parameter in trainer.ctx.policy.parameters():
            parameter.add_(0.005)
        found, metrics = trainer.algorithm.loss(rows, trainer.ctx)
        expected, _ = D3PO(beta=50.0).loss(rows, trainer.ctx)
    assert found.item() == pytest.approx(expected.item()) and metrics["log_ratio_size"].item() > 0


@pytest.mark.parametrize("settings", [{}, OFFLINE, {"model.lora_rank": 0}, OFFLINE | {"train.precision": "bf16"}])
def test_before_training_the_preference_is_ln_2(make: MakeTrainer, settings: dict[str, Any]) -> None:
    trainer = make("pso", settings | {"algorithm.prior_weight": 0.0})
    (rows,) = updates(trainer)
    with trainer.accelerator.autocast():
        loss, metrics = trainer.algorithm.loss(rows, trainer.ctx)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-4)
    assert metrics["margin"].item() == pytest.approx(0, abs=1e-6)
    loss.backward()
    unet = trainer.ctx.policy.unet  # type: ignore[attr-defined]
    with_gradient = {name for name, p in unet.named_parameters() if p.grad is not None}
    assert with_gradient and with_gradient <= set(trainer.ctx.policy.weights())
    pipe = trainer.ctx.policy.pipe  # type: ignore[attr-defined]
    assert all(p.grad is None for part in (pipe.vae, pipe.text_encoder) for p in part.parameters())


def test_offline_it_learns_at_the_times_of_the_run_and_keeps_the_losers_error(make: MakeTrainer) -> None:
    trainer = make("pso", OFFLINE | {"sampler.num_steps": 2, "algorithm.inner_epochs": 3})
    collected = collect(trainer)
    assert isinstance(collected, LatentPairs)
    parts = updates(trainer, collected)
    given = [rows for rows in parts if isinstance(rows, NoisedPairs)]
    assert len(parts) == 3 == len(given)
    assert {t for rows in given for t in rows.t.tolist()} == {999, 499}
    assert not torch.equal(given[0].noise, given[1].noise)
    loss, metrics = trainer.algorithm.loss(parts[0], trainer.ctx)
    assert loss.item() == pytest.approx(math.log(2) + 0.5 * metrics["loser_error"].item(), rel=1e-5)
    trainer.algorithm = PSO(mode="offline", objective="hinge", prior_weight=0.0)
    loss, _ = trainer.algorithm.loss(parts[0], trainer.ctx)
    with torch.no_grad():
        expected = hinge(errors(given[0], trainer.ctx.policy), 5.0).mean()
    assert loss.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("settings", [{"data.batch_size": 4}, OFFLINE])
def test_one_pass_of_all_rows_has_the_gradient_of_several_passes(make: MakeTrainer, settings: dict[str, Any]) -> None:
    trainer = make("pso", settings | distilled(0.5) | {"sampler.num_steps": 3})
    (rows,) = whole_updates(trainer)
    (noised,) = rows.others
    assert noised is not None and len(rows) == len(noised) == 8
    assert_one_pass_is_several(trainer, rows)


def test_distillation_is_added_to_the_preference_with_its_weight(make: MakeTrainer) -> None:
    assert not PSO.default_regularisers and make("pso").ctx.teacher is None
    trainer = make("pso", distilled(0.5) | {"train.rows_per_update": 2})
    (rows,) = whole_updates(trainer)
    loss, metrics = trainer.loss(rows)
    assert loss.item() == pytest.approx(math.log(2) + 0.5 * metrics["distillation_loss"].item(), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler.num_steps": 1}, "every step of lcm is deterministic with .* and algorithm pso learns from the lik"),
        ({"sampler.name": "ddim", "sampler.eta": 0.0}, "every step of ddim is deterministic"),
        (OFFLINE, r"data\.pairs: missing; algorithm pso needs preference pairs"),
        (
            {"sampler.name": "ddim", "sampler.eta": 1.0, **distilled(1.0)},
            r"sampler\.name: found DDIM, expected lcm: only a latent consistency model",
        ),
        ({**distilled(1.0), "model.teacher": ""}, r"model\.teacher: missing"),
        ({**distilled(1.0), "data.images": ""}, r"data\.images: missing"),
    ],
)
def test_what_cannot_be_combined_is_refused_with_the_reason(
    tiny_run: Callable[..., Run], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_run(overrides={"algorithm.name": "pso"} | changes).check()


def test_offline_one_deterministic_step_is_enough(tiny_run: Callable[..., Run], pair_folder: Any) -> None:
    tiny_run(overrides={
        "algorithm.name": "pso", "sampler.num_steps": 1, "data.pairs": str(pair_folder), "data.prompts": "",
        "evaluate.steps": [1], **OFFLINE,
    }).check()  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [{"pairs": 0}, {"beta": 0.0}, {"clip_range": 1.0}, {"inner_epochs": 0}, {"prior_weight": -1.0}],
)
def test_settings_that_cannot_learn_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        PSO(**fields)


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_stopped_run_that_is_resumed_ends_with_the_same_bits(
    tiny_run: Callable[..., Run], pair_folder: Any, mode: str
) -> None:
    settings = {
        "algorithm.name": "pso", "algorithm.mode": mode, "data.pairs": str(pair_folder), "train.updates": 3,
        "evaluate.prompts": "", **distilled(0.1),
    }  # fmt: skip
    assert_a_stopped_run_ends_with_the_same_bits(tiny_run, settings)


def test_online_the_true_reward_rises_on_a_toy_reward(make: MakeTrainer) -> None:
    """The reward is how far the first three channels of the latent lie above zero; it never gives a gradient."""
    trainer = make("pso", {
        "algorithm.pairs": 8, "algorithm.shared_noise": True, "data.batch_size": 4, "sampler.num_steps": 4,
        "model.lora_rank": 8, "train.updates": 6, "train.rows_per_update": 96, "train.rows_per_pass": 96,
        "train.learning_rate": 1e-2,
    })  # fmt: skip
    policy = trainer.ctx.policy
    policy.decode = lambda latents: (latents[:, :3] / 20).sigmoid()  # type: ignore[method-assign]
    noises = seeded_noises(policy.latent_shape, 4, [(0, i) for i in range(32)])

    def value() -> float:
        latents = sample(policy, trainer.ctx.sampler, policy.encode(["a red circle"] * 32), noises)
        return float(policy.decode(latents).mean())

    before = value()
    while not trainer.finished:
        list(trainer.round())
    assert value() > before + 0.01


@pytest.mark.parametrize("objective", ["sigmoid", "hinge"])
def test_offline_the_preferred_side_becomes_more_likely_than_the_other(
    make: MakeTrainer, seen: Any, objective: str
) -> None:
    trainer = make("pso", OFFLINE | {
        "algorithm.objective": objective, "model.lora_rank": 8, "train.updates": 10, "train.learning_rate": 3e-2,
    })  # fmt: skip
    trainer.ctx.policy.encode_images = seen  # type: ignore[method-assign]
    fresh = updates(trainer)[0]  # noise that no update sees
    while not trainer.finished:
        list(trainer.round())
    with torch.no_grad():
        _, metrics = trainer.algorithm.loss(fresh, trainer.ctx)
    assert metrics["margin"].item() > 0.05 and metrics["implicit_accuracy"].item() >= 0.75
    assert metrics["winner_error_change"].item() < 0
