"""Dense rewards and returns: golden values, limits, and the effect of an image that could not be scored."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from alignkit_sdpo.dense import (
    adaptive_anchor,
    by_interpolation,
    by_similarity,
    discounted_returns,
    queried_steps,
    similarity,
)

GOLDEN = torch.tensor([[[1, 0, 0], [0.8, 0.6, 0], [0.6, 0.8, 0], [0, 0.6, 0.8], [0, 0, 1]]])


def steps(*numbers: int) -> Tensor:
    return torch.tensor([numbers])


def trajectories(count: int, num_steps: int) -> Tensor:
    return torch.randn(count, num_steps, 4, 2, 2, generator=torch.Generator().manual_seed(0))


def queried(clean: Tensor, queries: str, anchor: str = "adaptive", seed: int = 0) -> list[list[int]]:
    found: list[list[int]] = queried_steps(clean, queries, anchor, torch.Generator().manual_seed(seed)).tolist()
    return found


def test_three_queries_and_the_anchor_are_golden() -> None:
    step = queried_steps(GOLDEN, "three", "adaptive", torch.Generator())
    assert step.tolist() == [[0, 2, 4]]
    dense = by_similarity(GOLDEN, step, torch.tensor([[1.0, 2.0, 4.0]]))
    assert dense[0].tolist() == pytest.approx([1, 1.5454545, 2, 3.25, 4], abs=1e-6)


def test_returns_are_golden() -> None:
    found = discounted_returns(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 0.99)
    assert found[0].tolist() == pytest.approx([9.801496, 8.8904, 6.96, 4.0], abs=1e-6)


def test_without_discount_the_rewards_add_up_and_with_a_discount_of_zero_each_stands_alone() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.0, -1.0]])
    assert discounted_returns(rewards, 1.0).tolist() == [[6, 5, 3], [-0.5, -1, -1]]
    assert discounted_returns(rewards, 0.0).tolist() == rewards.tolist()


def test_a_step_without_a_score_taints_the_returns_before_it_and_none_after() -> None:
    rewards = torch.tensor([[1.0, torch.nan, 3.0]])
    assert discounted_returns(rewards, 0.5).isnan().tolist() == [[True, True, False]]
    assert discounted_returns(rewards, 0.0).isnan().tolist() == [[False, True, False]]


def test_likeness_is_the_cosine_whatever_the_length_of_a_latent() -> None:
    clean = trajectories(3, 5)
    at = torch.tensor([0, 4, 2])
    scaled = clean * torch.arange(1, 6).view(1, 5, 1, 1, 1)
    found = similarity(scaled, at)
    assert torch.allclose(found, similarity(clean, at), atol=1e-6)
    flat = clean.flatten(2).double()
    for n, k in enumerate(at.tolist()):
        expected = flat[n] @ flat[n, k] / (flat[n].norm(dim=1) * flat[n, k].norm())
        assert torch.allclose(found[n].double(), expected, atol=1e-6)
        assert float(found[n, k]) == pytest.approx(1, abs=1e-6)


def test_the_anchor_lies_between_the_ends_even_where_an_end_is_least_alike() -> None:
    clean = torch.tensor([[[1.0, 0], [0.6, 0.8], [0, 1], [-0.6, 0.8]]])  # the sums are .4, .88, .8, .4
    assert adaptive_anchor(clean).tolist() == [2]
    assert set(adaptive_anchor(trajectories(200, 6)).tolist()) == {1, 2, 3, 4}
    with pytest.raises(ValueError, match="expected at least 3"):
        adaptive_anchor(trajectories(1, 2))


@pytest.mark.parametrize(
    ("num_steps", "queries", "anchor", "expected"),
    [
        (50, "three", "fixed", [0, 24, 49]),  # the 25th step of 50, as in the paper
        (5, "three", "fixed", [0, 2, 4]),
        (5, "two", "adaptive", [0, 4]),
        (5, "one", "adaptive", [4]),
        (5, "all", "adaptive", [0, 1, 2, 3, 4]),
        (4, "three", "adaptive", [0, 1, 2, 3]),
        (2, "three", "random", [0, 1]),
        (2, "two", "adaptive", [0, 1]),
        (2, "one", "adaptive", [1]),
        (1, "three", "adaptive", [0]),
        (1, "two", "adaptive", [0]),
        (1, "one", "adaptive", [0]),
    ],
)
def test_these_steps_are_queried(num_steps: int, queries: str, anchor: str, expected: list[int]) -> None:
    assert queried(trajectories(2, num_steps), queries, anchor) == [expected, expected]


def test_a_random_anchor_is_any_step_between_the_ends_and_the_generator_alone_decides() -> None:
    clean = trajectories(200, 6)
    found = queried(clean, "three", "random")
    assert {row[1] for row in found} == {1, 2, 3, 4} and {(row[0], row[2]) for row in found} == {(0, 5)}
    assert found == queried(clean, "three", "random") != queried(clean, "three", "random", seed=1)


def test_what_was_queried_stands_as_it_was_found() -> None:
    clean, step, rewards = trajectories(4, 6), torch.tensor([[0, 3, 5]] * 4), torch.randn(4, 3)
    for dense in (by_similarity(clean, step, rewards), by_interpolation(6, step, rewards)):
        assert torch.equal(dense.gather(1, step), rewards)
    every = torch.arange(6).repeat(4, 1)
    rewards = torch.randn(4, 6)
    assert torch.equal(by_similarity(clean, every, rewards), rewards)
    assert torch.equal(by_interpolation(6, every, rewards), rewards)


def test_by_likeness_every_reward_lies_within_those_that_were_queried() -> None:
    rewards = torch.tensor([[-1.0, 2.0, 5.0]] * 50)
    dense = by_similarity(trajectories(50, 8), torch.tensor([[0, 3, 7]] * 50), rewards)
    assert bool(((dense >= -1 - 1e-5) & (dense <= 5 + 1e-5)).all())


def test_a_step_that_resembles_no_queried_one_gets_their_mean() -> None:
    clean = torch.tensor([[[1.0, 0, 0], [-1, 0, -1], [0, 0, 1]]])
    assert by_similarity(clean, steps(0, 2), torch.tensor([[3.0, 5.0]]))[0].tolist() == pytest.approx([3, 4, 5])


def test_a_single_query_is_copied_to_every_step() -> None:
    step, rewards = torch.tensor([[4], [4]]), torch.tensor([[0.3], [-7.0]])
    for dense in (by_similarity(trajectories(2, 5), step, rewards), by_interpolation(5, step, rewards)):
        assert torch.allclose(dense, rewards.expand(2, 5))


def test_rewards_between_queries_are_interpolated_linearly() -> None:
    dense = by_interpolation(7, steps(0, 2, 6), torch.tensor([[1.0, 2.0, 4.0]]))
    assert dense[0].tolist() == pytest.approx([1, 1.5, 2, 2.5, 3, 3.5, 4])
    assert by_interpolation(3, steps(0, 2), torch.tensor([[1.0, 0.0]]))[0].tolist() == [1, 0.5, 0]


def test_a_query_without_a_score_leaves_no_guess_but_what_was_scored() -> None:
    rewards = torch.tensor([[1.0, torch.nan, 4.0]])
    dense = by_similarity(GOLDEN, steps(0, 2, 4), rewards)
    assert dense.isnan().tolist() == [[False, True, True, True, False]]
    assert dense[0, [0, 4]].tolist() == [1, 4]


def test_on_a_straight_trajectory_rewards_by_likeness_rise_monotonically() -> None:
    share = torch.linspace(0, 1, 9)[None, :, None]
    clean = (1 - share) * torch.tensor([1.0, 0.0]) + share * torch.tensor([0.0, 1.0])
    dense = by_similarity(clean, steps(0, 4, 8), torch.tensor([[0.0, 0.5, 1.0]]))[0].tolist()
    assert all(a < b for a, b in pairwise(dense))
