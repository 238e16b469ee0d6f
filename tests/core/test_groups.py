"""The best and the worst sample of a group, and how well scores rank a group."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alignkit.groups import Scored, best_and_worst, extremes, rank_correlation
from alignkit.records import Prompt

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


@pytest.mark.parametrize("size", [4, 2])
def test_a_pair_is_the_best_and_the_worst_of_a_labelled_group_under_its_own_text(size: int) -> None:
    rewards = torch.tensor([[0.1, 0.9, 0.4], [0.5, 0.5, 0.5], [3.0, NAN, 1.0], [2.0, 0.0, 1.0]])
    latents = rewards.nan_to_num(-9)[:, :, None] + 10 * torch.arange(4)[:, None, None]
    text = torch.tensor([2, 0, 1, 1])
    prompt = Prompt(torch.zeros(3, 1, 1), torch.arange(3), text_table=("x", "y", "z"))
    scored = Scored(latents, rewards, text, torch.zeros(4, dtype=torch.long))
    pairs = best_and_worst(scored, prompt, size, generator())
    assert pairs is not None and len(pairs) == min(size, 3)
    expected = [(0.9, 0.1, "z"), (23.0, 21.0, "y"), (32.0, 30.0, "y")]
    found = [(float(w), float(v), t) for w, v, t in zip(pairs.winner, pairs.loser, pairs.prompt.texts, strict=True)]
    for winner, loser, name in found:
        assert any((winner, loser) == pytest.approx(e[:2]) and name == e[2] for e in expected)
    assert len({winner for winner, _, _ in found}) == len(found)


def test_groups_without_a_label_give_no_pair() -> None:
    prompt = Prompt(torch.zeros(1, 1, 1), torch.arange(1))
    scored = Scored(torch.zeros(1, 2, 1), torch.ones(1, 2), torch.zeros(1, dtype=torch.long), torch.zeros(1).long())
    assert best_and_worst(scored, prompt, 4, generator()) is None


def correlation(scores: Tensor, rewards: Tensor) -> float:
    return float(rank_correlation(scores, rewards))


def test_the_rank_correlation_is_that_of_scipy_with_ties() -> None:
    from scipy.stats import spearmanr

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
