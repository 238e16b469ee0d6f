"""LaSRO as in its paper: what it collects, what its two kinds of update change, and that it works on a toy reward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import alignkit
from alignkit.errors import ConfigError
from alignkit.groups import Pairs
from alignkit.records import PolicyFacts
from alignkit.rollout import States
from alignkit.runs.run import Run
from alignkit.testing.algorithm import assert_goes_on_from_its_checkpoint
from alignkit.testing.losses import assert_one_pass_is_several
from alignkit.training.trainer import Trainer
from alignkit_lasro.additions import ExtendedLaSRO
from alignkit_lasro.lasro import LaSRO, Tracker
from alignkit_samplers.lcm import LCM
from method_checks import (
    assert_the_true_reward_rises,
    collect,
    copies,
    equal,
    toy_images,
    updates,
    whole_updates,
)

MakeRun = Callable[..., Run]
MakeTrainer = Callable[..., Trainer]
ALONE: dict[str, Any] = {"regulariser": []}


def tensors(trainer: Trainer) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Return copies of the policy's trained weights, of the surrogate's, and of all that are frozen."""
    ctx = trainer.ctx
    assert ctx.surrogate is not None and ctx.teacher is not None
    parts = [ctx.policy.vae, ctx.policy.pipe.text_encoder, ctx.teacher.unet, ctx.teacher.vae]  # type: ignore[attr-defined]
    frozen = [p for p in ctx.policy.unet.parameters() if not p.requires_grad]  # type: ignore[attr-defined]
    frozen += [p for part in parts for p in part.parameters()]
    columns = (ctx.policy.parameters(), list(ctx.surrogate.module().parameters()), frozen)
    policy, surrogate, still = map(copies, columns)
    return policy, surrogate, still


def test_the_normalised_score_is_golden_and_bounded_above_alone() -> None:
    method = LaSRO()
    method._trackers = [Tracker(0.5, 2.5, 1.0)] * 2
    scores = torch.tensor([-2.0, 0.0, 1.0, 3.0], requires_grad=True)
    loss = -method.normalised(scores, torch.tensor([0, 1, 0, 1]))
    assert loss.tolist() == [1.25, 0.25, -0.25, -1.0]
    loss.sum().backward()
    assert scores.grad is not None and scores.grad.tolist() == [-0.5, -0.5, -0.5, 0.0]


def test_each_step_is_normalised_by_its_own_trackers() -> None:
    method = LaSRO()
    method._trackers = [Tracker(0.0, 1.0, 1.0), Tracker(10.0, 20.0, 1.0)]
    assert method.normalised(torch.tensor([0.5, 15.0]), torch.tensor([0, 1])).tolist() == [0.5, 0.5]


def test_the_trackers_start_at_the_first_round_and_then_move_slowly(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    method, ctx = trainer.algorithm, trainer.ctx
    assert isinstance(method, LaSRO) and ctx.surrogate is not None
    with torch.no_grad():
        ctx.surrogate.module().head[-1].weight.normal_(generator=torch.Generator().manual_seed(0))  # type: ignore[index, operator, union-attr]
    states = collect(trainer).states
    scores = ctx.surrogate.score(states.clean, states.prompt)
    method.track(states, ctx)
    for k in (0, 1):
        at = scores[states.step == k]
        expected = float(at.mean()), float(at.quantile(0.95))
        assert method._trackers[k].bounds == pytest.approx(expected, rel=1e-4)
    method._trackers = [Tracker(0.0, 0.0, 1.0), Tracker(0.0, 0.0, 1.0)]
    method.track(states, ctx)
    assert method._trackers[1].bounds[0] == pytest.approx(0.1 * float(scores[states.step == 1].mean()), rel=1e-3)


def test_a_tracker_weighs_early_rounds_as_a_mean_and_late_ones_by_its_decay() -> None:
    tracker = Tracker()
    assert tracker.bounds == (0.0, 1.0)
    for mean in (1.0, 3.0):
        tracker.see(mean, 2 * mean, 0.9)
    # (.9 * .1 * 1 + .1 * 3) / (.9 * .1 + .1): the first round is not worth nine times the second
    assert tracker.bounds == pytest.approx((0.39 / 0.19, 0.78 / 0.19))
    for _ in range(200):
        tracker.see(5.0, 6.0, 0.9)
    assert tracker.bounds == pytest.approx((5.0, 6.0))


@pytest.mark.long
def test_about_as_many_scores_are_cut_off_as_the_percentile_says_while_the_surrogate_learns() -> None:
    run = alignkit.load(None, {
        "algorithm.name": "lasro", "model.name": "shapes_turbo", "surrogate.warmup": 6, "train.updates": 20,
        "data.batch_size": 4, "evaluate.prompts": "", "evaluate.points": 0, "train.checkpoint_every": 0, "output": "",
    })  # fmt: skip
    clipped = [update.metrics["clipped"] for update in run.train()]
    assert len(clipped) == 20 and 0.01 <= sum(clipped) / 20 <= 0.12, clipped


def test_some_scores_and_by_far_not_all_are_cut_off_while_a_new_surrogate_learns(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({
        **ALONE, "algorithm.samples": 6, "data.batch_size": 2, "train.updates": 6, "train.rows_per_update": 24,
        "surrogate.warmup": 4, "surrogate.learning_rate": 1e-3, "train.learning_rate": 1e-4,
    })  # fmt: skip
    toy_images(trainer)
    metrics = [update.metrics for _ in range(10) for update in trainer.round()]
    clipped = [m["clipped"] for m in metrics if "clipped" in m]
    assert len(clipped) == 6 and 0.01 <= sum(clipped) / 6 <= 0.35, clipped


def test_fresh_samples_are_others_than_those_that_were_scored(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({"algorithm.fresh_samples": True, "algorithm.policy_steps": 2, "train.rows_per_update": 6})
    collected = collect(trainer)
    first, second = updates(trainer, collected)
    known = {row.tobytes() for row in collected.states.x.numpy()}
    for rows in (first, second):
        assert len(rows) == 6 and not known & {row.tobytes() for row in rows.x.numpy()}
        assert not rows.clean.requires_grad
        assert torch.allclose(rows.clean, rows.predict(trainer.ctx), atol=1e-5)
    assert not torch.equal(first.x, second.x)


def test_the_trackers_are_fed_in_stage_1(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({"surrogate.warmup": 2})
    list(trainer.round())
    method = trainer.algorithm
    assert isinstance(method, LaSRO) and all(tracker.weight > 0 for tracker in method._trackers)


def test_groups_hold_samples_of_one_prompt_and_one_step_with_the_rewards_of_their_images(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer()
    collected, policy = collect(trainer), trainer.ctx.policy
    assert collected.scored.latents.shape == (4, 3, 4, 8, 8) and collected.scored.step.tolist() == [0, 0, 1, 1]
    assert collected.scored.text.tolist() == [0, 1, 0, 1] and len(collected.prompt) == 2
    for group in range(4):
        expected = policy.decode(collected.scored.latents[group]).mean((1, 2, 3))
        assert torch.allclose(collected.scored.rewards[group], expected, atol=3e-3)  # of 8-bit images
    # The states of a group lead to its clean latents, under its own text and at its own step.
    states = collected.states
    for row in range(len(states)):
        one = states.select(torch.tensor([row]))
        with torch.no_grad():
            clean = trainer.ctx.sampler.transition(policy, one.x, one.step, one.prompt).clean
        group, member = divmod(row, 3)
        assert torch.allclose(clean[0], collected.scored.latents[group, member], rtol=1e-3, atol=1e-2)
        text = policy.encode([collected.prompt.texts[int(collected.scored.text[group])]])
        assert torch.allclose(one.prompt.features, text.features, atol=1e-5)


def test_a_pair_is_the_best_and_the_worst_of_a_group_under_its_own_text(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({"data.batch_size": 4})
    scored, prompt = (collected := collect(trainer)).scored, collected.prompt
    best, worst = (choose(scored.rewards, dim=1) for choose in (torch.argmax, torch.argmin))
    for size in (64, 5):
        pairs = LaSRO(samples=3, pairs_per_update=size).pairs_of(collected, trainer.ctx)
        assert isinstance(pairs, Pairs) and len(pairs) == min(size, 8)
        groups = []
        for row in range(len(pairs)):
            (group,) = (g for g in range(8) if torch.equal(scored.latents[g, best[g]], pairs.winner[row]))
            assert torch.equal(scored.latents[group, worst[group]], pairs.loser[row])
            assert pairs.prompt.texts[row] == prompt.texts[scored.text[group]]
            groups.append(group)
        assert len(set(groups)) == len(groups)
    scored.rewards.fill_(0.5)
    assert LaSRO(samples=3).pairs_of(collected, trainer.ctx) is None


@pytest.mark.parametrize("pairs_per_update", [64, 3])
def test_with_every_addition_off_the_extended_method_is_the_papers_to_the_bit(
    make_trainer: MakeTrainer, pairs_per_update: int
) -> None:
    found = []
    for kind in (LaSRO, ExtendedLaSRO):
        trainer = make_trainer({"train.learning_rate": 1e-2, "surrogate.learning_rate": 1e-2, "train.updates": 2})
        trainer.algorithm = kind(samples=3, pairs_per_update=pairs_per_update)
        before, surrogate = copies(trainer.ctx.policy.parameters()), trainer.ctx.surrogate
        assert surrogate is not None
        metrics = [dict(update.metrics) for _ in range(3) for update in trainer.round()]
        assert trainer.finished and not equal(before, trainer.ctx.policy.parameters())
        found.append((metrics, copies(trainer.ctx.policy.parameters()), copies(surrogate.module().parameters())))
    (metrics, policy, surrogate), (others, same_policy, same_surrogate) = found
    assert metrics == others and len(metrics) == 3  # the warm-up, and two updates
    assert equal(policy, same_policy) and equal(surrogate, same_surrogate)


def test_a_step_of_the_policy_changes_the_policy_alone_and_one_of_the_surrogate_the_surrogate_alone(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer()
    collected = collect(trainer)
    policy, surrogate, frozen = tensors(trainer)
    trainer._update_surrogate(collected)
    after_policy, after_surrogate, after_frozen = tensors(trainer)
    assert equal(policy, after_policy) and equal(frozen, after_frozen) and not equal(surrogate, after_surrogate)
    for rows in trainer._updates(collected):
        trainer._update_policy(rows)
    last_policy, last_surrogate, last_frozen = tensors(trainer)
    assert equal(after_surrogate, last_surrogate) and equal(frozen, last_frozen) and not equal(policy, last_policy)


def test_with_every_term_switched_off_the_policy_stays_as_it_is(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({**ALONE, "algorithm.step_weights": [0.0, 0.0]})
    before = copies(trainer.ctx.policy.parameters())
    for _ in range(2):
        list(trainer.round())
    assert trainer.ctx.update == 1  # the first round is the surrogate's warm-up
    assert equal(before, trainer.ctx.policy.parameters())


def test_without_distillation_neither_teacher_nor_images_are_needed(make_trainer: MakeTrainer) -> None:
    assert LaSRO().needs == {"surrogate"} and LaSRO.default_regularisers == {"lcd": 1.0}
    for settings, needed in (({}, True), (ALONE, False), ({"regulariser.lcd.weight": 0.0}, False)):
        trainer = make_trainer(settings)
        assert (trainer.ctx.teacher is not None) == needed == (trainer.batch().images is not None)


def test_the_distillation_term_is_added_with_its_weight_and_has_a_row_for_each_state(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({"train.rows_per_update": 7, "regulariser.lcd.weight": 0.5})
    trainer._update_surrogate(collect(trainer))
    (rows,) = whole_updates(trainer)
    (noised,) = rows.others
    assert isinstance(rows.own, States) and noised is not None and len(rows) == len(noised) == 7
    loss, metrics = trainer.loss(rows)
    assert metrics.keys() == {"reward_loss", "clipped", "distillation_loss"} and metrics["distillation_loss"].item() > 0
    assert loss.item() == pytest.approx((metrics["reward_loss"] + 0.5 * metrics["distillation_loss"]).item(), rel=1e-5)
    assert_one_pass_is_several(trainer, rows)


def test_a_step_weight_of_zero_leaves_the_states_of_that_step_without_gradient(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer({**ALONE, "algorithm.step_weights": [0.0, 1.0]})
    collected = collect(trainer)
    trainer._update_surrogate(collected)
    (rows,) = trainer.algorithm.updates(collected, trainer.ctx)
    assert not rows.x.requires_grad  # each step starts from a state without history
    for step, moves in ((0, False), (1, True)):
        states = collected.states.select((collected.states.step == step).nonzero()[:, 0])
        value, _ = trainer.algorithm.loss(states, trainer.ctx)
        gradients = torch.autograd.grad(value, trainer.ctx.policy.parameters(), allow_unused=True)
        assert any(g is not None and bool((g != 0).any()) for g in gradients) == moves


def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    settings = {"algorithm.reference_samples": 1, "algorithm.replay": 2, "surrogate.warmup": 1}
    metrics = assert_goes_on_from_its_checkpoint(make_trainer, settings, tmp_path)
    assert "surrogate_loss" in metrics[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"samples": 1},
        {"percentile": 0.0},
        {"pairs_per_update": 0},
        {"policy_steps": 0},
        {"surrogate_steps": -1},
        {"ode_steps": 0},
    ],
)
def test_settings_that_cannot_learn_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        LaSRO(**fields)


def test_a_number_of_weights_that_is_not_the_number_of_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"found 2 weights for sampler\.num_steps = 4; .*=\[1\.0,1\.0,1\.0,1\.0\]"):
        LaSRO().check(LCM(4), PolicyFacts())


@pytest.mark.parametrize("reward", ["constant", "every_second", "unscored"])
def test_a_reward_that_distinguishes_few_images_or_none_breaks_nothing(
    tiny_run: MakeRun, odd_rewards: None, reward: str
) -> None:
    run = tiny_run(overrides={"reward": [reward], "train.updates": 2})
    trained = list(run.train())
    assert all(torch.isfinite(torch.tensor(u.metrics["loss"])) for u in trained)
    assert ("surrogate_loss" in trained[-1].metrics) == (reward == "every_second")
    assert all(v == v for u in trained for n, v in u.metrics.items() if not n.startswith("reward"))


def test_the_true_reward_rises_on_a_toy_reward(make_trainer: MakeTrainer) -> None:
    assert_the_true_reward_rises(make_trainer({
        **ALONE, "algorithm.samples": 4, "data.batch_size": 4, "model.lora_rank": 8,
        "train.updates": 12, "train.rows_per_update": 16, "train.learning_rate": 1e-2,
        "surrogate.warmup": 6, "surrogate.learning_rate": 1e-3,
    }))  # fmt: skip


def test_distillation_is_refused_for_a_sampler_it_cannot_serve(tiny_run: MakeRun) -> None:
    with pytest.raises(ConfigError, match="expected lcm"):
        tiny_run(overrides={"sampler.name": "ddim"}).check()
    tiny_run(overrides={**ALONE, "sampler.name": "ddim"}).check()
