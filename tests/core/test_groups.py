"""The best and the worst sample of a group, and how well scores rank a group."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from alignkit.groups import extremes, rank_correlation

NAN = float("nan")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_extremes_of_a_group_are_its_best_and_worst_and_the_first_of_equals() -> None:
    rewards = torch.tensor([[0.1, 0.9, 0.4], [1.0, 0.0, 1.0], [0.0, 0.5, 0.0]])
    best, worst, labelled = extremes(rewards)
    assert best.tolist() == [1, 0, 1] and worst.tolist() == [0, 1, 0] and labelled.tolist() == [True] * 3


def test_a_tied_group_gives_no_pair() -> None:
    _, _, labelled = extremes(torch.tensor([[0.5, 0.5, 0.5], [0.0, 0.0, 0.0]]))
    assert labelled.tolist() == [False, False]


def test_extremes_leave_out_what_could_not_be_scored() -> None:
    rewards = torch.tensor([[NAN, 0.2, 0.7], [NAN, NAN, 0.7], [NAN, NAN, NAN]])
    best, worst, labelled = extremes(rewards)
    assert labelled.tolist() == [True, False, False] and (int(best[0]), int(worst[0])) == (2, 1)


def correlation(scores: Tensor, rewards: Tensor) -> float:
    return float(rank_correlation(scores, rewards))


def test_the_rank_correlation_is_that_of_scipy_with_ties() -> None:
    scores = torch.rand(30, 6, generator=generator(1))
    rewards = torch.randint(0, 3, (30, 6), generator=generator(2)).float()
    rewards[0] = 1.0  # a group that does not vary is left out
    expected = [spearmanr(s, r).statistic for s, r in zip(scores[1:].numpy(), rewards[1:].numpy(), strict=True)]
    assert correlation(scores, rewards) == pytest.approx(sum(expected) / len(expected), abs=1e-5)


def test_the_rank_correlation_of_groups_with_an_unscored_sample_is_not_taken() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    rewards = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, NAN]])
    assert correlation(scores, rewards) == pytest.approx(1.0)
    assert correlation(scores[1:], rewards[1:]) != correlation(scores[1:], rewards[1:])  # NaN
