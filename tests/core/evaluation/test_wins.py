"""Win rates between two measurements."""

from __future__ import annotations

import math

import pytest
import torch

from alignkit.evaluation.measure import Measurement, win_rates
from alignkit.evaluation.wins import win_rate


def measured(*samples: list[float]) -> Measurement:
    each = torch.tensor(samples)
    return Measurement({(1, "red"): each.nanmean(0)}, torch.empty(0), each={(1, "red"): each})


def test_pairs_of_the_same_noise_are_compared_and_ties_count_half() -> None:
    one = measured([1.0, 0.5, 0.2], [1.0, 0.5, 0.9])
    other = measured([0.0, 0.5, 0.5], [2.0, 0.5, 0.5])
    (found,) = win_rates("a", one, "b", other, "red")
    assert (found.first, found.second, found.reward, found.num_steps, found.count) == ("a", "b", "red", 1, 3)
    assert found.rate == pytest.approx((0.5 + 0.5 + 0.5) / 3) and found.ties == pytest.approx(2 / 6)
    assert 0 < found.low < found.rate < found.high < 1


def test_images_without_a_score_are_left_out() -> None:
    (found,) = win_rates("a", measured([1.0, math.nan]), "b", measured([0.0, 0.0]), "red")
    assert (found.rate, found.count) == (1.0, 1)
    assert win_rates("a", measured([math.nan]), "b", measured([0.0]), "red") == []
    assert win_rates("a", measured([1.0]), "b", measured([0.0]), "blue") == []


def test_the_interval_counts_prompts_and_not_images() -> None:
    few = win_rate("a", "b", "red", 1, [[(1.0, 0.0)] * 10] * 4)
    many = win_rate("a", "b", "red", 1, [[(1.0, 0.0)]] * 40)
    assert few is not None and many is not None
    assert few.high == many.high == 1 and few.low < many.low
    assert few.low == pytest.approx(4 / (4 + 1.96**2))
