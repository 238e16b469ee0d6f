"""D3PO: golden values, the preferred trajectory, its reference, and that it learns."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from alignkit.errors import AlignkitError
from alignkit.testing.losses import assert_one_pass_is_several
from alignkit.training.trainer import Trainer
from alignkit_preference.d3po import D3PO, preference_loss, winners_first
from alignkit_preference.trajectory_pairs import collect_pairs
from method_checks import assert_the_true_reward_rises, collect, updates

MakeTrainer = Callable[..., Trainer]


@pytest.mark.parametrize(
    ("beta", "log_ratio", "golden", "moves"),
    [
        (0.1, [0.0, 0.0], math.log(2), True),
        (0.1, [0.05, -0.02], 0.68965331, True),
        (0.1, [0.2, -0.2], 0.68316398, False),
        (50.0, [0.05, -0.02], 0.02975042, True),  # pairwise sample optimisation
        (50.0, [0.2, -0.2], 4.39017e-5, False),
    ],
)
def test_the_loss_is_golden_and_has_no_gradient_outside_the_clip_range(
    beta: float, log_ratio: list[float], golden: float, moves: bool
) -> None:
    ratios = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    loss = preference_loss(ratios, beta, 0.1)
    assert loss.item() == pytest.approx(golden, rel=1e-5)
    loss.sum().backward()
    assert ratios.grad is not None and bool((ratios.grad != 0).all()) == moves == bool((ratios.grad != 0).any())
    if moves:
        assert ratios.grad[0, 0] < 0 < ratios.grad[0, 1]  # the winner is made more likely


@pytest.mark.parametrize("settings", [{}, {"model.lora_rank": 0}, {"train.precision": "bf16"}])
def test_before_training_the_model_is_its_own_reference(make: MakeTrainer, settings: dict[str, Any]) -> None:
    trainer = make("d3po", {"train.rows_per_update": 8} | settings)
    (rows,) = updates(trainer)
    with trainer.accelerator.autocast():
        loss, metrics = trainer.algorithm.loss(rows, trainer.ctx)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6) and metrics["log_ratio_size"].item() == 0


@pytest.mark.parametrize("settings", [{}, {"model.lora_rank": 0}, {"model.lora_rank": 0, "train.precision": "bf16"}])
def test_the_reference_stays_what_it_was_when_the_model_moves(make: MakeTrainer, settings: dict[str, Any]) -> None:
    trainer = make("d3po", {"train.rows_per_update": 8} | settings)
    (rows,) = updates(trainer)
    with torch.no_grad():
        for parameter in trainer.ctx.policy.parameters():
            parameter.add_(0.02)
    with trainer.accelerator.autocast():
        _, metrics = trainer.algorithm.loss(rows, trainer.ctx)
    assert metrics["log_ratio_size"].item() > 1e-3


def test_the_better_trajectory_comes_first_at_every_stochastic_step(make: MakeTrainer) -> None:
    trainer = make("d3po", {"algorithm.pairs": 3})
    rows = collect(trainer)
    assert len(rows) == 6 * 2 and rows.x.shape[1:3] == (2, 1) and rows.k.flatten().tolist() == [0, 1] * 6
    assert bool((rows.rewards[:, 0] > rows.rewards[:, 1]).all())
    first = rows.select((rows.k[:, 0] == 0).nonzero()[:, 0])
    assert torch.equal(first.x[:, 0], first.x[:, 1])  # one initial noise
    assert not torch.equal(first.x_next[:, 0], first.x_next[:, 1])
    last, ctx = rows.select((rows.k[:, 0] == 1).nonzero()[:, 0]), trainer.ctx
    images = []
    for member in (0, 1):
        with torch.no_grad():
            k = torch.full((6,), 2)
            images.append(
                ctx.policy.decode(ctx.sampler.transition(ctx.policy, last.x_next[:, member, 0], k, last.prompt).clean)
            )
    better, worse = (p.mean((1, 2, 3)) for p in images)
    assert bool((better > worse - 1e-4).all()) and float((better - worse).mean()) > 2e-4  # of 8-bit images


def test_the_order_in_which_the_trajectories_of_a_pair_were_sampled_changes_nothing(make: MakeTrainer) -> None:
    trainer = make("d3po", {"algorithm.pairs": 3})
    with torch.no_grad():
        pairs, _ = collect_pairs(trainer.batch(), 3, True, trainer.ctx)
    swapped = pairs.swapped(torch.ones(len(pairs), dtype=torch.bool))
    assert not torch.equal(swapped.rewards, pairs.rewards)
    one, other = (winners_first(p, trainer.ctx) for p in (pairs, swapped))
    assert torch.equal(one.x_next, other.x_next) and torch.equal(one.rewards, other.rewards)
    assert (D3PO().beta, D3PO().clip_range, D3PO().shared_noise) == (0.1, 0.1, True)  # the published code's


def test_equal_rewards_and_images_that_could_not_be_scored_make_no_pair(make: MakeTrainer) -> None:
    assert len(collect(make("d3po", {"reward": ["two_of_three"]}))) == 2  # one pair of four, two steps
    trainer = make("d3po", {"reward": ["constant"]})
    assert len(collect(trainer)) == 0
    with pytest.raises(AlignkitError, match="d3po nothing to learn from: all images of a prompt got the same"):
        for _ in range(10):
            assert list(trainer.round()) == []


def test_the_sum_over_latent_dimensions_is_an_option(make: MakeTrainer) -> None:
    trainer = make("d3po", {"train.rows_per_update": 8})
    (rows,) = updates(trainer)
    with torch.no_grad():
        for parameter in trainer.ctx.policy.parameters():
            parameter.add_(0.005)
        margin = {r: D3PO(reduction=r).loss(rows, trainer.ctx)[1]["margin"].item() for r in ("mean", "sum")}
    assert margin["sum"] == pytest.approx(256 * margin["mean"], rel=1e-3) and margin["mean"] != 0


def test_one_pass_of_all_rows_has_the_gradient_of_several_passes(make: MakeTrainer) -> None:
    trainer = make("d3po", {"train.rows_per_update": 8})
    (rows,) = updates(trainer)
    assert_one_pass_is_several(trainer, rows)


@pytest.mark.parametrize("fields", [{"pairs": 0}, {"beta": 0.0}, {"clip_range": 1.0}, {"inner_epochs": 0}])
def test_settings_that_cannot_learn_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        D3PO(**fields)


def test_the_true_reward_rises_on_a_toy_reward(make: MakeTrainer) -> None:
    assert_the_true_reward_rises(make("d3po", {
        "algorithm.pairs": 4, "data.batch_size": 4, "sampler.num_steps": 4, "model.lora_rank": 8,
        "train.updates": 7, "train.rows_per_update": 48, "train.rows_per_pass": 48, "train.learning_rate": 2e-2,
    }))  # fmt: skip
