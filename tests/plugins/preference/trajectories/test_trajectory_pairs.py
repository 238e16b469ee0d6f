"""Pairs of trajectories: one prompt, one reward each, and the steps that have a likelihood."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.runs.run import Run
from alignkit.training.trainer import Trainer
from alignkit_preference.trajectory_pairs import Pairs, collect_pairs, log_prob

MakeTrainer = Callable[..., Trainer]


def sampled(trainer: Trainer, pairs: int = 2, shared_noise: bool = False) -> Pairs:
    with torch.no_grad():
        found, scores = collect_pairs(trainer.batch(), pairs, shared_noise, trainer.ctx)
    # The two of a pair are consecutive in the scores.
    assert bool(scores.valid.all()) and torch.equal(found.rewards, scores.values.view(-1, 2))
    return found


def test_a_pair_is_two_trajectories_of_one_prompt_with_the_rewards_of_their_images(make: MakeTrainer) -> None:
    trainer = make("rebel")
    pairs, ctx = sampled(trainer), trainer.ctx
    assert pairs.x.shape == pairs.x_next.shape == (4, 2, 2, 4, 8, 8) and pairs.k.tolist() == [[0, 1]] * 4
    assert pairs.prompt.index.tolist() == [0, 0, 1, 1]
    assert torch.equal(pairs.x[:, :, 1], pairs.x_next[:, :, 0])
    for member in (0, 1):
        with torch.no_grad():
            k = torch.full((4,), 2)
            last = ctx.sampler.transition(ctx.policy, pairs.x_next[:, member, 1], k, pairs.prompt).clean
            brightness = ctx.policy.decode(last).mean((1, 2, 3))
        assert torch.allclose(pairs.rewards[:, member], brightness, atol=3e-3)  # of 8-bit images


def test_two_trajectories_start_from_one_noise_where_they_should_and_part_at_once(make: MakeTrainer) -> None:
    trainer = make("rebel")
    for shared in (True, False):
        pairs = sampled(trainer, shared_noise=shared)
        assert torch.equal(pairs.x[:, 0, 0], pairs.x[:, 1, 0]) == shared
        assert not torch.equal(pairs.x[:, 0, 1], pairs.x[:, 1, 1])
        assert len({tuple(x.flatten().tolist()) for x in pairs.x[:, 0, 0]}) == 4


@pytest.mark.parametrize("ddim", [False, True])
def test_the_log_probability_of_each_step_is_that_of_the_step_alone(make: MakeTrainer, ddim: bool) -> None:
    trainer = make("rebel", ddim=ddim)
    pairs, ctx = sampled(trainer), trainer.ctx
    steps = 3 if ddim else 2
    with torch.no_grad():
        together = log_prob(pairs, ctx)
        single = log_prob(pairs.by_step(), ctx)
        summed = log_prob(pairs, ctx, "sum")
        alone = ctx.sampler.transition(
            ctx.policy, pairs.x[1:2, 1, 1], pairs.k[1:2, 1], pairs.prompt.select(torch.tensor([1]))
        )
    assert together.shape == (4, 2, steps) and single.shape == (4 * steps, 2, 1)
    assert torch.allclose(together.transpose(1, 2).reshape(-1, 2), single[:, :, 0], atol=1e-4)
    assert together[1, 1, 1].item() == pytest.approx(alone.log_prob(pairs.x_next[1:2, 1, 1]).item(), abs=1e-4)
    assert torch.allclose(summed, 256 * together, rtol=1e-4)


def test_swapping_exchanges_trajectories_and_rewards_in_the_rows_named(make: MakeTrainer) -> None:
    pairs = sampled(make("rebel"))
    where = torch.tensor([True, False, True, False])
    found = pairs.swapped(where)
    for row, swapped in enumerate(where.tolist()):
        for ours, theirs in ((found.x, pairs.x), (found.x_next, pairs.x_next), (found.rewards, pairs.rewards)):
            assert torch.equal(ours[row], theirs[row].flip(0) if swapped else theirs[row])


@pytest.mark.parametrize("name", ["rebel", "d3po"])
def test_without_a_stochastic_step_a_run_is_refused(tiny_run: Callable[..., Run], name: str) -> None:
    changes: dict[str, Any] = {"algorithm.name": name, "sampler.num_steps": 1}
    with pytest.raises(ConfigError, match=f"every step of lcm is deterministic .* algorithm {name}"):
        tiny_run(overrides=changes).check()
