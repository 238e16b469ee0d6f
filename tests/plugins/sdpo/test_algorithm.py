"""SDPO: its paired trajectories, its advantages, what it cannot learn from, and that it learns."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.interfaces import Sampler
from alignkit.runs.run import Run
from alignkit.testing import refusal
from alignkit.testing.algorithm import assert_goes_on_from_its_checkpoint
from alignkit.training.trainer import Trainer
from alignkit_samplers.ddim import DDIM
from alignkit_samplers.lcm import LCM
from alignkit_sdpo.algorithm import SDPO, PairedSteps
from method_checks import assert_the_true_reward_rises, collect, gradient, toy_images, updates

MakeTrainer = Callable[..., Trainer]


def steps_of(rows: PairedSteps) -> list[tuple[int, int]]:
    return list(zip(rows.pair.tolist(), rows.k.tolist(), strict=True))


# the trajectories


@pytest.mark.parametrize("ddim", [False, True])
def test_both_trajectories_of_a_pair_start_from_the_same_noise_under_the_same_text_and_then_part(
    make: MakeTrainer, ddim: bool
) -> None:
    trainer = make(ddim=ddim)
    steps = collect(trainer)
    first, later = (steps.select((steps.k == k).nonzero()[:, 0]) for k in (0, 1))
    assert torch.equal(first.x[:, 0], first.x[:, 1])
    assert not torch.isclose(first.x_next[:, 0], first.x_next[:, 1]).all((1, 2, 3)).any()
    assert torch.equal(later.x, first.x_next)
    assert len(first.x[:, 0].unique(dim=0)) == 4 and first.prompt.index.tolist() == [0, 0, 1, 1]
    # The latents can be computed again: the row's text, step and state are those of the trajectory.
    with torch.no_grad():
        at = trainer.ctx.sampler.transition(
            trainer.ctx.policy, first.x.flatten(0, 1), first.k.repeat_interleave(2),
            first.prompt.select(torch.arange(4).repeat_interleave(2)),
        )  # fmt: skip
    noise = ((first.x_next.flatten(0, 1) - at.mean) / at.std.view(-1, 1, 1, 1)).flatten()
    assert float(noise.mean()) == pytest.approx(0, abs=0.15) and float(noise.std()) == pytest.approx(1, abs=0.1)


def test_every_stochastic_step_of_a_pair_is_a_row_and_the_deterministic_last_one_is_none(make: MakeTrainer) -> None:
    assert sorted(collect(make()).k.tolist()) == [0] * 4 + [1] * 4
    assert sorted(collect(make({"sampler.num_steps": 2})).k.tolist()) == [0] * 4
    assert sorted(collect(make(ddim=True)).k.tolist()) == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize(
    ("fields", "queries"),
    [
        ({}, [0, None, 5]),
        ({"algorithm.anchor": "fixed"}, [0, 2, 5]),
        ({"algorithm.queries": "two", "algorithm.between": "interpolation"}, [0, 5]),
        ({"algorithm.queries": "one"}, [5]),
        ({"algorithm.queries": "all"}, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_a_round_scores_the_clean_predictions_of_these_steps_under_their_texts(
    make: MakeTrainer, fields: dict[str, Any], queries: list[int | None]
) -> None:
    trainer = make(fields | {"sampler.num_steps": 6, "algorithm.pairs": 1})
    calls: list[Any] = []
    score = trainer.ctx.score

    def spy(latents: Tensor, examples: Any) -> Any:
        calls.extend([latents, list(examples)])
        return score(latents, examples)

    trainer.ctx.score = spy  # type: ignore[method-assign]
    batch = trainer.batch()
    with torch.no_grad():
        steps = trainer.algorithm.collect(batch, trainer.ctx)
        latents, examples = calls
        each = len(queries)
        # The examples themselves, with their metadata.
        expected = [e for e in batch.examples for _ in range(2 * each)]
        assert len(examples) == len(expected) and all(a is b for a, b in zip(examples, expected, strict=True))
        assert trainer.ctx.take_images() == len(latents) == 2 * 2 * each
        # The predictions of the steps that are rows, computed again.
        ctx, prompt = trainer.ctx, steps.prompt
        clean = [
            ctx.sampler.transition(ctx.policy, steps.x[:, m], steps.k, prompt).clean.view(2, 5, -1) for m in (0, 1)
        ]
    trajectories = torch.stack(clean, dim=1).flatten(0, 1)
    for n in range(4):
        for q, k in enumerate(queries):
            found = latents.view(4, each, -1)[n, q]
            close = [i for i in range(5) if torch.allclose(found, trajectories[n, i], rtol=1e-3, atol=1e-2)]
            assert close == [] if k == 5 else k in close or (k is None and close and close[0] in range(1, 5))
    metrics = trainer.ctx.take_metrics()
    assert "reward/step6" in metrics and ("reward/step1" in metrics) == (each > 1)


# returns and advantages


def test_the_advantage_of_a_step_is_its_discounted_return_relative_to_the_returns_of_that_step(
    make: MakeTrainer,
) -> None:
    trainer = make({"algorithm.discount": 0.5})
    toy_images(trainer)
    steps, ctx = collect(trainer), trainer.ctx
    prompt = steps.select((steps.k == 0).nonzero()[:, 0]).prompt.select(torch.arange(4).repeat_interleave(2))
    rewards = []
    with torch.no_grad():
        for k in range(3):
            # The last step is deterministic and no row: its state is the latent that the step before it sampled.
            at = steps.select((steps.k == min(k, 1)).nonzero()[:, 0])
            x = (at.x if k < 2 else at.x_next).flatten(0, 1)
            clean = ctx.sampler.transition(ctx.policy, x, torch.full((8,), k), prompt).clean
            rewards.append(ctx.policy.decode(clean).mean((1, 2, 3)))
    returns = [rewards[0] + 0.5 * rewards[1] + 0.25 * rewards[2], rewards[1] + 0.5 * rewards[2]]
    for k, column in enumerate(returns):
        expected = (column - column.mean()) / column.std(correction=0)
        found = steps.advantage[steps.k == k].flatten()
        assert torch.allclose(found, expected, atol=0.05)


def test_with_enough_returns_each_prompt_and_step_is_normalised_by_its_own(make: MakeTrainer) -> None:
    trainer = make({"algorithm.min_count": 4}, ddim=True)
    toy_images(trainer)
    steps = collect(trainer)
    assert trainer.ctx.take_metrics()["own_statistics"] == 1
    for text in (0, 1):
        for k in (0, 1, 2):
            own = steps.advantage[(steps.prompt.index == text) & (steps.k == k)]
            assert own.numel() == 4 and float(own.mean()) == pytest.approx(0, abs=1e-4)
            assert float(own.std(correction=0)) == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("baseline", ["prompt", "batch"])
def test_with_the_baseline_prompt_or_batch_all_steps_are_normalised_together(make: MakeTrainer, baseline: str) -> None:
    trainer = make({"algorithm.min_count": 4, "algorithm.baseline": baseline}, ddim=True)
    toy_images(trainer)
    steps = collect(trainer)
    groups = [steps.prompt.index == text for text in (0, 1)] if baseline == "prompt" else [steps.k >= 0]
    for group in groups:
        own = steps.advantage[group]
        assert float(own.mean()) == pytest.approx(0, abs=1e-4)
        assert float(own.std(correction=0)) == pytest.approx(1, abs=1e-2)
    assert float(steps.advantage[steps.k == 0].mean()) > float(steps.advantage[steps.k == 2].mean())  # sums of more


# what cannot be scored, what cannot be learned from


def test_a_constant_reward_moves_nothing_and_steps_without_a_score_are_left_out(
    make: MakeTrainer, odd_rewards: None
) -> None:
    trainer = make({"reward": ["constant"]})
    for rows in updates(trainer):
        assert rows.advantage.tolist() == [[0, 0]] * 4
        assert float(gradient(trainer, trainer.algorithm.loss(rows, trainer.ctx)[0]).abs().max()) == 0
    trainer = make({"reward": ["all_but_first"]})
    steps = collect(trainer)
    found = updates(trainer, steps)
    # The first prediction of the first trajectory: its return is unknown, those after it are not.
    assert sorted(row for rows in found for row in steps_of(rows)) == [(p, k) for p in range(4) for k in (0, 1)][1:]
    assert all(bool(rows.advantage.isfinite().all()) for rows in found)
    trainer = make({"reward": ["unscored"]})
    assert updates(trainer) == []


@pytest.mark.parametrize("sampler", [{"sampler.num_steps": 1}, {"sampler.name": "ddim", "sampler.eta": 0.0}])
def test_without_a_stochastic_step_a_run_is_refused_before_weights_load(
    tiny_run: Callable[..., Run], sampler: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"every step of \w+ is deterministic .* algorithm sdpo"):
        tiny_run(overrides={"algorithm.name": "sdpo", "sampler.num_steps": 3} | sampler).check()


@pytest.mark.parametrize(
    ("fields", "sampler", "message"),
    [
        ({}, DDIM(1, eta=1.0), r"sampler\.num_steps: found 1, expected at least 2"),
        ({"discount": 0.0}, LCM(2), r"algorithm\.discount: found 0, expected more"),
        ({"discount": 0.0}, LCM(3), ""),
        ({}, LCM(2), ""),
    ],
)
def test_a_pair_whose_trajectories_never_differ_where_they_are_compared_is_refused(
    fields: dict[str, Any], sampler: Sampler, message: str
) -> None:
    assert re.match(message, refusal(SDPO(**fields), sampler)) if message else not refusal(SDPO(**fields), sampler)


@pytest.mark.parametrize(
    "fields",
    [{"pairs": 0}, {"inner_epochs": 0}, {"min_count": 0}, {"buffer_size": 8, "min_count": 9}, {"discount": 1.1},
     {"discount": -0.1}, {"decay": 0.0}, {"log_ratio_scale": 0.0}, {"advantage_clip": 0.0}, {"clip_range": -1e-4},
     {"step_fraction": 0.0}, {"step_fraction": 1.5}],
)  # fmt: skip
def test_settings_that_cannot_learn_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        SDPO(**fields)


# the run


def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(make: MakeTrainer, tmp_path: Path) -> None:
    settings = {"algorithm.min_count": 3, "algorithm.buffer_size": 4}
    assert assert_goes_on_from_its_checkpoint(make, settings, tmp_path)[0]["own_statistics"] > 0


@pytest.mark.parametrize(
    ("ddim", "scale", "rate", "rounds"),
    # Consistency latents of this untrained network are the larger ones.
    [(False, 20, 3e-2, 7), pytest.param(True, 4, 1e-2, 12, marks=pytest.mark.long)],
)
def test_the_true_reward_rises_on_a_toy_reward(
    make: MakeTrainer, ddim: bool, scale: float, rate: float, rounds: int
) -> None:
    trainer = make({
        "algorithm.pairs": 4, "data.batch_size": 4, "sampler.num_steps": 4, "model.lora_rank": 8,
        "train.updates": rounds * (4 if ddim else 3), "train.rows_per_update": 16, "train.rows_per_pass": 16,
        "train.learning_rate": rate,
    }, ddim)  # fmt: skip
    assert len(assert_the_true_reward_rises(trainer, scale)) == rounds  # one a round
