"""Diffusion-DPO: golden values, its reference, its gradient, and that it learns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.records import Batch, PolicyFacts, PreferencePairs
from alignkit.training.trainer import Trainer
from alignkit_preference.diffusion_dpo import DiffusionDPO, preference_loss
from alignkit_preference.noised import NoisedPairs, errors
from alignkit_samplers.ddim import DDIM
from alignkit_samplers.euler_ancestral import EulerAncestral
from alignkit_samplers.lcm import LCM

MakeTrainer = Callable[..., Trainer]


def update_rows(trainer: Trainer) -> NoisedPairs:
    with torch.no_grad():
        (rows,) = trainer.algorithm.updates(trainer.algorithm.collect(trainer.batch(), trainer.ctx), trainer.ctx)
    assert isinstance(rows, NoisedPairs)
    return rows


def test_the_loss_is_golden_and_the_swapped_pair_mirrors_it() -> None:
    now = torch.tensor([[0.1100, 0.1152]], dtype=torch.float64, requires_grad=True)
    before = torch.tensor([[0.11, 0.115]], dtype=torch.float64)
    loss = preference_loss(now, before, 5000.0)
    assert loss.item() == pytest.approx(0.47407698, rel=1e-6)  # h = .5
    assert preference_loss(now.flip(1), before.flip(1), 5000.0).item() == pytest.approx(math.log1p(math.exp(0.5)))
    # diffusers' script writes it without the half
    assert loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-2500 * 0.0002))), rel=1e-6)


def test_before_training_the_loss_is_ln_2_and_its_gradient_a_quarter_of_beta() -> None:
    now = torch.tensor([[0.3, 0.2]], requires_grad=True)
    loss = preference_loss(now, now.detach(), 5000.0).sum()
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert now.grad is not None and now.grad.tolist() == [[1250.0, -1250.0]]


def test_the_mean_is_over_losses_and_not_over_what_stands_in_the_sigmoid() -> None:
    now, before = torch.tensor([[0.1, 0.2], [0.2, 0.1]]), torch.zeros(2, 2)
    expected = -sum(math.log(1 / (1 + math.exp(-h))) for h in (1.0, -1.0)) / 2
    assert preference_loss(now, before, 20.0).mean().item() == pytest.approx(expected)
    assert expected > math.log(2)


SETTINGS: list[dict[str, Any]] = [
    {}, {"model.lora_rank": 0}, {"train.precision": "bf16"}, {"sampler.num_steps": 1},
    {"algorithm.space": "clean"}, {"algorithm.zero_terminal_snr": True},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS)
def test_before_training_the_model_is_its_own_reference(make: MakeTrainer, settings: dict[str, Any]) -> None:
    trainer = make("diffusion_dpo", settings)
    rows = update_rows(trainer)
    with trainer.accelerator.autocast():
        loss, metrics = trainer.algorithm.loss(rows, trainer.ctx)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-3)
    assert metrics["implicit_accuracy"].item() == 0.5  # neither side is preferred
    assert metrics["margin"].abs().item() < 1e-6 and metrics["winner_error_change"].abs().item() < 1e-6
    loss.backward()
    grads = [p.grad for p in trainer.ctx.policy.parameters() if p.grad is not None]
    assert any(bool((grad != 0).any()) for grad in grads)


@pytest.mark.parametrize("settings", [{}, {"model.lora_rank": 0}, {"train.precision": "bf16"}])
def test_the_reference_stays_what_it_was_when_the_model_moves(make: MakeTrainer, settings: dict[str, Any]) -> None:
    trainer = make("diffusion_dpo", settings)
    rows, policy = update_rows(trainer), trainer.ctx.policy

    def found() -> torch.Tensor:
        with torch.no_grad(), trainer.accelerator.autocast():
            return errors(rows, policy)

    before = found()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02)
    now = found()
    with policy.reference():
        assert torch.allclose(found(), before, rtol=1e-5)
    assert float((now - before).abs().max()) > 1e-4
    assert all(parameter.requires_grad for parameter in policy.parameters())  # switched on again


def test_nothing_but_the_adapter_gets_a_gradient_or_moves(make: MakeTrainer) -> None:
    trainer = make("diffusion_dpo", {"train.learning_rate": 1e-3})
    pipe = trainer.ctx.policy.pipe  # type: ignore[attr-defined]
    trained = set(trainer.ctx.policy.weights())
    parts = {"unet": pipe.unet, "vae": pipe.vae, "text": pipe.text_encoder}

    def state() -> dict[str, torch.Tensor]:
        return {f"{part}/{n}": p.detach().clone() for part, m in parts.items() for n, p in m.named_parameters()}

    before = state()
    loss, _ = trainer.algorithm.loss(update_rows(trainer), trainer.ctx)
    loss.backward()
    with_gradient = {n for part, m in parts.items() for n, p in m.named_parameters() if p.grad is not None}
    assert with_gradient and with_gradient <= trained
    trainer.optimizer.zero_grad()
    list(trainer.round())
    moved = {name.partition("/")[2] for name, value in state().items() if not torch.equal(value, before[name])}
    assert moved and moved <= trained


def test_one_pass_of_all_rows_has_the_gradient_of_several_passes(make: MakeTrainer) -> None:
    trainer = make("diffusion_dpo", {"algorithm.beta": 50.0})
    rows = update_rows(trainer)
    with torch.no_grad():
        for parameter in trainer.ctx.policy.parameters():
            parameter.add_(0.01)  # so that the losses of the pairs differ
    found = []
    for size in (8, 3, 1):
        trainer.config = replace(trainer.config, train=replace(trainer.config.train, rows_per_pass=size))
        means = trainer._backward(rows, lambda part: trainer.algorithm.loss(part, trainer.ctx))
        found.append((means["loss"], [p.grad.clone() for p in trainer.ctx.policy.parameters() if p.grad is not None]))
        trainer.optimizer.zero_grad()
    for loss, grads in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-5)
        largest = max(float(g.abs().max()) for g in found[0][1])
        assert largest > 0
        assert all(torch.allclose(a, b, atol=2e-3 * largest) for a, b in zip(grads, found[0][1], strict=True))


def test_it_learns_at_the_times_that_the_model_was_made_for(make: MakeTrainer) -> None:
    trainer = make("diffusion_dpo")
    ctx = trainer.ctx

    def times(sampler: Any, **fields: Any) -> list[int]:
        ctx.sampler = sampler
        return sorted(DiffusionDPO(**fields).times(ctx).tolist())

    assert times(DDIM(25)) == list(range(1000))
    for turbo in (EulerAncestral(2), DDIM(1)):
        assert times(turbo, grid_steps=4) == [249, 499, 749, 999]
    assert times(LCM(2)) == list(range(19, 1000, 20))
    assert times(LCM(2), grid_steps=2) == [499, 999]
    with pytest.raises(ConfigError, match=r"algorithm\.grid_steps: .*num_steps: found 51, expected 1 to"):
        DiffusionDPO(grid_steps=51).check(LCM(2), PolicyFacts())


def test_texts_are_left_out_where_guidance_takes_a_pass_without(make: MakeTrainer) -> None:
    def share(trainer: Trainer) -> float:
        assert isinstance(trainer.algorithm, DiffusionDPO)
        trainer.ctx.policy.encode_images = lambda images: images  # type: ignore[method-assign]
        many = PreferencePairs(torch.zeros(300, 1, 1, 1), torch.zeros(300, 1, 1, 1), ["a"] * 300)
        texts = trainer.algorithm.collect(replace(trainer.batch(), pairs=[many]), trainer.ctx).prompt.texts
        return texts.count("") / 300

    assert share(make("diffusion_dpo", {"model.guidance_scale": 8.0})) == 0  # embedded
    assert share(make("diffusion_dpo", {"model.guidance_scale": 1.0}, ddim=True)) == 0
    assert 0.1 < share(make("diffusion_dpo", {"model.guidance_scale": 5.0}, ddim=True)) < 0.3
    assert share(make("diffusion_dpo", {"model.guidance_scale": 5.0, "algorithm.empty_prompts": 0.0}, ddim=True)) == 0


@pytest.mark.parametrize(
    ("method", "settings", "mirrored"),
    [
        ("diffusion_dpo", {}, True),
        ("diffusion_dpo", {"algorithm.flip": False}, False),
        ("pso", {"algorithm.mode": "offline"}, False),
    ],
)
def test_images_are_mirrored_by_diffusion_dpo_unless_it_is_switched_off(
    make: MakeTrainer, method: str, settings: dict[str, Any], mirrored: bool
) -> None:
    trainer = make(method, settings)
    trainer.ctx.policy.encode_images = lambda images: images  # type: ignore[method-assign]
    ramp = torch.linspace(0, 1, 4).expand(40, 3, 4, 4)
    batch = Batch([], pairs=[PreferencePairs(ramp, ramp, ["a"] * 40)])
    pairs = trainer.algorithm.collect(batch, trainer.ctx)
    for member in (pairs.winner, pairs.loser):
        assert (10 < int((member[:, 0, 0, 0] == 1).sum()) < 30) == mirrored
        assert torch.equal(member, ramp) == (not mirrored)
    assert pairs.prompt.texts.count("") == 0


@pytest.mark.parametrize(
    "fields",
    [{"beta": 0.0}, {"grid_steps": -1}, {"empty_prompts": 1.5}, {"zero_terminal_snr": True, "space": "velocity"}],
)
def test_settings_that_cannot_learn_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        DiffusionDPO(**fields)


def test_pure_noise_alone_has_no_gradient_and_is_refused(make: MakeTrainer) -> None:
    fields = {"algorithm.grid_steps": 1, "algorithm.zero_terminal_snr": True}
    with pytest.raises(ConfigError, match=r"^algorithm\.grid_steps: found 1, expected more: at the only time"):
        make("diffusion_dpo", fields)
    # Of two times the last one is pure noise, which has no part in the gradient.
    trainer = make("diffusion_dpo", {**fields, "algorithm.grid_steps": 2})
    rows = update_rows(trainer)
    for time, learns in ((499, True), (999, False)):
        loss, _ = trainer.algorithm.loss(replace(rows, t=torch.full_like(rows.t, time)), trainer.ctx)
        grads = torch.autograd.grad(loss, trainer.ctx.policy.parameters(), allow_unused=True)
        largest = max(float(g.abs().max()) for g in grads if g is not None)
        assert (largest > 1e-3) == learns


@pytest.mark.parametrize("ddim", [False, True])
def test_the_preferred_side_becomes_more_likely_than_the_other(make: MakeTrainer, seen: Any, ddim: bool) -> None:
    trainer = make("diffusion_dpo", {
        "algorithm.beta": 20.0, "algorithm.flip": False, "model.lora_rank": 8, "train.updates": 25,
        "train.learning_rate": 1e-2,
    }, ddim)  # fmt: skip
    trainer.ctx.policy.encode_images = seen  # type: ignore[method-assign]
    fresh = update_rows(trainer)  # noise that no update sees
    while not trainer.finished:
        list(trainer.round())
    with torch.no_grad():
        loss, metrics = trainer.algorithm.loss(fresh, trainer.ctx)
    assert loss.item() < math.log(2) - 0.1 and metrics["implicit_accuracy"].item() >= 0.75
    assert metrics["winner_error_change"].item() < 0 < metrics["loser_error_change"].item()
