"""What LaSRO may add so that the surrogate's gradient leads somewhere: each does what it says and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from alignkit.diffusion import add_noise
from alignkit.errors import ConfigError
from alignkit.interfaces import Context
from alignkit.records import Transition
from alignkit.training.trainer import Trainer
from alignkit_lasro.algorithm import LaSRO
from method_checks import collect, updates

MakeTrainer = Callable[..., Trainer]


def opinionated(ctx: Context) -> None:
    """The surrogate's head, which starts at zero, gets weights, so that scores differ."""
    with torch.no_grad():
        ctx.surrogate.module().head[-1].weight.normal_(generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr, index, operator]


def test_negatives_are_samples_of_other_prompts_scored_under_the_prompt_of_their_group(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer({"algorithm.samples": 3, "algorithm.negatives": 2, "data.batch_size": 4})
    collected = collect(trainer)
    kept, texts = trainer.algorithm._memory.rounds[-1]
    assert kept.latents.shape[:2] == (2 * 4, 3 + 2) and texts == collected.texts
    own = kept.latents[:, :3]
    for group in range(len(kept)):
        for column in (3, 4):
            source = (own == kept.latents[group, column]).flatten(2).all(2).nonzero()[:, 0].tolist()
            assert source and group not in source
            assert all(kept.step[i] == kept.step[group] for i in source)
    examples = [e for i in kept.text.tolist() for e in [next(p for p in trainer._examples if p.text == texts[i])] * 2]
    again = trainer.ctx.score(kept.latents[:, 3:].flatten(0, 1), examples, log=False).values.view(-1, 2)
    assert torch.allclose(again, kept.rewards[:, 3:])


def test_negatives_are_left_out_of_the_reward_that_is_shown(make_trainer: MakeTrainer) -> None:
    shown = []
    for negatives in (0, 1):
        trainer = make_trainer({"algorithm.negatives": negatives, "data.batch_size": 2})
        collect(trainer)
        shown.append(trainer.ctx.take_metrics()["reward"])  # type: ignore[attr-defined]
    assert shown[0] == shown[1]


def test_more_negatives_than_other_prompts_are_refused(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({"algorithm.negatives": 2, "data.batch_size": 2})
    with pytest.raises(ConfigError, match=r"algorithm\.negatives: found 2, expected less than data\.batch_size"):
        collect(trainer)


def test_a_prompt_that_comes_twice_in_a_round_is_no_negative_of_itself(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({"algorithm.samples": 3, "algorithm.negatives": 1, "data.batch_size": 4})
    batch = trainer.batch()
    a, b = batch.examples[0], next(e for e in batch.examples if e.text != batch.examples[0].text)
    places = trainer.algorithm._sampling._negatives(1, replace(batch, examples=[a, a, b, a]), trainer.ctx)  # type: ignore[attr-defined]
    assert (places[0, :, 0] // 3).tolist() == [2, 2, 3, 2]


def test_correlated_noises_are_unit_normal_and_share_what_they_should(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    method = LaSRO(samples=4, noise_correlation=0.7)
    noise = method._sampling.noise(300, trainer.ctx).view(300, 4, -1)
    assert float(noise.mean()) == pytest.approx(0, abs=0.02) and float(noise.std()) == pytest.approx(1, abs=0.02)
    assert float((noise[:, 0] * noise[:, 1]).mean()) == pytest.approx(0.7, abs=0.03)
    assert float((noise[:-1, 0] * noise[1:, 0]).mean()) == pytest.approx(0, abs=0.03)


def test_the_surrogate_scores_what_the_teacher_makes_of_the_noised_prediction(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({"algorithm.purify": 400, "algorithm.distillation_weight": 0.0})
    ctx = trainer.ctx
    assert ctx.teacher is not None and ctx.surrogate is not None
    opinionated(ctx)
    (rows,) = updates(trainer)
    states, t = rows.states, torch.full((len(rows),), 400)
    with torch.no_grad():
        noised = add_noise(states.clean, rows.noise[:, 0], *ctx.teacher.schedule(t))
        expected = ctx.surrogate.score(ctx.teacher.denoise(noised, t, states.prompt), states.prompt)
        found = trainer.algorithm._critic.scores(states.clean, rows, ctx)
        assert torch.equal(found, expected)
        assert not torch.allclose(found, ctx.surrogate.score(states.clean, states.prompt))
    loss, _ = trainer.algorithm.loss(rows, ctx)
    loss.backward()
    assert all(p.grad is None for p in ctx.teacher.unet.parameters())  # type: ignore[attr-defined]


def test_what_scores_alike_under_every_prompt_cancels_in_the_contrast(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({"algorithm.contrast": 1.0, "algorithm.distillation_weight": 0.0, "data.batch_size": 3})
    ctx, method = trainer.ctx, trainer.algorithm
    assert ctx.surrogate is not None
    opinionated(ctx)
    (rows,) = updates(trainer)
    assert bool((rows.other.index != rows.states.prompt.index).all())
    with torch.no_grad():
        plain = ctx.surrogate.score
        expected = plain(rows.states.clean, rows.states.prompt) - plain(rows.states.clean, rows.other)
        assert torch.equal(method._critic.scores(rows.states.clean, rows, ctx), expected)
        ctx.surrogate.score = lambda x, p: plain(x, p) + 7 * x.flatten(1).mean(1)  # type: ignore[method-assign]
        assert torch.allclose(method._critic.scores(rows.states.clean, rows, ctx), expected, atol=1e-4)


def test_a_contrast_without_another_prompt_is_refused(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({"algorithm.contrast": 1.0, "data.batch_size": 1})
    with pytest.raises(
        ConfigError, match=r"algorithm\.contrast: found one text in the batch, .*raise data\.batch_size"
    ):
        collect(trainer)
    with pytest.raises(ConfigError, match="train on more prompts"):
        trainer.algorithm._contrastable(["a red circle"] * 3)  # type: ignore[attr-defined]


def test_the_score_is_the_mean_over_draws(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({"algorithm.gradient_samples": 3, "algorithm.smoothing": 0.5})
    ctx, method = trainer.ctx, trainer.algorithm
    opinionated(ctx)
    (rows,) = updates(trainer)
    assert rows.blur.shape == rows.noise.shape == (len(rows), 3, *ctx.policy.latent_shape)
    with torch.no_grad():
        each = [
            method._critic.scores(
                rows.states.clean, replace(rows, blur=rows.blur[:, [i]], noise=rows.noise[:, [i]]), ctx
            )
            for i in range(3)
        ]
        assert not torch.equal(each[0], each[1])
        found = method._critic.scores(rows.states.clean, rows, ctx)
    assert torch.allclose(found, torch.stack(each).mean(0), atol=1e-6)


def test_with_unit_gradients_every_sample_pulls_with_its_weight(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({
        "algorithm.unit_gradients": True, "algorithm.distillation_weight": 0.0, "algorithm.step_weights": [0.5, 2.0],
    })  # fmt: skip
    ctx, method = trainer.ctx, trainer.algorithm
    assert ctx.surrogate is not None
    opinionated(ctx)
    (rows,) = updates(trainer)
    seen: list[torch.Tensor] = []
    transition = ctx.sampler.transition

    def kept(*arguments: Any) -> Transition:
        found = transition(*arguments)
        found.clean.retain_grad()
        seen.append(found.clean)
        return found

    ctx.sampler = replace(ctx.sampler)
    object.__setattr__(ctx.sampler, "transition", kept)
    loss, _ = method.loss(rows, ctx)
    loss.backward()
    pull = seen[0].grad
    assert pull is not None
    weights = torch.tensor([0.5, 2.0])[rows.states.step] * 2 / len(rows)
    assert torch.allclose(pull.flatten(1).norm(dim=1), weights, rtol=1e-4)
    there = rows.states.clean.clone().requires_grad_(True)
    (direction,) = torch.autograd.grad(ctx.surrogate.score(there, rows.states.prompt).sum(), there)
    similarity = torch.cosine_similarity(-pull.flatten(1), direction.flatten(1))
    assert torch.allclose(similarity, torch.ones(len(rows)), atol=1e-3)


def test_reference_samples_start_from_the_noises_of_the_policys_own(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({"algorithm.samples": 5, "algorithm.reference_samples": 3})
    latents = collect(trainer).scored.latents  # before training, so the same noises give the same samples
    torch.testing.assert_close(latents[:, 2:], latents[:, [0, 1, 0]])  # not to the bit, with several threads
    assert not torch.isclose(latents[:, 0], latents[:, 1]).all(-1).any()


def test_the_gain_is_over_the_model_before_training_from_the_same_noises(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({"algorithm.samples": 4, "algorithm.reference_samples": 2, "data.batch_size": 6})
    collect(trainer)
    assert trainer.ctx.take_metrics()["reward_gain"] == 0  # type: ignore[attr-defined]
    with torch.no_grad():
        for parameter in trainer.ctx.policy.parameters():
            parameter += 0.1
    rewards = collect(trainer).scored.rewards
    found = trainer.ctx.take_metrics()["reward_gain"]  # type: ignore[attr-defined]
    assert found == pytest.approx(float((rewards[:, :2] - rewards[:, 2:4]).mean()), abs=1e-6) and found != 0


def test_half_of_the_pairs_are_of_the_policy_and_the_model_before_training_from_the_same_noise(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer({
        "algorithm.samples": 4, "algorithm.reference_samples": 2, "algorithm.pairs_per_update": 8,
        "data.batch_size": 6,
    })  # fmt: skip
    with torch.no_grad():
        for parameter in trainer.ctx.policy.parameters():
            parameter += 0.1
    collected = collect(trainer)
    latents = collected.scored.latents
    own, before = latents[:, :2].flatten(0, 1), latents[:, 2:].flatten(0, 1)
    for rows in trainer.algorithm.surrogate_updates(collected, trainer.ctx):
        partners = 0
        for winner, loser in zip(rows.winner, rows.loser, strict=True):
            places = [
                next((i for i, x in enumerate(side) if torch.equal(x, sample)), None)
                for sample in (winner, loser) for side in (own, before)
            ]  # fmt: skip
            partners += places[0] == places[3] != None or places[1] == places[2] != None  # noqa: E711
        assert partners >= len(rows) // 2 > 0
