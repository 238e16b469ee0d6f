"""The additions to LaSRO that change its scores: purified, smoothed and contrasted; and gradients of length one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from alignkit.diffusion import add_noise
from alignkit.errors import ConfigError
from alignkit.interfaces import Context
from alignkit.records import Example, Transition
from alignkit.rollout import encode_examples
from alignkit.training.trainer import Trainer
from alignkit_lasro.additions import ExtendedLaSRO, other_texts
from alignkit_lasro.rows import PerturbedStates
from method_checks import collect, updates

MakeTrainer = Callable[..., Trainer]
ALONE: dict[str, Any] = {"regulariser": []}


def opinionated(ctx: Context) -> None:
    """Give the surrogate's head, which starts at zero, random weights, so that scores differ."""
    with torch.no_grad():
        ctx.surrogate.module().head[-1].weight.normal_(generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr, index, operator]


@pytest.mark.parametrize(("share", "time"), [(0.4, 400), (0.9999, 999)])
def test_the_surrogate_scores_the_noised_prediction_as_the_teacher_denoises_it(
    make_trainer: MakeTrainer, share: float, time: int
) -> None:
    trainer = make_trainer({**ALONE, "algorithm.purify": share})
    ctx = trainer.ctx
    assert ctx.teacher is not None and ctx.surrogate is not None
    opinionated(ctx)
    (rows,) = updates(trainer)
    t = torch.full((len(rows),), time)
    with torch.no_grad():
        noised = add_noise(rows.clean, rows.noise[:, 0], *ctx.teacher.schedule(t))
        expected = ctx.surrogate.score(ctx.teacher.denoise(noised, t, rows.prompt), rows.prompt)
        found = trainer.algorithm.score(rows.clean, rows, ctx)  # type: ignore[attr-defined]
        assert torch.equal(found, expected)
        assert not torch.allclose(found, ctx.surrogate.score(rows.clean, rows.prompt))
    loss, _ = trainer.algorithm.loss(rows, ctx)
    loss.backward()
    assert all(p.grad is None for p in ctx.teacher.unet.parameters())  # type: ignore[attr-defined]


def test_what_scores_alike_under_every_prompt_cancels_in_the_contrast(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({**ALONE, "algorithm.contrast": 1.0, "data.batch_size": 3})
    ctx, method = trainer.ctx, trainer.algorithm
    assert ctx.surrogate is not None and isinstance(method, ExtendedLaSRO)
    opinionated(ctx)
    (rows,) = updates(trainer)
    assert bool((rows.other.index != rows.prompt.index).all())
    with torch.no_grad():
        plain = ctx.surrogate.score
        expected = plain(rows.clean, rows.prompt) - plain(rows.clean, rows.other)
        assert torch.equal(method.score(rows.clean, rows, ctx), expected)
        ctx.surrogate.score = lambda x, p: plain(x, p) + 7 * x.flatten(1).mean(1)  # type: ignore[method-assign]
        assert torch.allclose(method.score(rows.clean, rows, ctx), expected, atol=1e-4)


def test_a_contrast_without_another_prompt_is_refused(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({"algorithm.contrast": 1.0, "data.batch_size": 1})
    with pytest.raises(
        ConfigError, match=r"algorithm\.contrast: found one text in the batch, .*raise data\.batch_size"
    ):
        collect(trainer)
    with pytest.raises(ConfigError, match="train on more prompts"):
        trainer.algorithm._check_contrast([Example("a red circle")] * 3)  # type: ignore[attr-defined]


def test_examples_that_share_a_text_are_no_contrast_to_each_other(make_trainer: MakeTrainer) -> None:
    policy = make_trainer().ctx.policy
    signs = [Example("a sign", {"target": word}) for word in ("OPEN", "EXIT")]
    others = [Example("a cat"), Example("a dog", {"n": 1}), Example("a dog", {"n": 2})]
    prompt = encode_examples(policy, [*signs, *others] * 100)
    found = other_texts(prompt, torch.Generator().manual_seed(0))
    assert all(a != b for a, b in zip(found.texts, prompt.texts, strict=True))
    assert set(map(id, found.examples)) == set(map(id, (signs[0], *others[:2])))  # the first of each text
    of_signs = [text for text, own in zip(found.texts, prompt.texts, strict=True) if own == "a sign"]
    assert 70 < of_signs.count("a cat") < 130 and len(of_signs) == 200
    alone = encode_examples(policy, signs)
    assert other_texts(alone, torch.Generator()).texts == ["a sign"] * 2


def test_the_score_is_the_mean_over_gradient_samples(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({"algorithm.gradient_samples": 3, "algorithm.smoothing": 0.5})
    ctx, method = trainer.ctx, trainer.algorithm
    assert isinstance(method, ExtendedLaSRO)
    opinionated(ctx)
    (rows,) = updates(trainer)
    assert rows.blur.shape == rows.noise.shape == (len(rows), 3, *ctx.policy.latent_shape)
    with torch.no_grad():
        each = [
            method.score(rows.clean, replace(rows, blur=rows.blur[:, [i]], noise=rows.noise[:, [i]]), ctx)
            for i in range(3)
        ]
        assert not torch.equal(each[0], each[1])
        found = method.score(rows.clean, rows, ctx)
    assert torch.allclose(found, torch.stack(each).mean(0), atol=1e-6)


def test_with_unit_gradients_every_sample_pulls_with_its_weight(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({
        **ALONE, "algorithm.unit_gradients": True, "algorithm.step_weights": [0.5, 2.0],
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
    weights = torch.tensor([0.5, 2.0])[rows.step] * 2 / len(rows)
    assert torch.allclose(pull.flatten(1).norm(dim=1), weights, rtol=1e-4)
    there = rows.clean.clone().requires_grad_(True)
    (direction,) = torch.autograd.grad(ctx.surrogate.score(there, rows.prompt).sum(), there)
    similarity = torch.cosine_similarity(-pull.flatten(1), direction.flatten(1))
    assert torch.allclose(similarity, torch.ones(len(rows)), atol=1e-3)


def test_smoothing_moves_what_the_surrogate_sees_and_nothing_else(make_trainer: MakeTrainer) -> None:
    plain, smooth = (make_trainer({"algorithm.smoothing": s}) for s in (0.0, 0.5))
    for trainer, spread in ((plain, 0.0), (smooth, 0.5)):
        collected = collect(trainer)
        (pairs, *_) = trainer.algorithm.surrogate_updates(collected, trainer.ctx)
        known = collected.scored.latents.flatten(0, 1)
        distance = (pairs.winner[:, None] - known).flatten(2).norm(dim=2).min(1).values / known[0].numel() ** 0.5
        assert distance.mean() == pytest.approx(spread, abs=0.15)
        (rows,) = trainer.algorithm.updates(collected, trainer.ctx)
        assert isinstance(rows, PerturbedStates) == bool(spread)
        if isinstance(rows, PerturbedStates):
            assert rows.blur is not None and float(rows.blur.std()) == pytest.approx(spread, abs=0.1)
