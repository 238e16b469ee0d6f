"""DrPO: its field against a computation by loops, the way of its gradient, and rounds in which it learns nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.testing import check_algorithm
from alignkit.testing.algorithm import assert_goes_on_from_its_checkpoint, tiny_trainer
from alignkit.testing.losses import assert_one_pass_is_several
from alignkit.testing.world import Form, PartlyInvalid, Tied
from alignkit.training.trainer import Trainer
from alignkit_drpo.algorithm import Drift, DrPO, Samples, drifting_field, error, mean_distance, pooled, ranking
from alignkit_samplers.lcm import LCM
from alignkit_samplers.renoise import Renoise
from method_checks import collect, gradient, number, updates

MakeTrainer = Callable[..., Trainer]
LAYERS = ["down_blocks.0", "mid_block", "up_blocks.0"]
SMALL: dict[str, Any] = {"samples": 4, "positives": 2, "negatives": 2, "layers": LAYERS, "pool": 2}
DRPO: dict[str, Any] = {"algorithm.name": "drpo", **{f"algorithm.{key}": value for key, value in SMALL.items()}}
RADII = (0.02, 0.05, 0.2)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loops(
    own: Any,
    negatives: Any,
    positives: Any,
    w_n: float,
    w_p: float,
    copied: bool = False,
    radii: Sequence[float] = RADII,
) -> tuple[Any, float, list[Any]]:
    """Compute the field of one group by loops; return F, s_d and, for each radius, the coefficients of the targets."""
    count, size = own.shape
    targets = [*own, *negatives, *positives]
    weights = [1.0] * count + [w_n] * len(negatives) + [w_p] * len(positives)
    others, total = count + len(negatives), len(targets)
    distance = [[math.dist(own[i], targets[j]) for j in range(total)] for i in range(count)]
    s = sum(weights[j] * distance[i][j] for i in range(count) for j in range(total)) / (count * sum(weights))
    s = max(s, 1e-3)
    s_d = max(s / math.sqrt(size), 1e-3)
    field, every = np.zeros((count, size)), []
    for radius in radii:
        logits = np.zeros((count, total))
        for i in range(count):
            for j in range(total):
                own_copy = j == i or (copied and j == count + i)
                logits[i, j] = -distance[i][j] / (s * radius) - (100 / radius if own_copy else 0)
        coefficients, force = np.zeros((count, total)), np.zeros((count, size))
        for i in range(count):
            a = []
            for j in range(total):
                row, column = np.exp(logits[i] - max(logits[i])), np.exp(logits[:, j] - max(logits[:, j]))
                a.append(weights[j] * math.sqrt(max(row[j] / sum(row) * column[i] / sum(column), 1e-6)))
            repelled, attracted = sum(a[:others]), sum(a[others:])
            coefficients[i] = [-attracted * a[j] if j < others else repelled * a[j] for j in range(total)]
            force[i] = sum(c * np.asarray(t) / s_d for c, t in zip(coefficients[i], targets, strict=True))
        field += force / max(math.sqrt((force**2).mean()), 1e-4)
        every.append(coefficients)
    return field, s_d, every


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("copied", [False, True])
def test_the_field_is_that_of_a_computation_by_loops(copied: bool, scale: float) -> None:
    own, positives = scale * normal(2, 5, 7), scale * normal(2, 3, 7, seed=1) + 0.5
    negatives = own if copied else scale * normal(2, 2, 7, seed=2)
    found, s_d = drifting_field(own, negatives, positives, 2000.0, 3000.0, RADII)
    for group in range(2):
        parts = (features[group].numpy() for features in (own, negatives, positives))
        expected, unit, coefficients = by_loops(*parts, w_n=2000.0, w_p=3000.0, copied=copied)
        assert np.allclose(found[group], expected, rtol=1e-6, atol=1e-8)
        assert float(s_d[group]) == pytest.approx(unit)
        for each in coefficients:
            assert np.abs(each.sum(1)).max() < 1e-12 * np.abs(each).max()


def test_a_sample_does_not_act_on_itself() -> None:
    """Far from all others, a sample that acted on its own copies would see nothing but them."""
    own = torch.cat([normal(1, 4, 3), 1e3 + normal(1, 1, 3)], dim=1)
    positives = normal(1, 4, 3, seed=1)
    force, _ = drifting_field(own, own, positives, 5000.0, 3500.0, RADII)
    copies, _ = drifting_field(own, own.clone(), positives, 5000.0, 3500.0, RADII)
    unmasked, _, _ = by_loops(own[0].numpy(), own[0].numpy(), positives[0].numpy(), 5000.0, 3500.0)
    assert np.allclose(copies[0], unmasked) and not torch.allclose(force, copies, rtol=0.1)


def test_samples_that_are_all_alike_meet_the_lower_bounds_and_feel_no_force() -> None:
    same = torch.ones(1, 4, 9, dtype=torch.float64)
    force, s_d = drifting_field(same, same[:, :2], same[:, :2], 2000.0, 3000.0, RADII)
    assert force.abs().max() < 1e-6 and float(s_d) == pytest.approx(1e-3)
    near = same + 1e-5 * normal(1, 4, 9)
    found, s_d = drifting_field(near, near[:, :2], near[:, 2:], 2000.0, 3000.0, RADII)
    expected, unit, _ = by_loops(*(part.numpy() for part in (near[0], near[0, :2], near[0, 2:])), 2000.0, 3000.0)
    assert np.allclose(found[0], expected, atol=1e-8) and float(s_d) == unit == 1e-3


def test_a_shift_of_all_features_changes_no_field_and_single_precision_keeps_it() -> None:
    own, negatives, positives = normal(1, 6, 8), normal(1, 3, 8, seed=1), normal(1, 3, 8, seed=2)
    found, _ = drifting_field(own, negatives, positives, 2000.0, 3000.0, RADII)
    shifted, _ = drifting_field(own + 50, negatives + 50, positives + 50, 2000.0, 3000.0, RADII)
    assert torch.allclose(found, shifted, rtol=1e-6, atol=1e-9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        single, _ = drifting_field(own.float(), negatives.float(), positives.float(), 2000.0, 3000.0, RADII)
    assert single.dtype == torch.float32 and torch.allclose(single.double(), found, rtol=1e-4, atol=1e-5)


def test_samples_follow_the_field_to_the_positives() -> None:
    """A few steps of the features themselves. The field has the same length everywhere, so many would pass them by."""
    start, negatives, positives = normal(1, 8, 4), normal(1, 8, 4, seed=1) - 2, normal(1, 8, 4, seed=2) + 2
    u = start.clone()
    for _ in range(4):
        force, s_d = drifting_field(u, negatives, positives, 2000.0, 3000.0, RADII)
        u = u + 0.05 * s_d * force
    assert mean_distance([u], [positives]) < 0.9 * mean_distance([start], [positives])
    assert mean_distance([u], [negatives]) > mean_distance([start], [negatives])


def test_the_error_is_a_mean_over_layers_and_dimensions_in_units_of_each_layer() -> None:
    features = [normal(3, 4), normal(3, 10, seed=1)]
    scale, goal = torch.tensor([[2.0, 5.0]] * 3, dtype=torch.float64), normal(3, 14, seed=2)
    found = error(features, Drift(goal, scale))
    for row in range(3):
        first = sum((features[0][row, d] / 2 - goal[row, d]) ** 2 for d in range(4)) / 4
        second = sum((features[1][row, d] / 5 - goal[row, 4 + d]) ** 2 for d in range(10)) / 10
        assert float(found[row]) == pytest.approx(float((first + second) / 2))


def test_maps_are_averaged_over_squares_and_small_ones_as_a_whole() -> None:
    maps = torch.arange(64.0).view(1, 1, 8, 8)
    assert pooled(maps, 4).flatten().tolist() == [
        maps[0, 0, a : a + 4, b : b + 4].mean() for a in (0, 4) for b in (0, 4)
    ]
    assert pooled(maps[..., :3, :3], 4).flatten().tolist() == [maps[0, 0, :3, :3].mean()]


def test_the_best_come_first_equal_ones_in_random_order_and_undecided_groups_are_marked() -> None:
    rewards = torch.tensor([[0.1, 0.9, 0.5, 0.7], [1.0, 0.0, 1.0, 0.0], [0.5] * 4, [0.1, torch.nan, 0.2, 0.3]])
    generator = torch.Generator().manual_seed(0)
    orders = []
    for _ in range(50):
        order, decided = ranking(rewards, generator)
        assert decided.tolist() == [True, True, False, False]
        assert order[0].tolist() == [1, 3, 2, 0]
        assert all(sorted(row) == [0, 1, 2, 3] for row in order.tolist())
        assert set(order[1, :2].tolist()) == {0, 2}
        orders.append(order.tolist())
    assert {tuple(order[1][:2]) for order in orders} == {(0, 2), (2, 0)}
    assert len({tuple(order[2]) for order in orders}) > 12


def test_positives_are_the_best_of_their_prompt_and_step(make_trainer: MakeTrainer) -> None:
    """The goals of collected samples are those of fields between features that are computed here again."""
    trainer = make_trainer({**DRPO, "algorithm.feature_noise": 0.0, "algorithm.positives": 1})
    algorithm, ctx, seen = trainer.algorithm, trainer.ctx, []
    plain = ctx.score
    ctx.score = lambda x, e: seen.append((x, plain(x, e))) or seen[-1][1]  # type: ignore[method-assign, func-returns-value, assignment]
    with torch.no_grad():
        for p in ctx.policy.parameters():  # away from the model before training
            p += 0.1
    samples = collect(trainer)
    assert isinstance(samples, Samples) and len(seen) == 2 and len(samples) == 2 * 2 * 4
    assert samples.step.tolist() == [0] * 8 + [1] * 8
    for group in range(4):
        step, rows = group // 2, slice(4 * group, 4 * group + 4)
        here = slice(4 * (group % 2), 4 * (group % 2) + 4)
        latents, rewards = seen[step][0][here], seen[step][1].values[here]
        prompt = samples.prompt.select(torch.arange(16)[rows])
        assert len(set(prompt.texts)) == 1
        best, worst = rewards.argsort(descending=True)[:1], rewards.argsort()[:2]
        with ctx.policy.reference():
            phi = algorithm.features(latents, torch.zeros_like(latents), prompt, ctx)
            before = ctx.sampler.transition(ctx.policy, samples.x[rows], samples.step[rows], prompt).clean
            anchors = algorithm.features(before, torch.zeros_like(latents), prompt, ctx)
        start = 0
        for layer, (u, anchor) in enumerate(zip(phi, anchors, strict=True)):
            size = u.shape[1]
            parts = u.numpy(), u[worst].numpy(), u[best].numpy()
            expected, s_d, _ = by_loops(*parts, w_n=2000.0, w_p=3000.0)
            goal = samples.preference.goal[rows, start : start + size]
            assert np.allclose(goal, u.numpy() / s_d + expected, rtol=1e-3, atol=2e-3)
            assert np.allclose(samples.preference.scale[rows, layer], s_d, rtol=1e-4)
            expected, s_d, _ = by_loops(u.numpy(), u.numpy(), anchor.numpy(), w_n=5000.0, w_p=3500.0, copied=True)
            goal = samples.reference.goal[rows, start : start + size]
            assert np.allclose(goal, u.numpy() / s_d + expected, rtol=1e-3, atol=2e-3)
            start += size
        assert start == samples.preference.goal.shape[1] == samples.reference.goal.shape[1]


def test_before_training_the_loss_is_the_mean_square_of_both_fields(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({**DRPO, "train.rows_per_update": 16})
    (rows,) = updates(trainer)
    value, metrics = trainer.algorithm.loss(rows, trainer.ctx)
    with trainer.ctx.policy.reference():
        latents = trainer.ctx.sampler.transition(trainer.ctx.policy, rows.x, rows.step, rows.prompt).clean
        phi = trainer.algorithm.features(latents, rows.noise, rows.prompt, trainer.ctx)
    expected = error(phi, rows.preference) + 0.25 * error(phi, rows.reference)
    assert number(value) == pytest.approx(float(expected.mean()), rel=1e-5) and not metrics
    # Each of three fields has length 1, so that their sum has at most 3.
    assert 0 < number(value) < 1.25 * 9.01


@pytest.mark.parametrize("rank", [4, 0])
def test_the_gradient_is_that_of_the_regression_through_the_features(make_trainer: MakeTrainer, rank: int) -> None:
    """Along a random direction, by differences; after training, when the network before training is another one."""
    trainer = make_trainer(
        {**DRPO, "train.rows_per_update": 16, "model.lora_rank": rank, "model.lora_targets": ["to_q", "conv1"]}
    )
    policy = trainer.ctx.policy
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator)
    (rows,) = updates(trainer)
    value, _ = trainer.algorithm.loss(rows, trainer.ctx)
    found = gradient(trainer, value)
    direction = [torch.randn(p.shape, generator=generator) for p in policy.parameters()]
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(policy.parameters(), direction, strict=True):
                p += sign * 1e-3 * d
        values.append(number(trainer.algorithm.loss(rows, trainer.ctx)[0]))
        with torch.no_grad():
            for p, d in zip(policy.parameters(), direction, strict=True):
                p -= sign * 1e-3 * d
    expected = float(found @ torch.cat([d.flatten() for d in direction]))
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(expected, rel=0.05, abs=1e-3)
    assert all(p.grad is None for p in policy.parameters())
    frozen = [p for p in policy.unet.parameters() if not any(p is own for own in policy.parameters())]  # type: ignore[attr-defined]
    assert all(p.grad is None for p in frozen) and not rows.preference.goal.requires_grad


def test_activations_that_are_computed_twice_are_those_of_the_network_before_training(
    make_trainer: MakeTrainer,
) -> None:
    found = []
    for twice in (False, True):
        trainer = make_trainer({**DRPO, "train.rows_per_update": 16, "train.gradient_checkpointing": twice})
        with torch.no_grad():
            for p in trainer.ctx.policy.parameters():
                p.fill_(0.05)
        (rows,) = updates(trainer)
        found.append(gradient(trainer, trainer.algorithm.loss(rows, trainer.ctx)[0]))
    assert torch.allclose(*found, rtol=1e-3, atol=1e-5 * float(found[0].abs().max())) and found[0].abs().max() > 0


def test_one_pass_of_all_rows_is_several_passes_of_fewer(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({**DRPO, "train.rows_per_update": 16})
    (rows,) = updates(trainer)
    assert_one_pass_is_several(trainer, rows)


def test_rounds_are_cut_into_updates_and_metrics_say_how_far_samples_are(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({**DRPO, "train.rows_per_update": 8})
    first, second = trainer.round()
    names = {"distance/positives", "distance/negatives", "distance/reference", "skipped_prompts", "reward"}
    assert names <= first.metrics.keys() and not names & second.metrics.keys()
    assert (
        all(first.metrics[name] > 0 for name in names - {"skipped_prompts"}) and first.metrics["skipped_prompts"] == 0
    )


@pytest.mark.parametrize("reward", [Tied(), PartlyInvalid()])
def test_groups_without_a_ranking_are_skipped_and_counted(reward: Any) -> None:
    trainer = tiny_trainer(DrPO(**SMALL), LCM(2), reward=reward)
    assert not list(trainer.round())
    assert trainer.ctx.take_metrics()["skipped_prompts"] == 1


def test_a_group_without_a_ranking_leaves_the_others(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(DRPO)
    plain = trainer.ctx.score

    def half_tied(latents: Tensor, examples: Any) -> Any:
        scores = plain(latents, examples)
        values = scores.values.clone()
        values[:4] = 0.5
        return replace(scores, values=values)

    trainer.ctx.score = half_tied  # type: ignore[method-assign, assignment]
    samples = collect(trainer)
    assert len(samples) == 8 and len(set(samples.prompt.texts)) == 1
    assert trainer.ctx.take_metrics()["skipped_prompts"] == 0.5


@pytest.mark.parametrize(
    ("form", "sampler"),
    [
        ("lcm", LCM(1)), ("turbo", Renoise(2)),
        *(pytest.param(*one, marks=pytest.mark.long) for one in (("lcm", LCM(2)), ("turbo", Renoise(1)))),
    ],
)  # fmt: skip
def test_it_keeps_the_promises_of_an_algorithm(form: Form, sampler: Any) -> None:
    check_algorithm(DrPO(**SMALL), sampler, form=form)


def test_with_the_regulariser_reference_the_features_are_no_predictions_of_the_policy(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer({**DRPO, "train.rows_per_update": 16, "regulariser": ["reference"]})
    for _ in range(2):
        (update,) = trainer.round()
    assert update.metrics["reference_loss"] > 0 and update.metrics["grad_norm"] > 0


def test_a_layer_that_the_network_does_not_have_is_refused_with_those_it_has(make_trainer: MakeTrainer) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^layers: found down_blocks\.2, expected some of down_blocks\.0, down_blocks\.1, mid_block, "
        r"up_blocks\.0, up_blocks\.1$",
    ):
        make_trainer({**DRPO, "algorithm.layers": ["down_blocks.2", "mid_block"]})
    with pytest.raises(ConfigError, match=r"^algorithm\.feature_time: found 1000, expected less than 1000$"):
        make_trainer({**DRPO, "algorithm.feature_time": 1000})


def test_settings_that_make_no_ranking_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^samples: found 8, expected at least positives \+ negatives, which is 16"):
        DrPO(samples=8)
    for fields in ({"radii": []}, {"layers": []}, {"radii": [0.0]}, {"positives": 0}, {"samples": 1}):
        with pytest.raises(ValueError, match="expected"):
            DrPO(**fields)  # type: ignore[arg-type]


def test_the_defaults_are_those_of_the_code_for_sdxl_turbo() -> None:
    found = DrPO()
    assert (found.samples, found.positives, found.negatives, found.reference_weight) == (16, 8, 8, 0.25)
    assert (found.positive_weight, found.negative_weight) == (3000, 2000)
    assert (found.reference_positive_weight, found.reference_negative_weight) == (3500, 5000)
    assert found.layers == ["down_blocks.2", "mid_block", "up_blocks.0"] and found.radii == [0.02, 0.05, 0.2]
    assert (found.feature_time, found.feature_noise, found.pool) == (100, 0.1, 4)


def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    assert_goes_on_from_its_checkpoint(make_trainer, DRPO, tmp_path)
