"""Advantages: golden values, and what must not enter the statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from alignkit.advantage import PromptTracker, of_terms, over_batch, standardised
from alignkit.training.checkpoint import load, save


def context(gather: Callable[[Tensor], Tensor] = lambda values: values) -> Any:
    """The part of a context that this module uses."""
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


def test_texts_that_begin_alike_are_distinguished_however_long_they_are() -> None:
    tracker, long = PromptTracker(4, 2), "a red circle, " * 100
    rewards = torch.tensor([1.0, 3.0, 10.0, 30.0])
    found = tracker.advantages([long, long, long + "a blue one", long + "a blue one"], rewards, context())
    assert found.tolist() == pytest.approx([-1, 1, -1, 1], abs=1e-5)


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


def terms(**columns: tuple[float, list[float]]) -> Any:
    """A context whose terms are these weights and rewards."""
    ctx = context()
    ctx.terms = lambda scores: {name: (weight, torch.tensor(values)) for name, (weight, values) in columns.items()}
    return ctx


def test_one_term_is_measured_as_it_is() -> None:
    ctx = terms(**{"": (1.0, [1.0, 2.0, 3.0, 4.0])})
    found = of_terms(None, ctx, lambda rewards, name: over_batch(rewards, ctx))  # type: ignore[arg-type]
    assert torch.equal(found, over_batch(torch.tensor([1.0, 2.0, 3.0, 4.0]), ctx))


def test_separate_advantages_distinguish_what_the_sum_does_not() -> None:
    """The sum takes the second and the third image for equals; apart, the reward that few get counts for more."""
    often, seldom = [1.0, 1.0, 0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    together = over_batch(torch.tensor(often) + torch.tensor(seldom), context())
    assert together[1] == together[2]
    ctx = terms(often=(1.0, often), seldom=(1.0, seldom))
    apart = of_terms(None, ctx, lambda rewards, name: over_batch(rewards, ctx))  # type: ignore[arg-type]
    each = [(torch.tensor(x) - sum(x) / 6) / torch.tensor(x).std(correction=0) for x in (often, seldom)]
    total = each[0] + each[1]
    torch.testing.assert_close(apart, (total - total.mean()) / total.std(correction=0), atol=1e-5, rtol=0)
    assert apart[2] > apart[1] + 0.5


def test_advantages_apart_are_of_one_size_and_scale_does_not_matter_but_weights_do() -> None:
    a, b = [22.0, 23.0, 21.0, 22.5], [0.25, 0.21, 0.28, 0.29]

    def measured(weight: float, scale: float) -> Tensor:
        ctx = terms(a=(1.0, a), b=(weight, [scale * value for value in b]))
        return of_terms(None, ctx, lambda rewards, name: over_batch(rewards, ctx))  # type: ignore[arg-type]

    torch.testing.assert_close(measured(0.5, 1.0), measured(0.5, 1000.0), atol=1e-4, rtol=0)
    for found in (measured(0.5, 1.0), measured(5.0, 1.0)):
        assert float(found.std(correction=0)) == pytest.approx(1, abs=1e-4)
    assert not torch.allclose(measured(0.5, 1.0), measured(5.0, 1.0), atol=0.1)


def test_a_tracker_measures_each_reward_by_its_own_past() -> None:
    shared, apart = PromptTracker(4, 2), [PromptTracker(4, 2), PromptTracker(4, 2)]
    texts, a, b = ["x", "x", "y", "y"], torch.tensor([1.0, 2, 3, 4]), torch.tensor([10.0, 30, 20, 70])
    for _ in range(2):
        for name, rewards, alone in (("a", a, apart[0]), ("b", b, apart[1])):
            found = shared.advantages(texts, rewards, context(), name)
            assert torch.equal(found, alone.advantages(texts, rewards, context()))
