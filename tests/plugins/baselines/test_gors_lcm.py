"""GORS-LCM: the samples that are kept, and its loss compared with plain distillation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.distillation import Distillation
from alignkit.errors import ConfigError
from alignkit.records import PolicyFacts
from alignkit.testing.algorithm import assert_goes_on_from_its_checkpoint
from alignkit.testing.losses import assert_one_pass_is_several
from alignkit.training.trainer import Trainer
from alignkit_baselines.gors_lcm import Chosen, GorsLCM, best
from alignkit_samplers.ddim import DDIM
from alignkit_samplers.lcm import LCM
from method_checks import (
    collect,
    updates,
    whole_updates,
)

MakeTrainer = Callable[..., Trainer]
GORS: dict[str, Any] = {"algorithm.name": "gors_lcm", "algorithm.samples": 3}
ALONE: dict[str, Any] = {**GORS, "regulariser": []}


def test_the_best_of_each_group_is_kept_and_the_first_of_equal_ones() -> None:
    rewards = torch.tensor([[0.1, 0.9, 0.5], [-3.0, -2.0, -2.0], [-torch.inf] * 3, [0.4, 0.3, -torch.inf]])
    assert best(rewards).tolist() == [1, 4, 9]
    assert best(rewards, threshold=0.4).tolist() == [1, 9]
    assert best(rewards, threshold=0.95).tolist() == []


def test_the_best_samples_of_each_step_are_kept_with_their_own_text(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(GORS)
    seen: list[tuple[torch.Tensor, list[str]]] = []
    ctx, plain = trainer.ctx, trainer.ctx.score
    ctx.score = lambda x, e: seen.append((x, [one.text for one in e])) or plain(x, e)  # type: ignore[method-assign, func-returns-value]
    chosen = collect(trainer)
    assert isinstance(chosen, Chosen) and len(seen) == 2 and len(chosen) == 4 and not chosen.latents.requires_grad
    row = 0
    for latents, texts in seen:
        brightness = ctx.policy.decode(latents).mean((1, 2, 3)).view(2, 3)
        for group in range(2):
            place = group * 3 + int(brightness[group].argmax())
            assert torch.equal(chosen.latents[row], latents[place]) and chosen.prompt.texts[row] == texts[place]
            assert float(chosen.reward[row]) == pytest.approx(float(brightness[group].max()), abs=3e-3)
            row += 1


def test_with_one_sample_and_no_images_it_is_plain_distillation_of_its_own_samples(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer({**ALONE, "algorithm.samples": 1})
    assert trainer.batch().images is None
    collected, ctx = collect(trainer), trainer.ctx
    (rows,) = trainer.algorithm.updates(collected, ctx)
    assert rows.weight.tolist() == [1.0] * len(rows) and ctx.teacher is not None
    own = {tuple(z.flatten().tolist()) for z in collected.latents}
    assert {tuple(z.flatten().tolist()) for z in rows.noised.latents} == own
    plain = Distillation().loss(ctx.policy, ctx.teacher, rows.noised).mean()
    expected = torch.autograd.grad(plain, ctx.policy.parameters())
    loss, _ = trainer.algorithm.loss(rows, ctx)
    found = torch.autograd.grad(loss, ctx.policy.parameters())
    assert torch.equal(loss, 2 * plain)  # one term for each of the two steps
    assert all(torch.allclose(a, 2 * b, rtol=1e-5) for a, b in zip(found, expected, strict=True))


def test_a_reward_of_one_weighs_as_none_and_one_below_zero_never_turns_the_loss_round(
    make_trainer: MakeTrainer,
) -> None:
    found = {}
    for weight, reward in (("none", 1.0), ("reward", 1.0), ("reward", -2.0)):
        trainer = make_trainer({**ALONE, "algorithm.weight": weight})
        collected = collect(trainer)
        collected.reward.fill_(reward)
        (rows,) = trainer.algorithm.updates(collected, trainer.ctx)
        found[weight, reward] = trainer.algorithm.loss(rows, trainer.ctx)[0].item()
    assert found["none", 1.0] == found["reward", 1.0] > 0 and found["reward", -2.0] == 0


def test_one_pass_of_all_rows_has_the_gradient_of_several_passes_and_the_kept_latents_get_none(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer({**GORS, "algorithm.weight": "reward", "train.rows_per_update": 6})
    (rows,) = updates(trainer)
    assert len(rows) == 6 and rows.noised is not None and not rows.noised.latents.requires_grad
    assert_one_pass_is_several(trainer, rows)


def test_the_distillation_on_images_is_a_regulariser_that_it_has_by_default(make_trainer: MakeTrainer) -> None:
    assert GorsLCM.default_regularisers == {"lcd": 1.0}
    trainer = make_trainer({**GORS, "train.rows_per_update": 6, "regulariser.lcd.weight": 3.0})
    (rows,) = whole_updates(trainer)
    (captioned,) = rows.others
    assert captioned is not None and len(captioned) == len(rows) == 6
    loss, metrics = trainer.loss(rows)
    assert loss.item() == pytest.approx((metrics["kept_loss"] + 3 * metrics["distillation_loss"]).item(), rel=1e-5)
    assert metrics["kept_loss"].item() > 0 < metrics["distillation_loss"].item()
    assert_one_pass_is_several(trainer, rows)


def test_at_one_step_it_keeps_the_best_of_the_only_predictions(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({**GORS, "sampler.num_steps": 1, "evaluate.steps": [1]})
    assert len(collect(trainer)) == 2
    (update,) = trainer.round()
    assert update.metrics["grad_norm"] > 0


def test_a_round_in_which_nothing_is_kept_trains_on_images_alone_or_not_at_all(make_trainer: MakeTrainer) -> None:
    for settings in (GORS, ALONE):
        trainer = make_trainer({**settings, "algorithm.threshold": 2.0})
        before = [p.detach().clone() for p in trainer.ctx.policy.parameters()]
        (update,) = trainer.round()
        assert "kept_loss" not in update.metrics and trainer.ctx.warnings
        assert ("distillation_loss" in update.metrics) == (settings is GORS)
        after = trainer.ctx.policy.parameters()
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) == (settings is ALONE)


def test_what_it_cannot_distil_is_refused() -> None:
    assert GorsLCM().needs == {"teacher"}
    GorsLCM().check(LCM(2), PolicyFacts())
    with pytest.raises(ConfigError, match="SD-Turbo"):
        GorsLCM().check(DDIM(), PolicyFacts())
    for fields in ({"samples": 0}, {"ode_steps": 0}):
        with pytest.raises(ValueError, match=r"expected|ode_steps"):
            GorsLCM(**fields)


def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    assert_goes_on_from_its_checkpoint(make_trainer, GORS, tmp_path)
