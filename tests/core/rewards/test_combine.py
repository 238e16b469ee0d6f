"""Combining rewards: statistics against direct computations, and lower bounds that are kept."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from alignkit.config.sections import RewardConfig, ScoringConfig
from alignkit.errors import ConfigError
from alignkit.records import Scores
from alignkit.rewards.combine import Combination, Statistics
from alignkit.training.checkpoint import load, save

A, B = RewardConfig("a", weight=1.0), RewardConfig("b", weight=0.2)


def scores(a: Tensor, b: Tensor, weights: tuple[float, float] = (1.0, 0.2)) -> Scores:
    valid = ~(a.isnan() | b.isnan())
    return Scores(weights[0] * a + weights[1] * b, valid, {"a": a, "b": b})


def sampled(seed: int, count: int = 40, spread: float = 0.01) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    return scores(22 + torch.randn(count, generator=generator), spread * torch.randn(count, generator=generator))


def z_score(values: Tensor, of: Tensor | None = None) -> Tensor:
    of = values if of is None else of
    return (values - of.mean()) / of.std(correction=0)


def rounds(combination: Combination, *each: Scores) -> dict[str, float]:
    for one in each:
        combination.values(one)
        combination.see(one)
        metrics = combination.begin_round()
    return metrics


def test_statistics_of_parts_together_are_those_of_the_whole() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0)).double() * 1e-3 + 1e3
    values[7] = torch.nan
    together = Statistics()
    for part in values.split(9):
        together = together.merged(Statistics.of(part))
    known = values[~values.isnan()]
    assert together.count == 49
    assert together.mean == pytest.approx(float(known.mean()), rel=1e-12)
    assert together.std == pytest.approx(float(known.std(correction=0)), rel=1e-9)
    assert Statistics().merged(Statistics()) == Statistics.of(torch.tensor([torch.nan])) == Statistics()


def test_the_plain_sum_is_passed_through() -> None:
    combination, found = Combination([A, B], ScoringConfig()), sampled(0)
    assert combination.values(found) is found.values
    assert list(combination.terms(found)) == [""]
    assert rounds(combination, found) == {} and combination.values(found) is found.values


def test_the_first_scores_are_normalised_by_those_that_were_seen() -> None:
    combination, both = Combination([A, B], ScoringConfig(combine="normalised")), sampled(0)
    own = both.select(slice(20))
    combination.see(own)
    expected = z_score(both.parts["a"], own.parts["a"]) + 0.2 * z_score(both.parts["b"], own.parts["b"])
    torch.testing.assert_close(combination.values(both), expected, atol=4e-3, rtol=0)


def test_normalised_scores_are_weighted_z_scores() -> None:
    combination, first = Combination([A, B], ScoringConfig(combine="normalised")), sampled(0)
    expected = z_score(first.parts["a"]) + 0.2 * z_score(first.parts["b"])
    torch.testing.assert_close(combination.values(first), expected, atol=2e-3, rtol=0)
    assert float(torch.corrcoef(torch.stack([first.values, first.parts["b"]]))[0, 1].abs()) < 0.2
    found = Combination([B, A], ScoringConfig(combine="normalised")).values(first)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def test_the_scale_is_constant_within_a_round_and_updated_by_all_of_it() -> None:
    combination = Combination([A, B], ScoringConfig(combine="normalised", statistics_decay=1.0))
    one, other = sampled(0), sampled(1, spread=0.1)
    before = combination.values(one)
    combination.see(one)
    assert torch.equal(combination.values(one), before)
    by_first = z_score(other.parts["b"], one.parts["b"])
    expected = z_score(other.parts["a"], one.parts["a"]) + 0.2 * by_first
    torch.testing.assert_close(combination.values(other), expected, atol=2e-2, rtol=0)
    combination.see(other)
    combination.begin_round()
    both = torch.cat([one.parts["b"], other.parts["b"]])
    alone = combination.values(scores(torch.cat([one.parts["a"], other.parts["a"]]), both))
    of_a = z_score(torch.cat([one.parts["a"], other.parts["a"]]))
    torch.testing.assert_close(alone, of_a + 0.2 * z_score(both), atol=2e-3, rtol=0)


def test_decay_forgets_old_scores() -> None:
    combination = Combination([A, B], ScoringConfig(combine="normalised", statistics_decay=0.5))
    a = torch.tensor([0.0, 1.0])
    rounds(combination, scores(a, a), *[scores(a + 100, a)] * 30)
    assert combination._running["a"].mean == pytest.approx(100.5, abs=1e-4)
    assert combination._running["a"].count == pytest.approx(4, abs=1e-6)  # 2 / (1 - 0.5)


def test_an_image_that_could_not_be_scored_enters_no_statistics_and_stays_nan() -> None:
    combination = Combination([A, B], ScoringConfig(combine="normalised"))
    a, b = torch.tensor([1.0, torch.nan, 3.0]), torch.tensor([1.0, 2.0, 3.0])
    found = combination.values(scores(a, b))
    assert found.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(found[[0, 2]], torch.tensor([-1.0, 1.0]) + 0.2 * torch.tensor([-1.2247, 1.2247]))


def test_a_constant_reward_adds_nothing() -> None:
    combination, a = Combination([A, B], ScoringConfig(combine="normalised")), torch.tensor([1.0, 2.0, 4.0])
    torch.testing.assert_close(combination.values(scores(a, torch.full((3,), 0.1))), z_score(a), atol=1e-4, rtol=0)


def test_normalising_scales_the_gradient_and_keeps_its_direction() -> None:
    combination = Combination([A, B], ScoringConfig(combine="normalised"))
    a = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    combination.values(scores(a, a * 3)).sum().backward()
    spread = float(a.detach().std(correction=0))
    torch.testing.assert_close(a.grad, torch.full((3,), 1 / spread + 0.2 / spread), rtol=1e-4, atol=0)


def test_all_processes_normalise_by_the_scores_of_all() -> None:
    other = sampled(1)
    elsewhere = {name: Statistics.of(other.parts[name]) for name in ("a", "b")}
    combination = Combination([A, B], ScoringConfig(combine="normalised"), lambda mine: [*mine, elsewhere])
    one = sampled(0)
    both = {name: torch.cat([one.parts[name], other.parts[name]]) for name in ("a", "b")}
    expected = z_score(one.parts["a"], both["a"]) + 0.2 * z_score(one.parts["b"], both["b"])
    torch.testing.assert_close(combination.values(one), expected, atol=2e-3, rtol=0)


# floors

HELD = RewardConfig("b", weight=0.2, at_least="start")
SCORING = ScoringConfig(combine="normalised", start_rounds=2, multiplier_rate=0.1)


def test_a_multiplier_follows_its_equation() -> None:
    combination = Combination([A, RewardConfig("b", weight=0.2, at_least=0.5)], SCORING)
    a, b = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.4])
    metrics = rounds(combination, scores(a, b))
    expected = 0.1 * (0.5 - 0.2) / (0.2 + 1e-6)
    assert metrics == {"reward/b/floor": 0.5, "reward/b/multiplier": pytest.approx(expected)}
    assert combination.weights() == {
        "a": pytest.approx(1 / (1 + expected)), "b": pytest.approx((0.2 + expected) / (1 + expected)),
    }  # fmt: skip
    high = scores(a, torch.tensor([9.0, 9.4]))
    assert rounds(combination, high, high, high)["reward/b/multiplier"] == 0  # never below


def test_the_start_is_the_mean_of_the_first_rounds_and_no_bound_until_then() -> None:
    combination = Combination([A, HELD], SCORING)
    a = torch.tensor([0.0, 1.0])
    assert rounds(combination, scores(a, torch.tensor([1.0, 2.0]))) == {}
    assert rounds(combination, scores(a, torch.tensor([3.0, 4.0]))) == {}
    assert combination.weights() == {"a": 1.0, "b": 0.2}
    metrics = rounds(combination, scores(a, torch.tensor([0.0, 1.0])))
    assert metrics["reward/b/floor"] == 2.5 and metrics["reward/b/multiplier"] > 0


@pytest.mark.parametrize("floor", [0.75, 0.96])
def test_a_floor_is_kept_where_the_sum_alone_would_violate_it(floor: float) -> None:
    """Maximise x subject to 1 - x^2 >= floor: without the multiplier x diverges, with it the mean stays there."""

    def climbed(rewards: list[RewardConfig]) -> float:
        combination = Combination(rewards, ScoringConfig(combine="normalised", start_rounds=1, multiplier_rate=0.5))
        generator, x = torch.Generator().manual_seed(0), torch.zeros((), requires_grad=True)
        means = []
        for _ in range(600):
            combination.begin_round()
            samples = x + 0.02 * torch.randn(64, generator=generator)
            found = scores(samples, 1 - samples**2, (1.0, 0.0))
            (slope,) = torch.autograd.grad(combination.values(found).mean(), x)
            combination.see(found)
            with torch.no_grad():
                x += 2e-4 * slope
            means.append(float(1 - x.detach() ** 2))
        return sum(means[-100:]) / 100

    bounded = climbed([A, RewardConfig("b", weight=0.0, at_least=floor)])
    free = climbed([A, RewardConfig("b", weight=0.0)])
    assert bounded == pytest.approx(floor, abs=0.02) and free < floor - 0.2


def test_a_combination_continues_from_a_checkpoint(tmp_path: Any) -> None:
    first, second = Combination([A, HELD], SCORING), Combination([A, HELD], SCORING)
    rounds(first, sampled(0), sampled(1), sampled(2))
    first.see(sampled(3))
    second.load_state_dict(load(save(tmp_path, 1, first.state_dict())))
    assert second.begin_round() == first.begin_round() != {}
    assert torch.equal(first.values(sampled(4)), second.values(sampled(4)))
    assert first.state_dict() == second.state_dict()


def test_separate_advantages_get_each_reward_with_its_weight() -> None:
    combination = Combination([A, B], ScoringConfig(combine="advantage"))
    a, b = torch.tensor([1.0, torch.nan, 3.0]), torch.tensor([1.0, 2.0, 3.0])
    terms = combination.terms(scores(a, b))
    assert {name: weight for name, (weight, _) in terms.items()} == {"a": 1.0, "b": 0.2}
    assert all(math.isnan(column[1]) for _, column in terms.values())


@pytest.mark.parametrize(
    ("rewards", "scoring", "message"),
    [
        ([A, B], ScoringConfig(combine="advantage"), r'scoring\.combine: found "advantage", but algorithm lasro'),
        ([HELD], SCORING, r"reward\.at_least: b is the only reward"),
        ([A, HELD], ScoringConfig(), r'reward\.at_least: set for b while scoring\.combine is "sum"'),
        ([RewardConfig("a", weight=0.0)], ScoringConfig(), "every weight is 0"),
    ],
)
def test_settings_that_cannot_be_combined_are_refused(
    rewards: list[RewardConfig], scoring: ScoringConfig, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Combination.check(rewards, scoring, takes_advantages=False, algorithm="lasro")
