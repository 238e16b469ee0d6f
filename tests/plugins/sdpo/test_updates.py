"""SDPO: golden values of its loss, and the rows of its updates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from alignkit.testing.losses import assert_one_pass_is_several
from alignkit.training.trainer import Trainer
from alignkit_sdpo.algorithm import SDPO, PairedSteps, pair_loss
from method_checks import collect, gradient, number, updates

MakeTrainer = Callable[..., Trainer]


def method(trainer: Trainer) -> SDPO:
    assert isinstance(trainer.algorithm, SDPO)
    return trainer.algorithm


def steps_of(rows: PairedSteps) -> list[tuple[int, int]]:
    return list(zip(rows.pair.tolist(), rows.k.tolist(), strict=True))


# the loss


def test_the_loss_and_its_gradient_are_golden() -> None:
    log_ratio = torch.tensor([[0, 0], [3e-4, -2e-4], [-3e-4, 2e-4]], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([[1.0, -0.5]] * 3, dtype=torch.float64)
    weight = torch.full((3,), 0.99**3, dtype=torch.float64)
    loss = pair_loss(log_ratio, advantage, weight, 1e-4)
    assert loss.tolist() == pytest.approx([2.25, 2.24941786, 2.25145568], abs=1e-8)
    loss.sum().backward()
    assert log_ratio.grad is not None
    # 2 w (w d - dA): whole where nothing is clipped or the ratios went the wrong way, none where they went far enough.
    slope = [2 * 0.99**3 * (0.99**3 * d - 1.5) for d in (0, -5e-4)]
    expected = [[slope[0], -slope[0]], [0, 0], [slope[1], -slope[1]]]
    assert torch.allclose(log_ratio.grad, torch.tensor(expected, dtype=torch.float64), atol=1e-9)


def test_without_a_clip_range_only_the_free_difference_counts() -> None:
    log_ratio, advantage = torch.tensor([[0.3, -0.2], [-4.0, 2.0]]), torch.tensor([[1.0, -0.5], [0.0, 0.0]])
    found = pair_loss(log_ratio, advantage, torch.tensor([1.0, 0.5]), 0)
    assert found.tolist() == pytest.approx([1.0, 9.0])


def test_swapping_the_trajectories_of_a_pair_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    log_ratio, advantage = 2e-4 * torch.randn(50, 2, generator=generator), torch.randn(50, 2, generator=generator)
    weight = torch.rand(50, generator=generator)
    one, other = (
        pair_loss(r, a, weight, 1e-4) for r, a in ((log_ratio, advantage), (log_ratio.flip(1), advantage.flip(1)))
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("ddim", [False, True])
def test_before_the_first_update_every_log_ratio_is_zero_and_the_loss_the_mean_squared_difference(
    make: MakeTrainer, ddim: bool, precision: str
) -> None:
    settings = {"train.rows_per_update": 2, "algorithm.advantage_clip": 1.0, "train.precision": precision}
    trainer = make(settings, ddim)
    found = updates(trainer)
    assert len(found) == (6 if ddim else 4)
    for rows in found:
        with trainer.accelerator.autocast():
            loss, metrics = trainer.algorithm.loss(rows, trainer.ctx)
        assert number(metrics["log_ratio_size"]) == 0 == number(metrics["clip_fraction"])
        advantage = rows.advantage.clamp(-1, 1)
        assert number(loss) == pytest.approx(float(((advantage[:, 0] - advantage[:, 1]) ** 2).mean()), abs=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_at_the_first_update_the_gradient_is_that_of_the_weighted_difference_of_log_likelihoods(
    make: MakeTrainer, reduction: str
) -> None:
    trainer = make({"algorithm.reduction": reduction, "algorithm.decay": 0.5, "algorithm.log_ratio_scale": 2.0})
    for rows in updates(trainer):
        found = gradient(trainer, trainer.algorithm.loss(rows, trainer.ctx)[0])
        log_prob = method(trainer).log_prob(rows, trainer.ctx)
        wanted = rows.advantage[:, 0] - rows.advantage[:, 1]
        weight = torch.tensor([0.5, 0.25])[rows.k]
        expected = gradient(trainer, (-2 * wanted * weight * (log_prob[:, 0] - log_prob[:, 1])).mean())
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        assert float(found.abs().max()) > 0


def test_one_pass_of_all_rows_has_the_gradient_of_several_passes_and_the_mean_of_their_losses(
    make: MakeTrainer,
) -> None:
    trainer = make({"algorithm.order": "accumulated"})
    (rows,) = updates(trainer)
    assert len(rows) == 8
    assert_one_pass_is_several(trainer, rows)


# the updates


def test_an_update_holds_one_random_step_of_each_pair_and_a_round_holds_all_once(make: MakeTrainer) -> None:
    trainer = make({"sampler.num_steps": 4, "train.rows_per_update": 8, "algorithm.pairs": 4}, ddim=True)
    collected = collect(trainer)
    found = updates(trainer, collected)
    assert [len(rows) for rows in found] == [8] * 4
    assert all(sorted(rows.pair.tolist()) == list(range(8)) for rows in found)
    assert any(len(set(rows.k.tolist())) > 1 for rows in found)
    assert sorted(row for rows in found for row in steps_of(rows)) == [(p, k) for p in range(8) for k in range(4)]
    # All that belongs to a step travels with it.
    for rows in found:
        for row, (pair, k) in enumerate(steps_of(rows)):
            there = collected.select(((collected.pair == pair) & (collected.k == k)).nonzero()[:, 0])
            assert torch.equal(rows.x_next[row], there.x_next[0])
            assert torch.equal(rows.advantage[row], there.advantage[0])
            assert torch.equal(rows.prompt.features[row], there.prompt.features[0])
            with torch.no_grad():
                log_prob = method(trainer).log_prob(there, trainer.ctx)[0]
            assert rows.old_log_prob is not None and torch.allclose(rows.old_log_prob[row], log_prob, atol=1e-4)


def test_the_pairs_of_a_slot_are_dealt_out_evenly_and_no_update_reaches_into_the_next(make: MakeTrainer) -> None:
    trainer = make(ddim=True)
    collected = collect(trainer)
    for size, sizes in {100: [4] * 3, 4: [4] * 3, 3: [4] * 3, 2: [2] * 6, 1: [1] * 12}.items():
        trainer.ctx.rows_per_update = size
        assert [len(rows) for rows in updates(trainer, collected)] == sizes


def test_in_order_an_update_holds_one_step_of_all_pairs_and_accumulated_all_steps_of_its_pairs(
    make: MakeTrainer,
) -> None:
    trainer = make({"algorithm.order": "in_order", "train.rows_per_update": 2}, ddim=True)
    collected = collect(trainer)
    assert [rows.k.tolist() for rows in updates(trainer, collected)] == [[k] * 2 for k in (0, 0, 1, 1, 2, 2)]
    method(trainer).order = "accumulated"
    found = [sorted(steps_of(rows)) for rows in updates(trainer, collected)]
    assert [len(rows) for rows in found] == [6, 6]
    assert sorted(found[0] + found[1]) == [(p, k) for p in range(4) for k in range(3)]
    assert all(len({p for p, _ in rows}) == 2 for rows in found)


def test_a_share_of_the_steps_is_chosen_anew_for_each_pair(make: MakeTrainer) -> None:
    settings = {"algorithm.step_fraction": 0.5, "algorithm.pairs": 4, "sampler.num_steps": 5}
    trainer = make(settings)
    steps = collect(trainer)
    chosen = [tuple(pair) for pair in steps.k.view(8, 2).tolist()]
    assert all(a < b for a, b in chosen) and len(set(chosen)) > 1
    found = [row for rows in updates(trainer, steps) for row in steps_of(rows)]
    assert sorted(found) == sorted(steps_of(steps)) and len(set(found)) == 16
    assert len(collect(make(settings | {"algorithm.step_fraction": 0.01}))) == 8


def test_inner_epochs_go_over_the_same_steps_in_another_order_with_the_same_old_likelihoods(make: MakeTrainer) -> None:
    trainer = make({"algorithm.inner_epochs": 2, "algorithm.pairs": 4})
    found = updates(trainer)
    half = len(found) // 2
    rows = [[row for part in p for row in steps_of(part)] for p in (found[:half], found[half:])]
    assert sorted(rows[0]) == sorted(rows[1]) and rows[0] != rows[1]
    old = [{tuple(v) for part in p for v in part.old_log_prob.tolist()} for p in (found[:half], found[half:])]  # type: ignore[union-attr]
    assert old[0] == old[1] and (0.0, 0.0) not in old[0]


def test_after_an_update_the_log_ratios_of_the_next_have_left_zero(make: MakeTrainer) -> None:
    trainer = make({"train.learning_rate": 1e-2})
    first, second = trainer.round()
    assert first.metrics["log_ratio_size"] == 0 < second.metrics["log_ratio_size"]
    assert second.metrics["clip_fraction"] > 0
