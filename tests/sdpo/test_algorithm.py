"""SDPO: golden values of its loss, paired walks, what an update holds, what a return is measured by, that it learns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.run import Run
from alignkit.train import Trainer
from alignkit_sdpo.algorithm import SDPO, PairedSteps, pair_loss

MakeTrainer = Callable[..., Trainer]
SETTINGS = {"algorithm.name": "sdpo", "sampler.num_steps": 3}


@pytest.fixture
def make(make_trainer: MakeTrainer, tiny_teacher: Path) -> MakeTrainer:
    """A trainer of SDPO on the consistency model, or with `ddim=True` on its teacher: 2 prompts, 4 pairs, 3 steps."""

    def build(overrides: dict[str, Any] | None = None, ddim: bool = False) -> Trainer:
        teacher = {"model.name": str(tiny_teacher), "sampler.name": "ddim", "sampler.eta": 1.0, "evaluate.steps": [3]}
        return make_trainer(SETTINGS | (teacher if ddim else {}) | (overrides or {}))

    return build


def collect(trainer: Trainer) -> PairedSteps:
    with torch.no_grad():
        collected = trainer.algorithm.collect(trainer.batch(), trainer.ctx)
    assert isinstance(collected, PairedSteps)
    return collected


def parts(trainer: Trainer, collected: PairedSteps) -> list[PairedSteps]:
    return list(trainer.algorithm.updates(collected, trainer.ctx))


def number(value: Tensor) -> float:
    return float(value.detach())


def gradients(trainer: Trainer, value: Tensor) -> Tensor:
    found = torch.autograd.grad(value, trainer.ctx.policy.parameters(), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def method(trainer: Trainer) -> SDPO:
    assert isinstance(trainer.algorithm, SDPO)
    return trainer.algorithm


def toy_decoder(trainer: Trainer, scale: float = 20) -> None:
    """The reward becomes how far the first three channels of the latent lie above zero; it never gives a gradient."""
    trainer.ctx.policy.decode = lambda latents: (latents[:, :3] / scale).sigmoid()  # type: ignore[method-assign]


# the loss


def test_the_loss_and_its_gradient_are_golden() -> None:
    log_ratio = torch.tensor([[0, 0], [3e-4, -2e-4], [-3e-4, 2e-4]], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([[1.0, -0.5]] * 3, dtype=torch.float64)
    weight = torch.full((3,), 0.99**3, dtype=torch.float64)
    loss = pair_loss(log_ratio, advantage, weight, 1e-4)
    assert loss.tolist() == pytest.approx([2.25, 2.24941786, 2.25145568], abs=1e-8)
    loss.sum().backward()
    assert log_ratio.grad is not None
    # 2 w (w d - dA): whole where nothing is clipped or the ratios went the wrong way, none where they went far enough.
    slope = [2 * 0.99**3 * (0.99**3 * d - 1.5) for d in (0, -5e-4)]
    expected = [[slope[0], -slope[0]], [0, 0], [slope[1], -slope[1]]]
    assert torch.allclose(log_ratio.grad, torch.tensor(expected, dtype=torch.float64), atol=1e-9)


def test_without_a_clip_range_only_the_free_difference_counts() -> None:
    log_ratio, advantage = torch.tensor([[0.3, -0.2], [-4.0, 2.0]]), torch.tensor([[1.0, -0.5], [0.0, 0.0]])
    found = pair_loss(log_ratio, advantage, torch.tensor([1.0, 0.5]), 0)
    assert found.tolist() == pytest.approx([1.0, 9.0])


def test_swapping_the_walks_of_a_pair_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    log_ratio, advantage = 2e-4 * torch.randn(50, 2, generator=generator), torch.randn(50, 2, generator=generator)
    weight = torch.rand(50, generator=generator)
    one, other = (
        pair_loss(r, a, weight, 1e-4) for r, a in ((log_ratio, advantage), (log_ratio.flip(1), advantage.flip(1)))
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("ddim", [False, True])
def test_before_the_first_update_every_log_ratio_is_zero_and_the_loss_the_mean_squared_difference(
    make: MakeTrainer, ddim: bool
) -> None:
    trainer = make({"train.rows_per_update": 2, "algorithm.advantage_clip": 1.0}, ddim)
    found = parts(trainer, collect(trainer))
    assert len(found) == (6 if ddim else 4)
    for rows in found:
        loss, metrics = trainer.algorithm.loss(rows, trainer.ctx)
        assert number(metrics["log_ratio_size"]) == 0 == number(metrics["clip_fraction"])
        advantage = rows.advantage.clamp(-1, 1)
        assert number(loss) == pytest.approx(float(((advantage[:, 0] - advantage[:, 1]) ** 2).mean()), abs=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_at_the_first_update_the_gradient_is_that_of_the_weighted_difference_of_log_likelihoods(
    make: MakeTrainer, reduction: str
) -> None:
    trainer = make({"algorithm.reduction": reduction, "algorithm.decay": 0.5, "algorithm.log_ratio_scale": 2.0})
    for rows in parts(trainer, collect(trainer)):
        found = gradients(trainer, trainer.algorithm.loss(rows, trainer.ctx)[0])
        log_prob = method(trainer).log_prob(rows, trainer.ctx)
        wanted = rows.advantage[:, 0] - rows.advantage[:, 1]
        weight = torch.tensor([0.5, 0.25])[rows.k]
        expected = gradients(trainer, (-2 * wanted * weight * (log_prob[:, 0] - log_prob[:, 1])).mean())
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        assert float(found.abs().max()) > 0


def test_one_pass_of_all_rows_has_the_gradient_of_several_passes_and_the_mean_of_their_losses(
    make: MakeTrainer,
) -> None:
    trainer = make({"algorithm.order": "accumulated"})
    (rows,) = parts(trainer, collect(trainer))
    assert len(rows) == 8
    found = []
    for size in (8, 3, 1):
        trainer.config = replace(trainer.config, train=replace(trainer.config.train, rows_per_pass=size))
        means = trainer._backward(rows, lambda part: trainer.algorithm.loss(part, trainer.ctx))
        found.append((means["loss"], [p.grad.clone() for p in trainer.ctx.policy.parameters() if p.grad is not None]))
        trainer.optimizer.zero_grad()
    for loss, grads in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-4)
        largest = max(float(g.abs().max()) for g in found[0][1])
        assert all(torch.allclose(a, b, atol=2e-3 * largest) for a, b in zip(grads, found[0][1], strict=True))


# the walks


@pytest.mark.parametrize("ddim", [False, True])
def test_both_walks_of_a_pair_start_from_the_same_noise_under_the_same_text_and_then_part(
    make: MakeTrainer, ddim: bool
) -> None:
    trainer = make(ddim=ddim)
    steps = collect(trainer)
    first, later = (steps.select((steps.k == k).nonzero()[:, 0]) for k in (0, 1))
    assert torch.equal(first.x[:, 0], first.x[:, 1])
    assert not torch.isclose(first.x_next[:, 0], first.x_next[:, 1]).all((1, 2, 3)).any()
    assert torch.equal(later.x, first.x_next)
    assert len(first.x[:, 0].unique(dim=0)) == 4 and first.prompt.index.tolist() == [0, 0, 1, 1]
    # What was drawn replays: the row's text, step and state are those of the walk.
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
    asked: list[Any] = []
    score = trainer.ctx.score

    def spy(latents: Tensor, examples: Any) -> Any:
        asked.extend([latents, [e.text for e in examples]])
        return score(latents, examples)

    trainer.ctx.score = spy  # type: ignore[method-assign]
    batch = trainer.batch()
    with torch.no_grad():
        steps = trainer.algorithm.collect(batch, trainer.ctx)
        latents, texts = asked
        each = len(queries)
        assert texts == [e.text for e in batch.examples for _ in range(2 * each)]
        assert trainer.ctx.take_pictures() == len(latents) == 2 * 2 * each
        # The predictions of the steps that are rows, asked of the network again.
        ctx, prompt = trainer.ctx, steps.prompt
        clean = [
            ctx.sampler.transition(ctx.policy, steps.x[:, m], steps.k, prompt).clean.view(2, 5, -1) for m in (0, 1)
        ]
    walks = torch.stack(clean, dim=1).flatten(0, 1)
    for n in range(4):
        for q, k in enumerate(queries):
            found = latents.view(4, each, -1)[n, q]
            close = [i for i in range(5) if torch.allclose(found, walks[n, i], rtol=1e-3, atol=1e-2)]
            assert close == [] if k == 5 else k in close or (k is None and close and close[0] in range(1, 5))
    metrics = trainer.ctx.take_metrics()
    assert "reward/step6" in metrics and ("reward/step1" in metrics) == (each > 1)


# returns and advantages


def test_the_advantage_of_a_step_is_its_discounted_return_measured_by_the_returns_of_that_step(
    make: MakeTrainer,
) -> None:
    trainer = make({"algorithm.discount": 0.5})
    toy_decoder(trainer)
    steps, ctx = collect(trainer), trainer.ctx
    prompt = steps.select((steps.k == 0).nonzero()[:, 0]).prompt.select(torch.arange(4).repeat_interleave(2))
    rewards = []
    with torch.no_grad():
        for k in range(3):
            # The last step is deterministic and no row: its state is what the step before it drew.
            at = steps.select((steps.k == min(k, 1)).nonzero()[:, 0])
            x = (at.x if k < 2 else at.x_next).flatten(0, 1)
            clean = ctx.sampler.transition(ctx.policy, x, torch.full((8,), k), prompt).clean
            rewards.append(ctx.policy.decode(clean).mean((1, 2, 3)))
    returns = [rewards[0] + 0.5 * rewards[1] + 0.25 * rewards[2], rewards[1] + 0.5 * rewards[2]]
    for k, column in enumerate(returns):
        expected = (column - column.mean()) / column.std(correction=0)
        found = steps.advantage[steps.k == k].flatten()
        assert torch.allclose(found, expected, atol=0.05)


def test_with_enough_returns_each_prompt_and_step_is_measured_by_its_own(make: MakeTrainer) -> None:
    trainer = make({"algorithm.min_count": 4}, ddim=True)
    toy_decoder(trainer)
    steps = collect(trainer)
    assert trainer.ctx.take_metrics()["own_statistics"] == 1
    for text in (0, 1):
        for k in (0, 1, 2):
            own = steps.advantage[(steps.prompt.index == text) & (steps.k == k)]
            assert own.numel() == 4 and float(own.mean()) == pytest.approx(0, abs=1e-4)
            assert float(own.std(correction=0)) == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("baseline", ["prompt", "batch"])
def test_measured_by_the_prompt_or_by_the_round_the_steps_are_taken_together(make: MakeTrainer, baseline: str) -> None:
    trainer = make({"algorithm.min_count": 4, "algorithm.baseline": baseline}, ddim=True)
    toy_decoder(trainer)
    steps = collect(trainer)
    groups = [steps.prompt.index == text for text in (0, 1)] if baseline == "prompt" else [steps.k >= 0]
    for group in groups:
        own = steps.advantage[group]
        assert float(own.mean()) == pytest.approx(0, abs=1e-4)
        assert float(own.std(correction=0)) == pytest.approx(1, abs=1e-2)
    assert float(steps.advantage[steps.k == 0].mean()) > float(steps.advantage[steps.k == 2].mean())  # sums of more


# the updates


def walks_of(rows: PairedSteps) -> list[tuple[int, int]]:
    return list(zip(rows.pair.tolist(), rows.k.tolist(), strict=True))


def test_an_update_holds_one_step_of_each_pair_drawn_for_each_and_a_round_holds_all_once(make: MakeTrainer) -> None:
    trainer = make({"sampler.num_steps": 4, "train.rows_per_update": 8, "algorithm.pairs": 4}, ddim=True)
    collected = collect(trainer)
    found = parts(trainer, collected)
    assert [len(rows) for rows in found] == [8] * 4
    assert all(sorted(rows.pair.tolist()) == list(range(8)) for rows in found)
    assert any(len(set(rows.k.tolist())) > 1 for rows in found)
    assert sorted(row for rows in found for row in walks_of(rows)) == [(p, k) for p in range(8) for k in range(4)]
    # All that belongs to a step travels with it.
    for rows in found:
        for row, (pair, k) in enumerate(walks_of(rows)):
            there = collected.select(((collected.pair == pair) & (collected.k == k)).nonzero()[:, 0])
            assert torch.equal(rows.x_next[row], there.x_next[0])
            assert torch.equal(rows.advantage[row], there.advantage[0])
            assert torch.equal(rows.prompt.features[row], there.prompt.features[0])
            with torch.no_grad():
                log_prob = method(trainer).log_prob(there, trainer.ctx)[0]
            assert rows.old_log_prob is not None and torch.allclose(rows.old_log_prob[row], log_prob, atol=1e-4)


def test_the_pairs_of_a_slot_are_dealt_out_evenly_and_no_update_reaches_into_the_next(make: MakeTrainer) -> None:
    trainer = make(ddim=True)
    collected = collect(trainer)
    for size, sizes in {100: [4] * 3, 4: [4] * 3, 3: [4] * 3, 2: [2] * 6, 1: [1] * 12}.items():
        trainer.ctx.rows_per_update = size
        assert [len(rows) for rows in parts(trainer, collected)] == sizes


def test_in_order_an_update_holds_one_step_of_all_pairs_and_accumulated_all_steps_of_its_pairs(
    make: MakeTrainer,
) -> None:
    trainer = make({"algorithm.order": "in_order", "train.rows_per_update": 2}, ddim=True)
    collected = collect(trainer)
    assert [rows.k.tolist() for rows in parts(trainer, collected)] == [[k] * 2 for k in (0, 0, 1, 1, 2, 2)]
    method(trainer).order = "accumulated"
    found = [sorted(walks_of(rows)) for rows in parts(trainer, collected)]
    assert [len(rows) for rows in found] == [6, 6]
    assert sorted(found[0] + found[1]) == [(p, k) for p in range(4) for k in range(3)]
    assert all(len({p for p, _ in rows}) == 2 for rows in found)


def test_a_share_of_the_steps_is_drawn_for_each_pair(make: MakeTrainer) -> None:
    settings = {"algorithm.step_fraction": 0.5, "algorithm.pairs": 4, "sampler.num_steps": 5}
    trainer = make(settings)
    steps = collect(trainer)
    chosen = [tuple(pair) for pair in steps.k.view(8, 2).tolist()]
    assert all(a < b for a, b in chosen) and len(set(chosen)) > 1
    found = [row for rows in parts(trainer, steps) for row in walks_of(rows)]
    assert sorted(found) == sorted(walks_of(steps)) and len(set(found)) == 16
    assert len(collect(make(settings | {"algorithm.step_fraction": 0.01}))) == 8


def test_inner_epochs_go_over_the_same_steps_in_another_order_with_the_same_old_likelihoods(make: MakeTrainer) -> None:
    trainer = make({"algorithm.inner_epochs": 2, "algorithm.pairs": 4})
    found = parts(trainer, collect(trainer))
    half = len(found) // 2
    rows = [[row for part in p for row in walks_of(part)] for p in (found[:half], found[half:])]
    assert sorted(rows[0]) == sorted(rows[1]) and rows[0] != rows[1]
    old = [{tuple(v) for part in p for v in part.old_log_prob.tolist()} for p in (found[:half], found[half:])]  # type: ignore[union-attr]
    assert old[0] == old[1] and (0.0, 0.0) not in old[0]


def test_after_an_update_the_log_ratios_of_the_next_have_left_zero(make: MakeTrainer) -> None:
    trainer = make({"train.learning_rate": 1e-2})
    first, second = trainer.round()
    assert first.metrics["log_ratio_size"] == 0 < second.metrics["log_ratio_size"]
    assert second.metrics["clip_fraction"] > 0


# what cannot be scored, what cannot be learned from


REWARDS = """
    from alignkit import hookimpl

    @hookimpl
    def register_rewards(register):
        register("constant", "odd_rewards.rewards:Constant", "The same for every picture")
        register("partial", "odd_rewards.rewards:Partial", "The first picture cannot be scored")
        register("unscored", "odd_rewards.rewards:Unscored", "No picture can be scored")
"""

REWARD_CLASSES = """
    import torch
    from alignkit.interfaces import Reward, Scores


    class Constant(Reward):
        def __call__(self, images, examples):
            return torch.ones(len(images), dtype=torch.long)


    class Partial(Reward):
        def __call__(self, images, examples):
            return Scores(images.mean((1, 2, 3)), torch.arange(len(images)) > 0)


    class Unscored(Reward):
        def __call__(self, images, examples):
            return Scores(images.mean((1, 2, 3)), torch.zeros(len(images), dtype=torch.bool))
"""


def test_a_reward_that_tells_nothing_apart_moves_nothing_and_what_rests_on_no_score_is_left_out(
    make: MakeTrainer, plugins: Any
) -> None:
    plugins.install("odd_rewards", REWARDS, rewards=REWARD_CLASSES)
    trainer = make({"reward": ["constant"]})
    for rows in parts(trainer, collect(trainer)):
        assert rows.advantage.tolist() == [[0, 0]] * 4
        assert float(gradients(trainer, trainer.algorithm.loss(rows, trainer.ctx)[0]).abs().max()) == 0
    trainer = make({"reward": ["partial"]})
    steps = collect(trainer)
    found = parts(trainer, steps)
    # The first prediction of the first walk: its return is unknown, those behind it are not.
    assert sorted(row for rows in found for row in walks_of(rows)) == [(p, k) for p in range(4) for k in (0, 1)][1:]
    assert all(bool(rows.advantage.isfinite().all()) for rows in found)
    trainer = make({"reward": ["unscored"]})
    assert parts(trainer, collect(trainer)) == []


@pytest.mark.parametrize("sampler", [{"sampler.num_steps": 1}, {"sampler.name": "ddim", "sampler.eta": 0.0}])
def test_without_a_stochastic_step_a_run_is_refused_before_weights_load(
    tiny_run: Callable[..., Run], sampler: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"every step of \w+ is deterministic .* algorithm sdpo"):
        tiny_run(overrides=SETTINGS | sampler).check()


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


def test_a_run_goes_on_from_its_state_as_if_it_had_not_stopped(make: MakeTrainer) -> None:
    settings = {"algorithm.min_count": 3, "algorithm.buffer_size": 4, "train.updates": 9}
    first = make(settings)
    for _ in range(2):
        list(first.round())
    saved = copy.deepcopy((first.state_dict(), first.rank_state()))
    expected = [dict(update.metrics) for update in first.round()]
    assert expected[0]["own_statistics"] > 0
    second = make(settings)
    second.load_state_dict(saved[0])
    second.load_rank_state(saved[1])
    assert [dict(update.metrics) for update in second.round()] == expected
    pairs = zip(first.ctx.policy.parameters(), second.ctx.policy.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert first.algorithm.state_dict() == second.algorithm.state_dict()


@pytest.mark.parametrize(
    ("ddim", "scale", "rate"),
    [(False, 20, 5e-3), (True, 4, 1e-2)],  # consistency latents of this untrained network are the larger ones
)
def test_the_true_reward_rises_on_a_toy_reward(make: MakeTrainer, ddim: bool, scale: float, rate: float) -> None:
    trainer = make({
        "algorithm.pairs": 4, "data.batch_size": 4, "sampler.num_steps": 4, "model.lora_rank": 8,
        "train.updates": 12 * (4 if ddim else 3), "train.rows_per_update": 16, "train.rows_per_pass": 16,
        "train.learning_rate": rate,
    }, ddim)  # fmt: skip
    toy_decoder(trainer, scale)
    updates = []
    while not trainer.finished:
        updates += [update for update in trainer.round() if update.reward == update.reward]
    rewards = [update.reward for update in updates]
    assert len(rewards) == 12  # one a round
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.02
