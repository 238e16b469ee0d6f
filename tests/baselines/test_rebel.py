"""REBEL: golden values, its symmetries, and that it learns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from alignkit.train import Trainer
from alignkit_baselines.rebel import REBEL, Compared, squares

MakeTrainer = Callable[..., Trainer]


def parts(trainer: Trainer) -> list[Compared]:
    with torch.no_grad():
        collected = trainer.algorithm.collect(trainer.batch(), trainer.ctx)
    return list(trainer.algorithm.updates(collected, trainer.ctx))


def test_the_loss_is_golden_for_each_pair() -> None:
    ratios = torch.tensor([[[0.01, -0.02], [0.0, 0.01]], [[0.03, 0.0], [-0.01, 0.02]]])  # pair, walk, step
    advantages = torch.tensor([[0.5, 0.0], [0.0, 0.2]])
    assert squares(ratios.sum(2), advantages, 1.0).tolist() == pytest.approx([0.2704, 0.0484])
    assert float(squares(ratios.sum(2), advantages, 1.0).mean()) == pytest.approx(0.1594)
    assert squares(ratios.sum(2).flip(1), advantages.flip(1), 1.0).tolist() == pytest.approx([0.2704, 0.0484])


@pytest.mark.parametrize("ddim", [False, True])
def test_before_the_first_update_the_loss_is_the_mean_square_of_the_differences(make: MakeTrainer, ddim: bool) -> None:
    trainer = make("rebel", {"train.rows_per_update": 2}, ddim)
    for rows in parts(trainer):
        loss, metrics = trainer.algorithm.loss(rows, trainer.ctx)
        assert metrics["log_ratio_size"].item() == 0
        assert loss.item() == pytest.approx(float((rows.advantages[:, 0] - rows.advantages[:, 1]).square().mean()))


def test_the_loss_of_several_pairs_is_the_mean_of_their_own_and_so_is_its_gradient(make: MakeTrainer) -> None:
    trainer = make("rebel", {"train.rows_per_update": 4})
    (rows,) = parts(trainer)
    assert len(rows) == 4 and rows.old_log_prob is not None
    moved = torch.linspace(-0.3, 0.4, 8).view(4, 2)
    rows = replace(rows, old_log_prob=rows.old_log_prob + moved)  # as if the policy had been another
    found = []
    for size in (4, 3, 1):
        trainer.config = replace(trainer.config, train=replace(trainer.config.train, rows_per_pass=size))
        means = trainer._backward(rows, lambda part: trainer.algorithm.loss(part, trainer.ctx))
        found.append((means["loss"], [p.grad.clone() for p in trainer.ctx.policy.parameters() if p.grad is not None]))
        trainer.optimizer.zero_grad()
    assert found[0][0] == pytest.approx(float(squares(-moved, rows.advantages, 1.0).mean()), rel=1e-3)
    for loss, grads in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-3)
        largest = max(float(g.abs().max()) for g in found[0][1])
        assert all(torch.allclose(a, b, atol=2e-3 * largest) for a, b in zip(grads, found[0][1], strict=True))


def test_a_pair_with_a_picture_that_could_not_be_scored_is_left_out(make: MakeTrainer) -> None:
    trainer = make("rebel", {"reward": ["two_of_three"], "algorithm.baseline": "batch"})
    rows = parts(trainer)
    assert sum(len(r) for r in rows) == 1  # pictures 0, 3 and 6 of eight
    (advantages,) = (r.advantages for r in rows)
    assert bool(advantages.isfinite().all())


def test_a_run_goes_on_from_its_state_as_if_it_had_not_stopped(make: MakeTrainer) -> None:
    settings = {"algorithm.min_count": 5, "algorithm.buffer_size": 6, "train.updates": 9}
    first = make("rebel", settings)
    for _ in range(2):
        list(first.round())
    saved = copy.deepcopy((first.state_dict(), first.rank_state()))
    expected = [dict(update.metrics) for update in first.round()]
    assert expected[0]["own_statistics"] > 0
    second = make("rebel", settings)
    second.load_state_dict(saved[0])
    second.load_rank_state(saved[1])
    assert [dict(update.metrics) for update in second.round()] == expected


@pytest.mark.parametrize(
    "fields", [{"pairs": 0}, {"scale": 0.0}, {"inner_epochs": 0}, {"buffer_size": 4, "min_count": 5}, {"min_count": 0}]
)
def test_settings_that_cannot_learn_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        REBEL(**fields)


def test_the_true_reward_rises_on_a_toy_reward(make: MakeTrainer) -> None:
    """The reward is how far the first three channels of the latent lie above zero; it never gives a gradient."""
    trainer = make("rebel", {
        "algorithm.pairs": 4, "data.batch_size": 4, "sampler.num_steps": 4, "model.lora_rank": 8,
        "train.updates": 14, "train.rows_per_update": 16, "train.rows_per_pass": 16, "train.learning_rate": 1e-2,
    })  # fmt: skip
    trainer.ctx.policy.decode = lambda latents: (latents[:, :3] / 20).sigmoid()  # type: ignore[method-assign]
    updates = []
    while not trainer.finished:
        updates += list(trainer.round())
    rewards = [update.reward for update in updates]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:3]) / 3 + 0.02
