"""Preferences as log-odds: golden divergences, their gradients, and what is held of real images."""

from __future__ import annotations

import math

import pytest
import torch

from alignkit_rg_lcd.preference import Direction, divergence, margins, preference_loss, with_real_images

DIRECTIONS: list[Direction] = ["forward", "reverse"]


@pytest.mark.parametrize(("direction", "golden"), [("forward", 0.71040447), ("reverse", 0.88775589)])
def test_the_divergence_is_golden_in_both_directions(direction: Direction, golden: float) -> None:
    proxy, expert = torch.tensor([1.0 - 0.2], dtype=torch.float64), torch.tensor([0.1 - 2.1], dtype=torch.float64)
    assert float(divergence(proxy, expert, direction)) == pytest.approx(golden, abs=1e-8)
    # The same from the two distributions, as torch has it.
    p, q = torch.tensor([[1.0, 0.2]]).softmax(1), torch.tensor([[0.1, 2.1]]).softmax(1)
    first, second = (q, p) if direction == "forward" else (p, q)
    expected = torch.nn.functional.kl_div(second.log(), first, reduction="batchmean")
    assert float(expected) == pytest.approx(golden, abs=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_divergence_is_zero_with_zero_gradient_where_the_margins_agree_and_nowhere_else(
    direction: Direction,
) -> None:
    odds = torch.linspace(-3, 3, 7, dtype=torch.float64)
    proxy = odds[:, None].expand(7, 7).clone().requires_grad_()
    apart = divergence(proxy, odds[None, :].expand(7, 7), direction)
    (gradient,) = torch.autograd.grad(apart.sum(), proxy)
    equal = torch.eye(7, dtype=torch.bool)
    assert torch.allclose(apart[equal], torch.zeros(7, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(gradient[equal], torch.zeros(7, dtype=torch.float64), atol=1e-12)
    assert bool((apart[~equal] > 1e-3).all()) and bool((gradient[~equal].abs() > 1e-3).all())


def test_scores_are_compared_in_three_pairs_and_a_constant_changes_none() -> None:
    scores = torch.tensor([[1.0, 3.0, 7.0]])
    assert margins(scores).tolist() == margins(scores + 5).tolist() == [[-2.0, -6.0, -4.0]]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_loss_sums_over_pairs_and_is_a_mean_over_rows_in_any_order(direction: Direction) -> None:
    generator = torch.Generator().manual_seed(0)
    proxy, expert = torch.randn(2, 6, 3, generator=generator)
    loss = preference_loss(proxy, expert, direction)
    rows = torch.stack([preference_loss(proxy[[i]], expert[[i]], direction) for i in range(6)])
    assert torch.allclose(loss, rows.mean(), atol=1e-6)
    assert torch.allclose(rows[0], divergence(proxy[0], expert[0], direction).sum(), atol=1e-6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.allclose(preference_loss(proxy[order], expert[order], direction), loss, atol=1e-6)


def test_a_pair_with_an_image_that_could_not_be_scored_has_no_gradient() -> None:
    rewards = torch.tensor([[0.5, math.nan, 0.1], [0.1, 0.2, 0.3]])
    proxy = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = preference_loss(proxy, margins(rewards), "forward")
    (gradient,) = torch.autograd.grad(loss, proxy)
    assert bool(loss.isfinite()) and (gradient == 0).tolist() == [[True, False, True], [False, False, False]]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_preference_beyond_doubt_stays_finite(direction: Direction) -> None:
    proxy = torch.tensor([[-20.0, 0.0, 20.0]], requires_grad=True)
    loss = preference_loss(proxy, torch.tensor([[1e4, -1e4, 1e4]]), direction)
    (gradient,) = torch.autograd.grad(loss, proxy)
    assert bool(loss.isfinite()) and bool(gradient.isfinite().all())


def test_a_real_image_may_be_held_to_be_no_worse_or_better_than_what_was_predicted() -> None:
    odds = torch.tensor([[-1.0, 2.0, -3.0], [math.nan, -2.0, 1.0]])
    assert with_real_images(odds, "judged") is odds
    even, best = with_real_images(odds, "never_worse"), with_real_images(odds, "always_best")
    assert even[0].tolist() == [0.0, 2.0, -3.0] and best[0, 2] == -3.0  # predictions are compared as before
    assert best[0, :2].sigmoid().tolist() == [1.0, 1.0] and even[0, :1].sigmoid().tolist() == [0.5]
    assert bool(even[1, 0].isnan()) and bool(best[1, 0].isnan())
