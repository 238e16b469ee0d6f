"""What LaSRO may add so that the surrogate's gradient leads somewhere: each does what it says and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from alignkit.diffusion import add_noise
from alignkit.errors import ConfigError
from alignkit.train import Trainer
from alignkit_lasro.algorithm import LaSRO
from method_checks import collect, updates

MakeTrainer = Callable[..., Trainer]


def test_negatives_are_samples_of_other_prompts_scored_under_the_prompt_of_their_group(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer({"algorithm.samples": 3, "algorithm.negatives": 2, "data.batch_size": 4})
    collected = collect(trainer)
    kept, texts = trainer.algorithm._memory[-1]
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


def test_correlated_noises_are_unit_normal_and_share_what_they_should(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    method = LaSRO(samples=4, noise_correlation=0.7)
    noise = method._noise(300, trainer.ctx).view(300, 4, -1)
    assert float(noise.mean()) == pytest.approx(0, abs=0.02) and float(noise.std()) == pytest.approx(1, abs=0.02)
    assert float((noise[:, 0] * noise[:, 1]).mean()) == pytest.approx(0.7, abs=0.03)
    assert float((noise[:-1, 0] * noise[1:, 0]).mean()) == pytest.approx(0, abs=0.03)


def test_the_surrogate_scores_what_the_teacher_makes_of_the_noised_prediction(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({"algorithm.purify": 400, "algorithm.distillation_weight": 0.0})
    ctx, states = trainer.ctx, collect(trainer).states
    assert ctx.teacher is not None and ctx.surrogate is not None
    torch.nn.init.ones_(ctx.surrogate.module().head[-1].weight)  # type: ignore[union-attr, index, arg-type]
    noise = ctx.noise(len(states))
    t = torch.full((len(states),), 400)
    with torch.no_grad():
        denoised = ctx.teacher.denoise(add_noise(states.clean, noise, *ctx.teacher.schedule(t)), t, states.prompt)
        expected = ctx.surrogate.score(denoised, states.prompt)
        found = trainer.algorithm._scores(states.clean, states.prompt, torch.zeros_like(noise), noise, ctx)
        assert torch.equal(found, expected)
        assert not torch.allclose(found, ctx.surrogate.score(states.clean, states.prompt))
    (rows,) = updates(trainer)
    loss, _ = trainer.algorithm.loss(rows, ctx)
    loss.backward()
    assert all(p.grad is None for p in ctx.teacher.unet.parameters())  # type: ignore[attr-defined]


def test_an_offset_of_each_prompt_is_lost_in_the_baseline_of_its_group(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({"algorithm.group_baseline": True, "data.batch_size": 3})
    ctx, method = trainer.ctx, trainer.algorithm
    states = collect(trainer).states
    assert ctx.surrogate is not None
    plain = ctx.surrogate.score

    def found(offset: float) -> torch.Tensor:
        ctx.surrogate.score = lambda x, p: plain(x, p) + offset * p.index  # type: ignore[method-assign, union-attr]
        state = ctx.generator.get_state()
        tracked = method._track(states, ctx)
        ctx.generator.set_state(state)
        with torch.no_grad():
            return ctx.surrogate.score(states.clean, states.prompt) - tracked.baseline  # type: ignore[union-attr]

    with torch.no_grad():
        assert torch.allclose(found(0.0), found(5.0), atol=1e-4)
        assert float(found(5.0).mean()) == pytest.approx(0, abs=1e-4)


def test_reference_samples_start_from_the_noises_of_the_policys_own(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({"algorithm.samples": 5, "algorithm.reference_samples": 3})
    latents = collect(trainer).scored.latents  # before training, so the same noises give the same samples
    assert torch.equal(latents[:, 2:4], latents[:, :2]) and torch.equal(latents[:, 4], latents[:, 0])
    assert not torch.isclose(latents[:, 0], latents[:, 1]).all(-1).any()
