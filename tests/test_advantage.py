"""Advantages: golden values, and what must not enter the statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from alignkit.advantage import PromptTracker, over_batch, standardised
from alignkit.checkpoint import load, save


def context(gather: Callable[[Tensor], Tensor] = lambda values: values) -> Any:
    """All that this module asks of a context."""
    logged: dict[str, float] = {}
    return SimpleNamespace(gather=gather, log=lambda **m: logged.update({k: float(v) for k, v in m.items()}), to=logged)


def test_the_tracker_is_golden() -> None:
    tracker, ctx, texts = PromptTracker(size=4, min_count=3), context(), ["a", "a", "b", "b"]
    first = tracker.advantages(texts, torch.tensor([1.0, 2.0, 3.0, 4.0]), ctx)
    assert first.tolist() == pytest.approx([-1.34163959, -0.4472132, 0.4472132, 1.34163959], abs=1e-6)
    assert ctx.to["own_statistics"] == 0  # two rewards each: still measured by the batch
    second = tracker.advantages(texts, torch.tensor([3.0, 4.0, 0.0, 0.0]), ctx)
    assert second.tolist() == pytest.approx([0.4472132, 1.34163959, -0.98019551, -0.98019551], abs=1e-6)
    assert ctx.to["own_statistics"] == 1


def test_a_tracker_forgets_all_but_the_last_rewards_of_a_prompt() -> None:
    tracker = PromptTracker(size=2, min_count=2)
    for reward in (100.0, 1.0, 3.0):
        found = tracker.advantages(["a"], torch.tensor([reward]), context())
    assert found.tolist() == pytest.approx([1.0], abs=1e-5)  # of 1 and 3


def test_over_the_batch_it_is_the_z_score_of_the_whole_population() -> None:
    rewards = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert over_batch(rewards, context()).tolist() == pytest.approx([-1.3416408, -0.4472136, 0.4472136, 1.3416408])
    assert over_batch(torch.full((3,), 0.1), context()).tolist() == [0, 0, 0]


def test_rewards_of_other_processes_are_counted_and_get_no_advantage_here() -> None:
    elsewhere = {torch.float32: torch.tensor([3.0, 4.0]), torch.int64: torch.tensor([1, 2])}
    ctx = context(lambda values: torch.cat([values, elsewhere[values.dtype]]))
    expected = [-1.3416408, -0.4472136]
    assert over_batch(torch.tensor([1.0, 2.0]), ctx).tolist() == pytest.approx(expected)
    tracker = PromptTracker(4, 3)
    assert tracker.advantages(["a", "a"], torch.tensor([1.0, 2.0]), ctx).tolist() == pytest.approx(expected, abs=1e-5)
    assert [list(seen) for seen in tracker._seen.values()] == [[1.0, 2.0], [3.0], [4.0]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float16])
def test_coarse_rewards_are_measured_in_full_precision(dtype: torch.dtype) -> None:
    rewards = torch.tensor([1, 0, 0], dtype=dtype)
    expected = [1.4142135, -0.7071068, -0.7071068]
    assert over_batch(rewards, context()).tolist() == pytest.approx(expected)
    assert PromptTracker(4, 3).advantages(["a"] * 3, rewards, context()).tolist() == pytest.approx(expected, abs=1e-5)


def test_a_sample_that_could_not_be_scored_enters_no_statistics() -> None:
    rewards, nan = torch.tensor([1.0, torch.nan, 3.0]), torch.nan
    assert over_batch(rewards, context()).tolist() == pytest.approx([-1, nan, 1], nan_ok=True)
    tracker = PromptTracker(4, 2)
    assert tracker.advantages(["a"] * 3, rewards, context()).tolist() == pytest.approx(
        [-1, nan, 1], abs=1e-5, nan_ok=True
    )
    assert bool(standardised(rewards, torch.tensor([nan, nan]), 1e-6).isnan().all())


def test_a_tracker_comes_back_from_a_checkpoint_and_goes_on_as_before(tmp_path: Any) -> None:
    tracker, texts = PromptTracker(4, 2), ["a", "b", "é"]
    tracker.advantages(texts, torch.tensor([0.1, 2.0, 3.0]), context())
    saved = load(save(tmp_path, 1, tracker.state_dict()))
    other = PromptTracker(4, 2)
    other.load_state_dict(copy.deepcopy(saved))
    rewards = torch.tensor([1.0, 0.3, torch.nan])
    found = [t.advantages(texts, rewards, context()) for t in (tracker, other)]
    assert torch.equal(found[0].nan_to_num(), found[1].nan_to_num())
    assert tracker.state_dict() == other.state_dict() != saved
