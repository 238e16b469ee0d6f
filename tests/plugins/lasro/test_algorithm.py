"""LaSRO: what it collects, what each of its two kinds of update may change, and that it works on a toy reward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from alignkit_lasro.algorithm import LaSRO

from alignkit.errors import ConfigError
from alignkit.runs.run import Run
from alignkit.testing.algorithm import assert_goes_on_from_its_checkpoint
from alignkit.testing.losses import assert_one_pass_is_several
from alignkit.training.trainer import Trainer
from alignkit_samplers.ddim import DDIM
from alignkit_samplers.lcm import LCM
from method_checks import assert_the_true_reward_rises, collect, copies, equal, updates

MakeRun = Callable[..., Run]


def tensors(trainer: Trainer) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Copies of what the policy trains, of the surrogate, and of all that is frozen."""
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
    method._critic.mean, method._critic.level = [0.5, 0.5], [2.5, 2.5]
    scores = torch.tensor([-2.0, 0.0, 1.0, 3.0], requires_grad=True)
    loss = -method._critic.normalised(scores, torch.tensor([0, 1, 0, 1]))
    assert loss.tolist() == [1.25, 0.25, -0.25, -1.0]
    loss.sum().backward()
    assert scores.grad is not None and scores.grad.tolist() == [-0.5, -0.5, -0.5, 0.0]


def test_each_step_is_normalised_by_its_own_trackers() -> None:
    method = LaSRO()
    method._critic.mean, method._critic.level = [0.0, 10.0], [1.0, 20.0]
    assert method._critic.normalised(torch.tensor([0.5, 15.0]), torch.tensor([0, 1])).tolist() == [0.5, 0.5]


def test_the_trackers_start_at_the_first_round_and_then_move_slowly(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer()
    method, ctx = trainer.algorithm, trainer.ctx
    assert isinstance(method, LaSRO) and ctx.surrogate is not None
    with torch.no_grad():
        ctx.surrogate.module().head[-1].weight.normal_(generator=torch.Generator().manual_seed(0))  # type: ignore[index, operator, union-attr]
    states = collect(trainer).states
    scores = ctx.surrogate.score(states.clean, states.prompt)
    method._critic.track(method._critic.rows(states, ctx), ctx)
    for k in (0, 1):
        at = scores[states.step == k]
        assert method._critic.mean[k] == pytest.approx(float(at.mean()), rel=1e-4)
        assert method._critic.level[k] == pytest.approx(float(at.quantile(0.95)), rel=1e-4)
    method._critic.mean, method._critic.level = [0.0, 0.0], [0.0, 0.0]
    method._critic.track(method._critic.rows(states, ctx), ctx)
    assert method._critic.mean[1] == pytest.approx(0.01 * float(scores[states.step == 1].mean()), rel=1e-3)


def test_groups_hold_samples_of_one_prompt_and_one_step_with_the_rewards_of_their_images(
    make_trainer: Callable[..., Trainer],
) -> None:
    trainer = make_trainer()
    collected, policy = collect(trainer), trainer.ctx.policy
    assert collected.scored.latents.shape == (4, 3, 4, 8, 8) and collected.scored.step.tolist() == [0, 0, 1, 1]
    assert collected.scored.text.tolist() == [0, 1, 0, 1] and len(collected.texts) == 2
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
        text = policy.encode([collected.texts[int(collected.scored.text[group])]])
        assert torch.allclose(one.prompt.features, text.features, atol=1e-5)


def test_a_step_of_the_policy_changes_the_policy_alone_and_one_of_the_surrogate_the_surrogate_alone(
    make_trainer: Callable[..., Trainer],
) -> None:
    trainer = make_trainer()
    collected = collect(trainer)
    policy, surrogate, frozen = tensors(trainer)
    trainer._update_surrogate(collected)
    after_policy, after_surrogate, after_frozen = tensors(trainer)
    assert equal(policy, after_policy) and equal(frozen, after_frozen) and not equal(surrogate, after_surrogate)
    for rows in trainer.algorithm.updates(collected, trainer.ctx):
        trainer._update_policy(rows)
    last_policy, last_surrogate, last_frozen = tensors(trainer)
    assert equal(after_surrogate, last_surrogate) and equal(frozen, last_frozen) and not equal(policy, last_policy)


def test_with_every_term_switched_off_the_policy_stays_as_it_is(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer({"algorithm.step_weights": [0.0, 0.0], "algorithm.distillation_weight": 0.0})
    before = copies(trainer.ctx.policy.parameters())
    for _ in range(2):
        list(trainer.round())
    assert trainer.ctx.update == 1  # the first round is the surrogate's warm-up
    assert equal(before, trainer.ctx.policy.parameters())


def test_without_distillation_neither_teacher_nor_images_are_needed() -> None:
    assert LaSRO().needs == {"surrogate", "teacher", "images"}
    assert LaSRO(distillation_weight=0).needs == {"surrogate"}


def test_a_step_weight_of_zero_leaves_the_states_of_that_step_without_gradient(
    make_trainer: Callable[..., Trainer],
) -> None:
    trainer = make_trainer({"algorithm.step_weights": [0.0, 1.0], "algorithm.distillation_weight": 0.0})
    collected = collect(trainer)
    trainer._update_surrogate(collected)
    (rows,) = trainer.algorithm.updates(collected, trainer.ctx)
    assert not rows.states.x.requires_grad  # each step starts from a state without history
    for step, moves in ((0, False), (1, True)):
        states = collected.states.select((collected.states.step == step).nonzero()[:, 0])
        zero = torch.zeros_like(states.x)[:, None]
        part = replace(rows, states=states, other=states.prompt, blur=zero, noise=zero)
        value, _ = trainer.algorithm.loss(part, trainer.ctx)
        gradients = torch.autograd.grad(value, trainer.ctx.policy.parameters(), allow_unused=True)
        assert any(g is not None and bool((g != 0).any()) for g in gradients) == moves


def test_one_pass_of_all_rows_has_the_gradient_of_several_passes(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer({"train.rows_per_update": 7})
    collected = collect(trainer)
    trainer._update_surrogate(collected)
    (rows,) = updates(trainer, collected)
    assert len(rows) == 7 and rows.noised is not None and len(rows.noised) == 7
    assert_one_pass_is_several(trainer, rows)


@pytest.mark.parametrize("pairs", ["extremes", "random"])
def test_pairs_are_of_the_true_reward_and_under_their_own_text(
    make_trainer: Callable[..., Trainer], pairs: str
) -> None:
    trainer = make_trainer({"algorithm.pairs": pairs, "algorithm.pairs_per_update": 6, "algorithm.replay": 4})
    for _ in range(4):
        collected = collect(trainer)
    policy = trainer.ctx.policy
    memory = trainer.algorithm._memory.rounds  # type: ignore[attr-defined]
    updates = list(trainer.algorithm.surrogate_updates(collected, trainer.ctx))
    assert len(updates) == 2
    for rows in updates:
        assert 6 <= len(rows) <= 9
        better, worse = (policy.decode(x).mean((1, 2, 3)) for x in (rows.winner, rows.loser))
        assert bool((better > worse - 1e-3).all()) and float((better - worse).mean()) > 2e-4
        for row in range(len(rows)):
            where = [
                (names[int(scored.text[g])])
                for scored, names in memory
                for g in range(len(scored))
                if any(torch.equal(rows.winner[row], x) for x in scored.latents[g])
            ]
            assert len(where) == 1
            features = policy.encode(where).features
            assert torch.allclose(rows.prompt.features[row], features[0], atol=1e-5)


def test_no_more_rounds_are_kept_than_replay_says(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer({"algorithm.replay": 2})
    seen = [collect(trainer).scored.latents for _ in range(3)]
    memory = trainer.algorithm._memory.rounds  # type: ignore[attr-defined]
    assert len(memory) == 2
    assert all(torch.equal(kept.latents, latents) for (kept, _), latents in zip(memory, seen[1:], strict=True))


def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(
    make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    settings = {"algorithm.reference_samples": 1, "algorithm.replay": 2, "surrogate.warmup": 1}
    metrics = assert_goes_on_from_its_checkpoint(make_trainer, settings, tmp_path)
    assert "surrogate_loss" in metrics[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"samples": 1},
        {"percentile": 0.0},
        {"replay": 0},
        {"pairs_per_update": 0},
        {"reference_samples": 8},
        {"smoothing": -0.1},
        {"negatives": -1},
        {"gradient_samples": 0},
        {"restart_every": -1},
        {"noise_correlation": 1.0},
        {"purify": 1000},
    ],
)
def test_settings_that_cannot_learn_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        LaSRO(**fields)


def test_a_number_of_weights_that_is_not_the_number_of_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"found 2 weights for sampler\.num_steps = 4; .*=\[1\.0,1\.0,1\.0,1\.0\]"):
        LaSRO().check(LCM(4))


@pytest.mark.parametrize("reward", ["constant", "every_second", "unscored"])
def test_a_reward_that_tells_little_or_nothing_apart_breaks_nothing(
    tiny_run: MakeRun, odd_rewards: None, reward: str
) -> None:
    run = tiny_run(overrides={"reward": [reward], "train.updates": 2})
    updates = list(run.train())
    assert all(torch.isfinite(torch.tensor(u.metrics["loss"])) for u in updates)
    assert ("surrogate_loss" in updates[-1].metrics) == (reward == "every_second")
    assert all(v == v for u in updates for n, v in u.metrics.items() if not n.startswith("reward"))


def test_the_true_reward_rises_on_a_toy_reward(make_trainer: Callable[..., Trainer]) -> None:
    assert_the_true_reward_rises(make_trainer({
        "algorithm.distillation_weight": 0.0, "algorithm.samples": 4, "data.batch_size": 4, "model.lora_rank": 8,
        "train.updates": 20, "train.rows_per_update": 16, "train.learning_rate": 1e-2,
        "surrogate.warmup": 6, "surrogate.learning_rate": 1e-3,
    }))  # fmt: skip


def test_reference_samples_are_drawn_without_the_adapter_and_taught_but_not_followed(
    make_trainer: Callable[..., Trainer],
) -> None:
    trainer = make_trainer({"algorithm.samples": 5, "algorithm.reference_samples": 2})
    ctx = trainer.ctx
    with torch.no_grad():
        for parameter in ctx.policy.parameters():
            parameter += 0.1
    state, denoise, asked = ctx.generator.get_state(), ctx.policy.denoise, []
    ctx.policy.denoise = lambda x, *rest: asked.append(len(x)) or denoise(x, *rest)  # type: ignore[method-assign, func-returns-value]
    collected = collect(trainer)
    assert sum(asked) == 2 * 2 * 5  # prompts, steps, samples: none is drawn by both
    with ctx.policy.reference():
        ctx.generator.set_state(state)
        trainer.batches -= 1  # the same texts again
        reference = collect(trainer).scored.latents
    found = collected.scored.latents
    assert torch.equal(found[:, 3:], reference[:, 3:])
    assert not torch.isclose(found[:, :3], reference[:, :3]).all(-1).any()
    assert len(collected.states) == 2 * 2 * 3  # prompts, steps, samples of the policy as it is


def test_smoothing_moves_what_the_surrogate_sees_and_nothing_else(make_trainer: Callable[..., Trainer]) -> None:
    plain, smooth = (make_trainer({"algorithm.smoothing": s}) for s in (0.0, 0.5))
    for trainer, spread in ((plain, 0.0), (smooth, 0.5)):
        collected = collect(trainer)
        (pairs, *_) = trainer.algorithm.surrogate_updates(collected, trainer.ctx)
        known = collected.scored.latents.flatten(0, 1)
        distance = (pairs.winner[:, None] - known).flatten(2).norm(dim=2).min(1).values / known[0].numel() ** 0.5
        assert distance.mean() == pytest.approx(spread, abs=0.15)
        (rows,) = trainer.algorithm.updates(collected, trainer.ctx)
        assert float(rows.blur.std()) == pytest.approx(spread, abs=0.1)


def test_distillation_is_refused_for_a_sampler_it_cannot_serve() -> None:
    with pytest.raises(ConfigError, match="expected lcm"):
        LaSRO().check(DDIM(2))
    LaSRO(distillation_weight=0.0).check(DDIM(2))


def test_a_policy_that_restarts_leaves_surrogate_and_samples_as_they_were(
    make_trainer: Callable[..., Trainer],
) -> None:
    trainer = make_trainer({"algorithm.restart_every": 2, "algorithm.replay": 9, "train.updates": 3})
    trainer.algorithm.setup(trainer.ctx)
    policy, surrogate, _ = tensors(trainer)
    seen = []
    while not trainer.finished:
        for _ in trainer.round():
            seen.append(equal(policy, copies(trainer.ctx.policy.parameters())))
    assert seen[-3:] == [False, True, False]
    assert not equal(surrogate, tensors(trainer)[1])
    assert len(trainer.algorithm._memory.rounds) == trainer.batches  # type: ignore[attr-defined]
