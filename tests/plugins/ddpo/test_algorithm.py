"""DDPO: golden values of its loss, which steps it learns from, that its ratios start at one, and that it learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from alignkit import diffusion
from alignkit.advantage import clipped
from alignkit.errors import AlignkitError, ConfigError
from alignkit.records import PolicyFacts, Prompt, Scores
from alignkit.runs.run import Run
from alignkit.testing import check_algorithm
from alignkit.testing.algorithm import assert_goes_on_from_its_checkpoint
from alignkit.testing.losses import assert_one_pass_is_several
from alignkit.training.trainer import Trainer
from alignkit_ddpo.algorithm import DDPO, Steps
from alignkit_samplers.ddim import DDIM
from alignkit_samplers.lcm import LCM
from method_checks import (
    assert_the_true_reward_rises,
    collect,
    gradient,
    number,
    updates,
    whole_updates,
)

MakeTrainer = Callable[..., Trainer]
SETTINGS = {"algorithm.name": "ddpo", "algorithm.samples": 2, "sampler.num_steps": 3}


@pytest.fixture
def make(make_trainer: MakeTrainer) -> MakeTrainer:
    """A trainer of DDPO on the consistency model, or with `ddim=True` on its teacher."""
    return lambda overrides=None, ddim=False: make_trainer(SETTINGS | (overrides or {}), ddim)


def test_the_clipped_loss_and_its_gradient_are_golden() -> None:
    log_ratio = torch.tensor([0, 3e-4, -3e-4, 3e-4, 0], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([2, 2, -1, -1, 7], dtype=torch.float64).clamp(-5, 5)
    loss = clipped(log_ratio, advantage, 1e-4)
    assert loss.tolist() == pytest.approx([-2, -2.0002, 0.9999, 1.000300045, -5], abs=1e-9)
    assert number(loss.mean()) == pytest.approx(-1.39999999, abs=1e-8)
    loss.sum().backward()
    assert log_ratio.grad is not None
    assert log_ratio.grad.tolist() == pytest.approx([-2, 0, 0, 1.000300045, -5], abs=1e-9)


@pytest.mark.parametrize(("num_steps", "amplified", "golden"), [(2, 9.06, -34.55360635), (4, 3.43, None)])
def test_at_a_consistency_step_the_gradient_has_its_closed_form(
    num_steps: int, amplified: float, golden: float | None
) -> None:
    """999 to 499, or to 759: an error of the predicted noise is amplified, in units of the step's own noise."""
    levels = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square().neg().add(1).cumprod(0)
    eps = torch.tensor([[[[0.2, 0.3]]]], dtype=torch.float64, requires_grad=True)
    x, x_next = torch.tensor([[[[0.5, -1.0]]]]).double(), torch.tensor([[[[0.1, -0.4]]]]).double()

    def schedule(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return levels[t].sqrt(), (1 - levels[t]).sqrt()

    def denoise(x: torch.Tensor, t: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        c_skip, c_out = (c.double().view(-1, 1, 1, 1) for c in diffusion.boundary_scalings(t))
        return c_skip * x + c_out * diffusion.to_clean("epsilon", eps, x, *schedule(t))

    policy = SimpleNamespace(times=lambda: torch.arange(1000), schedule=schedule, denoise=denoise)
    ctx: Any = SimpleNamespace(policy=policy, sampler=LCM(num_steps))
    prompt = Prompt(torch.zeros(1, 1, 1), torch.zeros(1, dtype=torch.long))
    rows = Steps(x, x_next, torch.zeros(1, dtype=torch.long), prompt, torch.ones(1))
    step, log_prob = DDPO().transition(rows, ctx), DDPO().log_prob(rows, ctx)
    assert golden is None or log_prob.tolist() == pytest.approx([golden], rel=1e-6)
    (found,) = torch.autograd.grad(log_prob.sum(), eps)
    noise = (x_next - step.mean.detach()) / step.std.view(-1, 1, 1, 1)
    assert torch.allclose(found.double(), -amplified * noise / 2, rtol=2e-3)


@pytest.mark.parametrize("ddim", [False, True])
def test_before_the_first_update_every_ratio_is_one_and_the_loss_the_mean_advantage(
    make: MakeTrainer, ddim: bool
) -> None:
    trainer = make({"train.rows_per_update": 3, "algorithm.advantage_clip": 1.0}, ddim)
    for rows in updates(trainer):
        loss, metrics = trainer.algorithm.loss(rows, trainer.ctx)
        assert number(metrics["log_ratio_size"]) == 0 == number(metrics["clip_fraction"])
        assert number(loss) == pytest.approx(-float(rows.advantage.clamp(-1, 1).mean()), abs=1e-6)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_however_few_rows_go_through_the_network_at_once_the_first_ratios_are_one(
    make: MakeTrainer, precision: str
) -> None:
    trainer = make({"train.rows_per_update": 8, "train.rows_per_pass": 3, "train.precision": precision})
    (update,) = trainer.round()
    assert update.metrics["log_ratio_size"] == 0 < update.metrics["grad_norm"]


def test_in_mixed_precision_the_ratios_start_at_one_as_well(make: MakeTrainer) -> None:
    trainer = make({"train.precision": "bf16", "train.rows_per_update": 8})
    (rows,) = updates(trainer)
    method, ctx = trainer.algorithm, trainer.ctx
    assert isinstance(method, DDPO) and rows.old_log_prob is not None and rows.old_log_prob.dtype == torch.float32
    with trainer.accelerator.autocast():
        assert number(method.loss(rows, ctx)[1]["log_ratio_size"]) == 0
    assert not torch.equal(method.log_prob(rows, ctx), rows.old_log_prob)  # in float32 it is another number


def test_at_the_first_update_the_gradient_is_that_of_the_weighted_log_likelihood(make: MakeTrainer) -> None:
    trainer = make({"train.rows_per_update": 8})
    (rows,) = updates(trainer)
    method = trainer.algorithm
    assert isinstance(method, DDPO)
    found = gradient(trainer, method.loss(rows, trainer.ctx)[0])
    expected = gradient(trainer, -(rows.advantage * method.log_prob(rows, trainer.ctx)).mean())
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert float(found.abs().max()) > 0


def test_every_stochastic_step_is_a_row_and_the_deterministic_last_one_is_none(make: MakeTrainer) -> None:
    assert sorted(collect(make()).k.tolist()) == [0] * 4 + [1] * 4
    assert sorted(collect(make({"sampler.num_steps": 2})).k.tolist()) == [0] * 4
    assert sorted(collect(make(ddim=True)).k.tolist()) == [0] * 4 + [1] * 4 + [2] * 4


def test_the_advantage_of_a_step_is_that_of_the_image_it_led_to(make: MakeTrainer) -> None:
    trainer = make({"sampler.num_steps": 2, "algorithm.baseline": "batch"})
    steps, ctx = collect(trainer), trainer.ctx
    with torch.no_grad():
        last = ctx.sampler.transition(ctx.policy, steps.x_next, steps.k + 1, steps.prompt)
        brightness = ctx.policy.decode(last.clean).mean((1, 2, 3))
    expected = (brightness - brightness.mean()) / brightness.std(correction=0)
    assert torch.allclose(steps.advantage, expected, atol=0.1)  # the reward saw 8 bits a pixel
    assert steps.prompt.index.tolist() == [0, 0, 1, 1]


def test_a_prompt_is_normalised_by_its_own_rewards_once_it_has_enough(make: MakeTrainer) -> None:
    trainer = make({"algorithm.min_count": 2, "sampler.num_steps": 2})
    advantage = collect(trainer).advantage
    assert advantage.view(2, 2).mean(1).tolist() == pytest.approx([0, 0], abs=1e-5)
    assert trainer.ctx.take_metrics()["own_statistics"] == 1


def test_within_groups_the_advantages_are_of_the_round_alone_and_tied_prompts_are_left_out(make: MakeTrainer) -> None:
    trainer = make({"algorithm.baseline": "group", "algorithm.samples": 4})
    ctx, seen = trainer.ctx, list[Scores]()
    plain = ctx.score

    def first_prompt_tied(latents: Any, examples: Any) -> Scores:
        scores = plain(latents, examples)
        seen.append(Scores(torch.cat([scores.values[:1].expand(4), scores.values[4:]]), scores.valid))
        return seen[-1]

    ctx.score = first_prompt_tied  # type: ignore[method-assign]
    steps = collect(trainer)
    rewards = seen[0].values[4:].double()
    expected = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-4)
    assert len(steps) == 4 * 2 and set(steps.prompt.index.tolist()) == {1}
    assert torch.allclose(steps.advantage.view(4, 2), expected.float()[:, None], atol=1e-5)
    assert ctx.take_metrics()["tied_groups"] == 0.5


def test_a_last_step_that_is_noised_again_is_one_more_action_which_replays(make: MakeTrainer) -> None:
    trainer = make({"algorithm.final_step": "renoise", "train.rows_per_update": 12})
    collected, ctx = collect(trainer), trainer.ctx
    assert sorted(collected.k.tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    (rows,) = updates(trainer, collected)
    assert number(trainer.algorithm.loss(rows, ctx)[1]["log_ratio_size"]) == 0
    last = rows.select((rows.k == 2).nonzero()[:, 0])
    with torch.no_grad():
        clean = ctx.sampler.transition(ctx.policy, last.x, last.k, last.prompt).clean
    alpha, sigma = ctx.policy.schedule(torch.tensor(339))
    noise = ((last.x_next - alpha * clean) / sigma).flatten()
    assert float(noise.mean()) == pytest.approx(0, abs=0.15) and float(noise.std()) == pytest.approx(1, abs=0.1)


def test_the_renoised_last_step_changes_no_image_and_no_other_row(make: MakeTrainer) -> None:
    dropped, renoised = (
        collect(make({"algorithm.baseline": "batch", "algorithm.final_step": final})) for final in ("drop", "renoise")
    )
    others = renoised.select((renoised.k < 2).nonzero()[:, 0])
    assert sorted(others.advantage.tolist()) == sorted(dropped.advantage.tolist())
    assert {tuple(x.flatten().tolist()) for x in others.x_next} == {tuple(x.flatten().tolist()) for x in dropped.x_next}


@pytest.mark.parametrize("sampler", [DDIM(3), DDIM(3, eta=0.0)])
def test_only_a_sampler_whose_last_step_alone_is_deterministic_can_be_noised_again(sampler: DDIM) -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.final_step: found \"renoise\""):
        DDPO(final_step="renoise").check(sampler, PolicyFacts())
    DDPO(final_step="renoise").check(LCM(2), PolicyFacts())
    DDPO().check(sampler, PolicyFacts())


@pytest.mark.parametrize(
    "sampler",
    [
        {"sampler.num_steps": 1},
        {"sampler.num_steps": 1, "algorithm.final_step": "renoise"},
        {"sampler.name": "ddim", "sampler.eta": 0.0},
    ],
)
def test_without_a_stochastic_step_a_run_is_refused_before_weights_load(
    tiny_run: Callable[..., Run], sampler: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"every step of (lcm|ddim) is deterministic .* algorithm ddpo"):
        tiny_run(overrides=SETTINGS | sampler).check()


def test_inner_epochs_go_over_the_same_steps_in_parts_of_about_the_same_size(make: MakeTrainer) -> None:
    trainer = make({"algorithm.inner_epochs": 2, "train.rows_per_update": 3})
    found = updates(trainer)
    assert [len(p) for p in found] == [3, 3, 2] * 2
    rows = [[tuple(x.flatten().tolist()) for part in half for x in part.x_next] for half in (found[:3], found[3:])]
    assert set(rows[0]) == set(rows[1]) and len(set(rows[0])) == 8 and rows[0] != rows[1]
    old = [{float(v) for p in half for v in p.old_log_prob} for half in (found[:3], found[3:])]  # type: ignore[union-attr]
    assert old[0] == old[1]


def test_after_an_update_the_ratios_of_the_next_are_no_longer_one(make: MakeTrainer) -> None:
    trainer = make({"algorithm.inner_epochs": 2, "train.rows_per_update": 8, "train.learning_rate": 1e-2})
    first, second = trainer.round()
    assert first.metrics["log_ratio_size"] == 0 < second.metrics["log_ratio_size"]
    assert second.metrics["clip_fraction"] > 0


def test_a_share_of_the_steps_is_chosen_anew_for_each_trajectory(make: MakeTrainer) -> None:
    settings = {"algorithm.step_fraction": 0.5, "algorithm.samples": 8, "sampler.num_steps": 5}
    steps = collect(make(settings))
    assert len(steps) == 16 * 2
    chosen = [tuple(sorted(pair)) for pair in steps.k.view(16, 2).tolist()]
    assert all(a != b for a, b in chosen) and len(set(chosen)) > 1
    assert len(collect(make(settings | {"algorithm.step_fraction": 0.01}))) == 16


def test_one_pass_of_all_rows_has_the_gradient_of_several_passes(make: MakeTrainer) -> None:
    trainer = make({"train.rows_per_update": 8})
    (rows,) = updates(trainer)
    assert_one_pass_is_several(trainer, rows)


def test_the_sum_over_latent_dimensions_is_an_option(make: MakeTrainer) -> None:
    trainer = make()
    steps, ctx = collect(trainer), trainer.ctx
    with torch.no_grad():
        mean, total = (DDPO(reduction=r).log_prob(steps, ctx) for r in ("mean", "sum"))
    assert torch.allclose(total, 256 * mean, rtol=1e-5)


def test_a_constant_reward_moves_nothing_and_what_cannot_be_scored_is_left_out(
    make: MakeTrainer, odd_rewards: None
) -> None:
    trainer = make({"reward": ["constant"], "train.rows_per_update": 8})
    (rows,) = updates(trainer)
    assert rows.advantage.tolist() == [0] * 8
    assert float(gradient(trainer, trainer.algorithm.loss(rows, trainer.ctx)[0]).abs().max()) == 0
    steps = collect(make({"reward": ["every_second"], "algorithm.baseline": "batch"}))
    assert len(steps) == 4 and steps.prompt.index.tolist() == [0, 0, 1, 1]
    assert steps.advantage.abs().tolist() == pytest.approx([1] * 4, abs=1e-4)  # of two
    nothing = make({"reward": ["unscored"]})
    message = r"10 rounds in a row gave algorithm ddpo nothing to learn from: no image could be scored \(unscored: "
    with pytest.raises(AlignkitError, match=message):
        for _ in range(10):
            assert list(nothing.round()) == []


def test_distillation_next_to_the_policy_gradient_is_an_option(make: MakeTrainer) -> None:
    assert DDPO().needs == {"stochastic_steps"}
    for without in ({}, {"regulariser": [{"name": "lcd", "weight": 0.0}]}):
        plain = make(without)
        assert plain.ctx.teacher is None and plain.batch().images is None
    trainer = make({"regulariser": [{"name": "lcd", "weight": 2.0}], "train.rows_per_update": 8})
    assert trainer.ctx.teacher is not None
    (rows,) = whole_updates(trainer)
    (noised,) = rows.others
    assert noised is not None and len(noised) == len(rows) == 8
    loss, metrics = trainer.loss(rows)
    assert number(loss) == pytest.approx(number(metrics["policy_loss"] + 2 * metrics["distillation_loss"]), rel=1e-5)
    assert number(metrics["distillation_loss"]) > 0
    assert_one_pass_is_several(trainer, rows)


@pytest.mark.parametrize("baseline", ["prompt", "batch", "group"])
def test_with_each_baseline_it_keeps_the_promises_of_an_algorithm(
    baseline: Literal["prompt", "batch", "group"],
) -> None:
    check_algorithm(DDPO(samples=2, baseline=baseline, min_count=2))


def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(make: MakeTrainer, tmp_path: Path) -> None:
    settings = {"algorithm.min_count": 3, "algorithm.buffer_size": 4}
    assert assert_goes_on_from_its_checkpoint(make, settings, tmp_path)[0]["own_statistics"] > 0


@pytest.mark.parametrize(
    "fields",
    [{"samples": 0}, {"inner_epochs": 0}, {"clip_range": 0.0}, {"advantage_clip": 0.0}, {"step_fraction": 0.0},
     {"step_fraction": 1.5}, {"buffer_size": 8, "min_count": 9}, {"min_count": 0}, {"samples": 1, "baseline": "group"}],
)  # fmt: skip
def test_settings_that_cannot_learn_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        DDPO(**fields)


def test_the_true_reward_rises_on_a_toy_reward(make: MakeTrainer) -> None:
    assert_the_true_reward_rises(make({
        "algorithm.samples": 8, "data.batch_size": 4, "sampler.num_steps": 4, "model.lora_rank": 8,
        "train.updates": 8, "train.rows_per_update": 96, "train.rows_per_pass": 96, "train.learning_rate": 4e-2,
    }))  # fmt: skip
