"""REBEL: golden values, its symmetries, and that it learns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.testing import check_algorithm
from alignkit.testing.algorithm import assert_goes_on_from_its_checkpoint
from alignkit.testing.losses import assert_one_pass_is_several
from alignkit.training.trainer import Trainer
from alignkit_preference.rebel import REBEL, squares
from alignkit_preference.trajectory_pairs import log_prob
from method_checks import assert_the_true_reward_rises, gradient, updates

MakeTrainer = Callable[..., Trainer]


def test_the_loss_is_golden_for_each_pair() -> None:
    ratios = torch.tensor([[[0.01, -0.02], [0.0, 0.01]], [[0.03, 0.0], [-0.01, 0.02]]])  # pair, trajectory, step
    advantages = torch.tensor([[0.5, 0.0], [0.0, 0.2]])
    assert squares(ratios.sum(2), advantages, 1.0).tolist() == pytest.approx([0.2704, 0.0484])
    assert float(squares(ratios.sum(2), advantages, 1.0).mean()) == pytest.approx(0.1594)
    assert squares(ratios.sum(2).flip(1), advantages.flip(1), 1.0).tolist() == pytest.approx([0.2704, 0.0484])
    assert squares(ratios.sum(2), advantages, 2.0).tolist() == pytest.approx([0.2916, 0.0576])  # it multiplies


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("ddim", [False, True])
def test_before_the_first_update_the_loss_is_the_mean_square_of_the_differences(
    make: MakeTrainer, ddim: bool, precision: str
) -> None:
    trainer = make("rebel", {"train.rows_per_update": 2, "train.precision": precision}, ddim)
    for rows in updates(trainer):
        with trainer.accelerator.autocast():
            loss, metrics = trainer.algorithm.loss(rows, trainer.ctx)
        assert metrics["log_ratio_size"].item() == 0
        assert loss.item() == pytest.approx(float((rows.advantages[:, 0] - rows.advantages[:, 1]).square().mean()))


def test_the_loss_of_several_pairs_is_the_mean_of_their_own_and_so_is_its_gradient(make: MakeTrainer) -> None:
    trainer = make("rebel", {"train.rows_per_update": 4})
    (rows,) = updates(trainer)
    assert len(rows) == 4 and rows.old_log_prob is not None
    moved = torch.linspace(-0.3, 0.4, 8).view(4, 2)
    rows = replace(rows, old_log_prob=rows.old_log_prob + moved)  # as if the policy had been another
    loss = assert_one_pass_is_several(trainer, rows, rel=1e-3)
    assert loss == pytest.approx(float(squares(-moved, rows.advantages, 1.0).mean()), rel=1e-3)


def test_the_sum_over_latent_dimensions_is_an_option(make: MakeTrainer) -> None:
    found = {}
    for reduction in ("mean", "sum"):
        (rows,) = updates(make("rebel", {"train.rows_per_update": 4, "algorithm.reduction": reduction}))
        found[reduction] = rows.old_log_prob
    assert torch.allclose(found["sum"], 256 * found["mean"], rtol=1e-4)


def test_the_graph_of_one_step_is_held_at_a_time(make: MakeTrainer) -> None:
    """The network sees the steps one after the other, and each once more for the gradient, which stays the same."""
    trainer = make("rebel", {"train.rows_per_update": 4})
    (rows,) = updates(trainer)
    seen: list[int] = []
    hook = trainer.ctx.policy.unet.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))  # type: ignore[attr-defined]
    loss, _ = trainer.algorithm.loss(rows, trainer.ctx)
    found = gradient(trainer, loss)
    hook.remove()
    assert seen == [2 * 4] * 2 * 2  # of three steps two are stochastic
    assert rows.old_log_prob is not None
    added = log_prob(rows.pairs, trainer.ctx).sum(2) - rows.old_log_prob
    expected = gradient(trainer, squares(added, rows.advantages, 1.0).mean())
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_advantages_are_not_clamped(make: MakeTrainer) -> None:
    trainer = make("rebel", {"train.rows_per_update": 4})
    (rows,) = updates(trainer)
    far = torch.tensor([[9.0, -9.0]]).expand(4, 2)
    loss, _ = trainer.algorithm.loss(replace(rows, advantages=far), trainer.ctx)
    assert loss.item() == pytest.approx(18.0**2)


def test_a_pair_with_an_image_that_could_not_be_scored_is_left_out(make: MakeTrainer) -> None:
    trainer = make("rebel", {"reward": ["two_of_three"], "algorithm.baseline": "batch"})
    rows = updates(trainer)
    assert sum(len(r) for r in rows) == 1  # images 0, 3 and 6 of eight
    (advantages,) = (r.advantages for r in rows)
    assert bool(advantages.isfinite().all())


def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(make: MakeTrainer, tmp_path: Path) -> None:
    settings = {"algorithm.min_count": 5, "algorithm.buffer_size": 6}
    (metrics, *_) = assert_goes_on_from_its_checkpoint(partial(make, "rebel"), settings, tmp_path)
    assert metrics["own_statistics"] > 0


@pytest.mark.parametrize(
    "fields", [{"pairs": 0}, {"scale": 0.0}, {"inner_epochs": 0}, {"buffer_size": 4, "min_count": 5}, {"min_count": 0}]
)
def test_settings_that_cannot_learn_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        REBEL(**fields)


def test_the_true_reward_rises_on_a_toy_reward(make: MakeTrainer) -> None:
    assert_the_true_reward_rises(make("rebel", {
        "algorithm.pairs": 4, "data.batch_size": 4, "sampler.num_steps": 4, "model.lora_rank": 8,
        "train.updates": 8, "train.rows_per_update": 16, "train.rows_per_pass": 16, "train.learning_rate": 4e-2,
    }))  # fmt: skip


def test_with_advantages_within_groups_it_keeps_the_promises_of_an_algorithm() -> None:
    check_algorithm(REBEL(baseline="group"))
