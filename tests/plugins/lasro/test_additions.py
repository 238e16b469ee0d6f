"""The additions to LaSRO: all are off by default and marked in the reference; those that change samples and pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from alignkit.cli.app import app
from alignkit.config.reference import class_fields
from alignkit.errors import ConfigError
from alignkit.training.trainer import Trainer
from alignkit_lasro.additions import ExtendedLaSRO
from alignkit_lasro.lasro import LaSRO
from alignkit_lasro.rows import ComparedPairs
from method_checks import collect, copies, equal

MakeTrainer = Callable[..., Trainer]
ADDED = {f["name"]: f for f in class_fields(ExtendedLaSRO) if f["name"] not in {g.name for g in fields(LaSRO)}}


def test_the_reference_marks_every_addition_as_not_in_the_paper() -> None:
    assert len(ADDED) == 12 and all(field["doc"].startswith("Not in the paper") for field in ADDED.values())
    assert not any("not in the paper" in field["doc"].lower() for field in class_fields(LaSRO))
    shown = " ".join(CliRunner().invoke(app, ["show", "lasro"]).output.split())
    for name, field in ADDED.items():
        assert f"{name} = {field['default']} {field['type']} {' '.join(field['doc'].split())}" in shown


def test_every_addition_is_off_by_default() -> None:
    assert {name: field["default"] for name, field in ADDED.items()} == {
        "replay": "1", "pairs": '"extremes"', "label_scale": "0.0", "noise_correlation": "0.0",
        "reference_samples": "0", "negatives": "0", "smoothing": "0.0", "purify": "0.0", "contrast": "0.0",
        "gradient_samples": "1", "unit_gradients": "false", "restart_every": "0",
    }  # fmt: skip
    assert ExtendedLaSRO().needs == LaSRO().needs


@pytest.mark.parametrize(
    "fields",
    [
        {"replay": 0},
        {"reference_samples": 8},
        {"smoothing": -0.1},
        {"label_scale": -1.0},
        {"negatives": -1},
        {"gradient_samples": 0},
        {"restart_every": -1},
        {"noise_correlation": 1.0},
        {"purify": 1.0},
        {"purify": -0.1},
    ],
)
def test_settings_that_cannot_learn_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        ExtendedLaSRO(**fields)


def test_negatives_are_samples_of_other_prompts_scored_under_the_prompt_of_their_group(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer({"algorithm.samples": 3, "algorithm.negatives": 2, "data.batch_size": 4})
    collected = collect(trainer)
    kept, batch = trainer.algorithm._memory.rounds[-1]
    assert kept.latents.shape[:2] == (2 * 4, 3 + 2) and batch == collected.prompt.examples
    own = kept.latents[:, :3]
    for group in range(len(kept)):
        for column in (3, 4):
            source = (own == kept.latents[group, column]).flatten(2).all(2).nonzero()[:, 0].tolist()
            assert source and group not in source
            assert all(kept.step[i] == kept.step[group] for i in source)
    examples = [example for i in kept.text.tolist() for example in [batch[i]] * 2]
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
    places = trainer.algorithm._negatives(1, replace(batch, examples=[a, a, b, a]), trainer.ctx)  # type: ignore[attr-defined]
    assert (places[0, :, 0] // 3).tolist() == [2, 2, 3, 2]


def test_correlated_noises_are_unit_normal_and_share_what_they_should(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    method = ExtendedLaSRO(samples=4, noise_correlation=0.7)
    noise = method.noise(300, trainer.ctx).view(300, 4, -1)
    assert float(noise.mean()) == pytest.approx(0, abs=0.02) and float(noise.std()) == pytest.approx(1, abs=0.02)
    assert float((noise[:, 0] * noise[:, 1]).mean()) == pytest.approx(0.7, abs=0.03)
    assert float((noise[:-1, 0] * noise[1:, 0]).mean()) == pytest.approx(0, abs=0.03)


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


@pytest.mark.parametrize("pairs", ["extremes", "random"])
def test_pairs_are_of_the_true_reward_and_under_their_own_text(make_trainer: MakeTrainer, pairs: str) -> None:
    trainer = make_trainer({
        "algorithm.pairs": pairs, "algorithm.pairs_per_update": 6, "algorithm.replay": 4,
        "algorithm.surrogate_steps": 2,
    })  # fmt: skip
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
                batch[int(scored.text[g])].text
                for scored, batch in memory
                for g in range(len(scored))
                if any(torch.equal(rows.winner[row], x) for x in scored.latents[g])
            ]
            assert len(where) == 1
            features = policy.encode(where).features
            assert torch.allclose(rows.prompt.features[row], features[0], atol=1e-5)


def test_pairs_of_examples_that_share_a_text_keep_their_metadata(
    make_trainer: MakeTrainer, signs: dict[str, Any]
) -> None:
    trainer = make_trainer({**signs, "regulariser": [], "algorithm.samples": 4, "algorithm.replay": 3})
    for _ in range(3):
        collected = collect(trainer)
    for rows in trainer.algorithm.surrogate_updates(collected, trainer.ctx):
        better, worse = (trainer.ctx.policy.decode(x).mean((1, 2, 3)) for x in (rows.winner, rows.loser))
        brighter = [example.metadata["target"] == "OPEN" for example in rows.prompt.examples]
        assert rows.prompt.texts == ["a sign"] * len(rows) and 0 < sum(brighter) < len(rows)
        assert (better > worse).tolist() == brighter


def test_labels_say_how_sure_the_rewards_are_and_teach_scores_in_their_units(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({"algorithm.label_scale": 8.0, "algorithm.samples": 3, "regulariser": []})
    ctx, method = trainer.ctx, trainer.algorithm
    (pairs, *_) = method.surrogate_updates(collect(trainer), ctx)
    assert isinstance(pairs, ComparedPairs) and float(pairs.gap.min()) > 0
    images = [ctx.score(x, pairs.prompt.examples).values for x in (pairs.winner, pairs.loser)]
    assert torch.allclose(pairs.gap, images[0] - images[1], atol=1e-6)

    def loss(scale: float) -> Tensor:
        """Return the loss of a surrogate whose scores are `scale` times the rewards."""
        known = {True: scale * images[0], False: scale * images[1]}
        ctx.surrogate.score = lambda x, prompt: torch.cat([known[True], known[False]])  # type: ignore[method-assign, union-attr]
        return method.surrogate_loss(pairs, ctx)  # type: ignore[no-any-return]

    best = (8 * pairs.gap).sigmoid()
    entropy = -(best * best.log() + (1 - best) * (1 - best).log()).mean()
    assert float(loss(8.0)) == pytest.approx(float(entropy), rel=1e-4)
    assert float(loss(8.0)) < min(float(loss(4.0)), float(loss(16.0)))  # certainty would have the second as the best


def test_as_many_rounds_are_kept_as_replay_states(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({"algorithm.replay": 2})
    seen = [collect(trainer).scored.latents for _ in range(3)]
    memory = trainer.algorithm._memory.rounds  # type: ignore[attr-defined]
    assert len(memory) == 2
    assert all(torch.equal(kept.latents, latents) for (kept, _), latents in zip(memory, seen[1:], strict=True))


def test_reference_samples_come_without_the_adapter_and_are_for_the_surrogate_alone(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer({"algorithm.samples": 5, "algorithm.reference_samples": 2})
    ctx = trainer.ctx
    with torch.no_grad():
        for parameter in ctx.policy.parameters():
            parameter += 0.1
    state, denoise, calls = ctx.generator.get_state(), ctx.policy.denoise, []
    ctx.policy.denoise = lambda x, *rest: calls.append(len(x)) or denoise(x, *rest)  # type: ignore[method-assign, func-returns-value]
    collected = collect(trainer)
    assert sum(calls) == 2 * 2 * 5  # prompts, steps, samples: each comes from one model alone
    with ctx.policy.reference():
        ctx.generator.set_state(state)
        trainer.batches -= 1  # the same texts again
        reference = collect(trainer).scored.latents
    found = collected.scored.latents
    assert torch.equal(found[:, 3:], reference[:, 3:])
    assert not torch.isclose(found[:, :3], reference[:, :3]).all(-1).any()
    assert len(collected.states) == 2 * 2 * 3  # prompts, steps, samples of the policy as it is


def test_a_policy_that_restarts_leaves_surrogate_and_samples_as_they_were(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer({"algorithm.restart_every": 2, "algorithm.replay": 9, "train.updates": 3})
    trainer.algorithm.setup(trainer.ctx)
    assert trainer.ctx.surrogate is not None
    policy, surrogate = copies(trainer.ctx.policy.parameters()), copies(trainer.ctx.surrogate.module().parameters())
    seen = []
    while not trainer.finished:
        for _ in trainer.round():
            seen.append(equal(policy, copies(trainer.ctx.policy.parameters())))
    assert seen[-3:] == [False, True, False]
    assert not equal(surrogate, copies(trainer.ctx.surrogate.module().parameters()))
    assert len(trainer.algorithm._memory.rounds) == trainer.batches  # type: ignore[attr-defined]
