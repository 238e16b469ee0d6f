"""The hybrid gradient: its two terms computed again, what each reaches, and its limits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignkit.advantage import clipped
from alignkit.errors import ConfigError
from alignkit.interfaces import Sampler
from alignkit.records import PolicyFacts, Scores
from alignkit.runs.run import Run
from alignkit.testing import check_algorithm
from alignkit.testing.algorithm import assert_goes_on_from_its_checkpoint
from alignkit.testing.losses import assert_one_pass_is_several
from alignkit.testing.world import Form
from alignkit.training.predictions import recorded
from alignkit.training.trainer import Trainer
from alignkit_draft.hybrid import Hybrid
from alignkit_samplers.ddim import DDIM
from alignkit_samplers.euler_ancestral import EulerAncestral
from alignkit_samplers.lcm import LCM
from alignkit_samplers.renoise import Renoise
from method_checks import (
    assert_the_true_reward_rises,
    collect,
    copies,
    equal,
    gradient,
    number,
    updates,
)

MakeRun = Callable[..., Run]
MakeTrainer = Callable[..., Trainer]
SETTINGS: dict[str, Any] = {
    "algorithm.name": "hybrid", "algorithm.samples": 4, "regulariser": [], "train.rows_per_update": 8,
    "sampler.num_steps": 3,
}  # fmt: skip
TAUGHT: dict[str, Any] = {"algorithm.gradient_of": "surrogate", "surrogate.learning_rate": 1e-2}


@pytest.fixture
def make(make_trainer: MakeTrainer) -> MakeTrainer:
    """A trainer of the hybrid gradient on the consistency model, or with `ddim=True` on its teacher."""
    return lambda overrides=None, ddim=False: make_trainer(SETTINGS | (overrides or {}), ddim)


@pytest.mark.parametrize("ddim", [False, True])
def test_the_loss_is_the_sum_of_a_policy_gradient_and_the_gradient_through_the_last_step(
    make: MakeTrainer, ddim: bool
) -> None:
    trainer = make({"algorithm.last_weight": 0.5}, ddim)
    (rows,) = updates(trainer)
    ctx = trainer.ctx
    policy, sampler = ctx.policy, ctx.sampler
    loss, metrics = trainer.algorithm.loss(rows, ctx)
    log_probs = []
    for k in range(2):
        step = sampler.transition(policy, rows.x[:, k], torch.full((8,), k), rows.prompt)
        log_probs.append(step.log_prob(rows.x_next[:, k]))
    policy_gradient = -(rows.advantage[:, None] * torch.stack(log_probs, dim=1)).mean()
    step = sampler.transition(policy, rows.x[:, 2], torch.full((8,), 2), rows.prompt)
    final = step.sample(rows.last_noise)
    assert torch.allclose(final, rows.x_next[:, 2], rtol=1e-3, atol=1e-3)
    brightness = policy.decode(final).mean((1, 2, 3))
    last = -(brightness / rows.spread).mean()
    assert number(metrics["last_loss"]) == pytest.approx(number(last), rel=0.02)  # of 8-bit images
    assert number(metrics["policy_loss"]) == pytest.approx(-float(rows.advantage.mean()), abs=1e-5)
    assert number(metrics["log_ratio_size"]) == 0
    assert number(loss) == pytest.approx(number(metrics["policy_loss"] + 0.5 * metrics["last_loss"]), rel=1e-5)
    found, wanted = gradient(trainer, loss), gradient(trainer, policy_gradient + 0.5 * last)
    assert float(wanted.norm()) > 0
    assert torch.allclose(found, wanted, rtol=1e-2, atol=2e-3 * float(wanted.abs().max()))


def test_advantages_and_the_scale_of_the_last_step_are_of_the_same_group(make: MakeTrainer) -> None:
    trainer = make()
    rows = collect(trainer).rows
    images = trainer.ctx.policy.decode(rows.x_next[:, -1])
    rewards = ((images * 255).round() / 255).mean((1, 2, 3)).double().view(2, 4)
    spread = rewards.std(1, correction=0, keepdim=True) + 1e-4
    assert rows.spread.view(2, 4).tolist() == pytest.approx(spread.expand(2, 4).float().numpy(), rel=1e-2)
    expected = (rewards - rewards.mean(1, keepdim=True)) / spread
    assert torch.allclose(rows.advantage.view(2, 4), expected.float(), atol=0.02)
    one, other = rows.prompt.texts[0], rows.prompt.texts[-1]
    assert one != other and rows.prompt.texts == [one] * 4 + [other] * 4


def test_the_last_step_starts_from_a_latent_without_gradient_and_no_prediction_of_another_step_gets_its_gradient(
    make: MakeTrainer,
) -> None:
    trainer = make()
    (rows,) = updates(trainer)
    with recorded(trainer.ctx.policy) as seen:
        last = trainer.algorithm.last_reward(rows, trainer.ctx)  # type: ignore[attr-defined]
    times = trainer.ctx.sampler.grid(trainer.ctx.policy)
    assert [p.t.unique().tolist() for p in seen] == [[int(times[2])]] and not rows.x.requires_grad
    (slope,) = torch.autograd.grad(last.sum(), seen[0].clean)
    assert bool(slope.flatten(1).any(1).all())


def test_with_one_step_it_is_draft_to_the_bit(make_trainer: MakeTrainer) -> None:
    found = []
    for name in ("draft", "hybrid"):
        trainer = make_trainer({
            **SETTINGS, "algorithm.name": name, "sampler.num_steps": 1, "train.rows_per_update": 4,
            "train.learning_rate": 1e-2,
        })  # fmt: skip
        metrics = [(u.reward, u.metrics["loss"], u.metrics["grad_norm"]) for _ in range(2) for u in trainer.round()]
        found.append((metrics, copies(trainer.ctx.policy.parameters())))
    (first, weights), (second, same) = found
    assert len(first) == 4 and first == second and equal(weights, same)


def test_tied_groups_and_unscored_images_drop_out_of_both_terms(make: MakeTrainer) -> None:
    trainer = make()
    ctx = trainer.ctx
    plain = ctx.score

    def score(latents: Tensor, examples: Any) -> Scores:
        scores = plain(latents, examples)
        values = torch.cat([scores.values[:1].expand(4), scores.values[4:]])
        return Scores(values, torch.arange(8) != 5)

    ctx.score = score  # type: ignore[method-assign]
    collected = collect(trainer)
    (rows,) = updates(trainer, collected)
    assert ctx.take_metrics()["tied_groups"] == 0.5
    kept = {tuple(x.flatten().tolist()) for x in rows.x}
    assert len(rows) == 3 and kept == {tuple(collected.rows.x[i].flatten().tolist()) for i in (4, 6, 7)}


@pytest.mark.parametrize("settings", [{}, TAUGHT])
def test_one_pass_of_all_rows_has_the_gradient_of_several_passes(make: MakeTrainer, settings: dict[str, Any]) -> None:
    trainer = make(settings)
    if settings:
        list(trainer.round())  # a surrogate that has learned
    (rows,) = updates(trainer)
    assert_one_pass_is_several(trainer, rows)


def test_later_updates_of_a_round_compare_with_the_policy_that_sampled(make: MakeTrainer) -> None:
    trainer = make({"algorithm.inner_epochs": 2, "train.learning_rate": 1e-2})
    first, second = trainer.round()
    assert first.metrics["log_ratio_size"] == 0 < second.metrics["log_ratio_size"]
    assert second.metrics["clip_fraction"] > 0
    trainer = make({"train.rows_per_update": 4, "train.learning_rate": 1e-2})
    found = list(trainer.round())
    assert [u.metrics["log_ratio_size"] > 0 for u in found] == [False, True]


def test_the_ratio_is_clipped(make: MakeTrainer) -> None:
    trainer = make({"algorithm.last_weight": 0.0, "algorithm.inner_epochs": 2})
    rows, _ = updates(trainer)
    moved = rows.old_log_prob + torch.tensor([-3e-4, 0.0]) * rows.advantage.sign()[:, None]
    rows = type(rows)(**{**vars(rows), "old_log_prob": moved})
    loss, metrics = trainer.algorithm.loss(rows, trainer.ctx)
    log_ratio = trainer.algorithm.log_prob(rows, trainer.ctx) - moved  # type: ignore[attr-defined]
    expected = clipped(log_ratio, rows.advantage.clamp(-5, 5)[:, None], 1e-4).mean()
    assert number(loss) == pytest.approx(number(expected), abs=1e-6)
    assert number(metrics["clip_fraction"]) == pytest.approx(0.5, abs=0.01)


# with a surrogate


def test_the_surrogate_learns_from_the_best_and_the_worst_of_each_prompt(make: MakeTrainer) -> None:
    trainer = make(TAUGHT)
    collected, method = collect(trainer), trainer.algorithm
    scored = collected.scored
    assert scored.latents.shape[:2] == (2, 4) and scored.step.tolist() == [2, 2]
    assert torch.equal(scored.latents.flatten(0, 1), collected.rows.x_next[:, -1])
    one, other = method.surrogate_updates(collected, trainer.ctx)
    for pairs in (one, other):
        for group in range(2):
            best, worst = scored.rewards[group].argmax(), scored.rewards[group].argmin()
            assert torch.equal(pairs.winner[group], scored.latents[group, best])
            assert torch.equal(pairs.loser[group], scored.latents[group, worst])
        assert pairs.prompt.texts == collected.prompt.texts


def test_the_last_step_follows_the_surrogate_in_units_of_its_own_spread(make: MakeTrainer) -> None:
    trainer = make(TAUGHT)
    list(trainer.round())  # the warm-up
    collected, ctx = collect(trainer), trainer.ctx
    assert ctx.surrogate is not None
    trainer._update_surrogate(collected)
    images = ctx.images
    (rows,) = updates(trainer, collected)
    scores = ctx.surrogate.score(collected.rows.x_next[:, -1], collected.rows.prompt).view(2, 4)
    spread = scores.std(1, correction=0).clamp(min=0.05)
    assert sorted(rows.spread.tolist()) == pytest.approx(sorted(spread.repeat(4).tolist()), rel=1e-4)
    _, metrics = trainer.algorithm.loss(rows, ctx)
    step = ctx.sampler.transition(ctx.policy, rows.x[:, 2], torch.full((8,), 2), rows.prompt)
    expected = -(ctx.surrogate.score(step.clean, rows.prompt) / rows.spread).mean()
    assert number(metrics["last_loss"]) == pytest.approx(number(expected), rel=1e-4)
    assert ctx.images == images  # no image is decoded for the loss
    before = copies(ctx.surrogate.module().parameters())
    for update in trainer._updates(collected):
        trainer._update_policy(update)
    assert equal(before, copies(ctx.surrogate.module().parameters()))


def test_the_fields_decide_what_is_needed_and_a_black_box_takes_a_surrogate(tiny_run: MakeRun) -> None:
    assert Hybrid().needs == {"differentiable_reward"} and Hybrid(gradient_of="surrogate").needs == {"surrogate"}
    black_box = {**SETTINGS, "reward": ["jpeg_compressibility"]}
    with pytest.raises(ConfigError, match=r"^reward: algorithm hybrid follows the gradient of a reward, and jpeg.*\S$"):
        tiny_run(overrides=black_box).check()
    tiny_run(overrides=black_box | TAUGHT).check()


VARIANTS: list[tuple[Hybrid, Sampler, Form]] = [
    (Hybrid(samples=2, gradient_of="surrogate"), LCM(2), "lcm"),
    (Hybrid(samples=2, gradient_of="surrogate"), LCM(1), "lcm"),
    (Hybrid(samples=3, inner_epochs=2), Renoise(2), "turbo"),
    (Hybrid(samples=2), EulerAncestral(3, eta=1.0), "turbo"),
]


@pytest.mark.parametrize(("method", "sampler", "form"), VARIANTS)
def test_every_form_keeps_the_promises_of_an_algorithm(method: Hybrid, sampler: Sampler, form: Form) -> None:
    check_algorithm(method, sampler, form=form)


def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(make: MakeTrainer, tmp_path: Path) -> None:
    metrics = assert_goes_on_from_its_checkpoint(make, TAUGHT | {"surrogate.warmup": 1}, tmp_path)
    assert "surrogate_loss" in metrics[0]


@pytest.mark.parametrize("fields", [{"samples": 0}, {"last_weight": -1.0}, {"clip_range": 0.0}, {"inner_epochs": 0},
                                    {"pairs_per_update": 0}, {"advantage_clip": 0.0}])  # fmt: skip
def test_settings_that_cannot_learn_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Hybrid(**fields)


def test_a_sampler_with_deterministic_steps_before_the_last_and_single_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="found 0 stochastic of 2 steps, expected all but the last"):
        Hybrid().check(DDIM(2, eta=0.0), PolicyFacts())
    with pytest.raises(ConfigError, match=r"algorithm\.samples: found 1, expected 2 or more"):
        Hybrid(samples=1).check(LCM(2), PolicyFacts())
    with pytest.raises(ConfigError, match=r"algorithm\.samples: found 1, expected 2 or more"):
        Hybrid(samples=1, gradient_of="surrogate").check(LCM(1), PolicyFacts())
    Hybrid(samples=1).check(LCM(1), PolicyFacts())
    Hybrid().check(DDIM(2), PolicyFacts())


def test_the_true_reward_rises_on_a_toy_reward(make: MakeTrainer) -> None:
    assert_the_true_reward_rises(make({
        "data.batch_size": 4, "model.lora_rank": 8, "train.updates": 10, "train.rows_per_update": 16,
        "train.rows_per_pass": 16, "train.learning_rate": 1e-2, "sampler.num_steps": 2,
    }))  # fmt: skip
