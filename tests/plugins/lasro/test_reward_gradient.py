"""LaSRO on the gradient of the reward itself, ablation (e): its needs, its gradient, and the metadata it passes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.records import Example, Scores
from alignkit.runs.run import Run
from alignkit.training.trainer import Trainer
from alignkit_lasro.additions import ExtendedLaSRO
from alignkit_lasro.lasro import LaSRO
from method_checks import assert_the_true_reward_rises, collect, gradient, updates

MakeRun = Callable[..., Run]
MakeTrainer = Callable[..., Trainer]
OF_REWARD: dict[str, Any] = {"algorithm.gradient_of": "reward", "regulariser": []}


def test_the_fields_decide_what_is_needed() -> None:
    assert LaSRO(gradient_of="reward").needs == {"differentiable_reward"}
    assert LaSRO(states_from="images").needs == {"surrogate", "images"}
    assert LaSRO(gradient_of="reward", states_from="images").needs == {"differentiable_reward", "images"}
    assert ExtendedLaSRO(purify=0.1).needs == {"surrogate", "teacher"}
    assert ExtendedLaSRO(purify=0.1, gradient_of="reward").needs == {"differentiable_reward", "teacher"}
    assert LaSRO(gradient_of="reward", samples=1).samples == 1
    with pytest.raises(ValueError, match="samples: found 1, expected 2 or more"):
        LaSRO(samples=1)


def test_a_black_box_is_refused_in_one_line(tiny_run: MakeRun) -> None:
    run = tiny_run(overrides={**OF_REWARD, "reward": ["jpeg_compressibility"], "algorithm.samples": 2})
    with pytest.raises(ConfigError, match=r"^reward: algorithm lasro follows the gradient of a reward, and jpeg.*\S$"):
        run.check()


def test_the_policy_follows_the_reward_through_the_decoder(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(OF_REWARD)
    assert trainer.ctx.surrogate is None and trainer.surrogate_optimizer is None
    policy, (rows,) = trainer.ctx.policy, updates(trainer)
    method = trainer.algorithm
    assert isinstance(method, LaSRO)
    before = policy.decode(rows.clean).mean((1, 2, 3))
    for k in (0, 1):
        assert method._trackers[k].bounds[0] == pytest.approx(float(before[rows.step == k].mean()), abs=0.02)
    loss, metrics = trainer.algorithm.loss(rows, trainer.ctx)
    clean = trainer.ctx.sampler.transition(policy, rows.x, rows.step, rows.prompt).clean
    pixels = policy.decode(clean)
    values = pixels.mean((1, 2, 3))
    mean, level = torch.tensor([tracker.bounds for tracker in method._trackers])[rows.step].unbind(1)
    expected = -2 * ((values - mean) / (level - mean)).clamp(max=1).mean()
    assert set(metrics) == {"reward_loss", "clipped"}
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=0.2)  # of 8-bit images, and scaled
    found, wanted = gradient(trainer, loss), gradient(trainer, expected)
    assert float(torch.cosine_similarity(found, wanted, dim=0)) > 0.99 and float(found.norm()) > 0


def test_the_reward_rises_along_its_own_gradient(make_trainer: MakeTrainer) -> None:
    assert_the_true_reward_rises(make_trainer({
        **OF_REWARD, "algorithm.samples": 2, "data.batch_size": 4, "model.lora_rank": 8,
        "train.updates": 8, "train.rows_per_update": 16, "train.learning_rate": 1e-2,
    }))  # fmt: skip


def test_an_image_that_cannot_be_scored_pulls_nowhere_and_counts_for_no_scale(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(OF_REWARD)
    ctx: Any = trainer.ctx
    collected = collect(trainer)
    plain = ctx.differentiable_score

    def all_but_first(latents: torch.Tensor, examples: Any, log: bool = False) -> Scores:
        found = plain(latents, examples, log)
        valid = torch.arange(len(latents)) > 0
        return Scores(found.values.masked_fill(~valid, torch.nan), valid)

    ctx.score = ctx.differentiable_score = all_but_first
    (rows,) = updates(trainer, collected)
    method = trainer.algorithm
    assert isinstance(method, ExtendedLaSRO) and all(m == m for tracker in method._trackers for m in tracker.bounds)
    for unit in (False, True):
        method.unit_gradients = unit
        clean = rows.clean.clone().requires_grad_(True)
        pull, _ = method.pull(clean, rows, ctx)
        (found,) = torch.autograd.grad(pull.sum(), clean)
        assert float(pull[0].detach()) == 0 and not found[0].any() and bool(found.isfinite().all())
        assert bool(found[1:].flatten(1).any(1).any())


def test_a_reward_gets_the_metadata_of_each_text_and_of_its_contrast(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer({**OF_REWARD, "algorithm.contrast": 0.5})
    trainer._examples = [Example(f"text {i}", {"number": i}) for i in range(len(trainer._examples))]
    ctx: Any = trainer.ctx
    seen: list[Example] = []
    plain = ctx.differentiable_score
    ctx.differentiable_score = lambda x, examples, log=False: seen.extend(examples) or plain(x, examples, log)
    (rows,) = updates(trainer)
    trainer.algorithm.loss(rows, ctx)
    assert len(seen) == 2 * len(rows)
    assert [f"text {e.metadata['number']}" for e in seen] == rows.prompt.texts + rows.other.texts


def test_what_only_a_surrogate_learns_from_is_not_scored_without_one(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({**OF_REWARD, "algorithm.negatives": 1})
    assert collect(trainer).scored.latents.shape[:2] == (4, 3)
    assert not trainer.algorithm.state_dict()["memory"]


def test_examples_with_one_text_keep_their_own_metadata_up_to_the_reward(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({**OF_REWARD, "train.rows_per_update": 12})
    trainer._examples = [Example("a sign", {"number": i}) for i in range(len(trainer._examples))]
    ctx, (first, second), calls = trainer.ctx, trainer.batch().examples, dict[str, list[list[Example]]]()
    for name in ("score", "differentiable_score"):
        plain, seen = getattr(ctx, name), calls.setdefault(name, [])

        def noting(latents: Any, examples: Any, *rest: Any, plain: Any = plain, seen: Any = seen, **others: Any) -> Any:
            seen.append(list(examples))
            return plain(latents, examples, *rest, **others)

        setattr(ctx, name, noting)
    assert first.text == second.text and first != second
    collected = collect(trainer)
    each_step = [first] * 3 + [second] * 3
    assert calls == {"score": [each_step, each_step], "differentiable_score": []}
    (rows,) = updates(trainer, collected)
    assert calls["score"][2:] == [each_step * 2]  # the trackers score all states
    trainer.algorithm.loss(rows, ctx)
    (scored,) = calls["differentiable_score"]
    places = [next(i for i, x in enumerate(collected.states.x) if torch.equal(x, own)) for own in rows.x]
    assert sorted(places) == list(range(12)) and scored == [(each_step * 2)[place] for place in places]
