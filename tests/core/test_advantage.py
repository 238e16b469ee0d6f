"""Advantages: golden values, the kinds of baselines, and samples that must not enter the statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from alignkit.advantage import Baseline, PromptTracker, _key, group_statistics, of_terms, over_batch, standardised
from alignkit.records import Example, Scores
from alignkit.training.checkpoint import load, save

NAN = torch.nan


def context(gather: Callable[[Tensor], Tensor] = lambda values: values) -> Any:
    """Return a context with all that this module uses of one."""
    logged: dict[str, float] = {}
    return SimpleNamespace(gather=gather, log=lambda **m: logged.update({k: float(v) for k, v in m.items()}), to=logged)


def test_the_tracker_is_golden() -> None:
    tracker, ctx, texts = PromptTracker(size=4, min_count=3), context(), ["a", "a", "b", "b"]
    first = tracker.advantages(texts, torch.tensor([1.0, 2.0, 3.0, 4.0]), ctx)
    assert first.tolist() == pytest.approx([-1.34163959, -0.4472132, 0.4472132, 1.34163959], abs=1e-6)
    assert ctx.to["own_statistics"] == 0  # two rewards each: still normalised by the batch
    second = tracker.advantages(texts, torch.tensor([3.0, 4.0, 0.0, 0.0]), ctx)
    assert second.tolist() == pytest.approx([0.4472132, 1.34163959, -0.98019551, -0.98019551], abs=1e-6)
    assert ctx.to["own_statistics"] == 1


def test_texts_that_begin_alike_are_kept_apart_however_long_they_are() -> None:
    tracker, long = PromptTracker(4, 2), "a red circle, " * 100
    rewards = torch.tensor([1.0, 3.0, 10.0, 30.0])
    found = tracker.advantages([long, long, long + "a blue one", long + "a blue one"], rewards, context())
    assert found.tolist() == pytest.approx([-1, 1, -1, 1], abs=1e-5)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"target": "OPEN"}, {"target": "EXIT"}),
        ({"target": "OPEN"}, {}),
        ({"boxes": [[0, 1], [2, 3]]}, {"boxes": [[0, 1], [2, 4]]}),
        ({"mask": np.zeros((40, 40))}, {"mask": np.eye(40)}),  # can be neither hashed nor compared
        ({"mask": torch.zeros(2), 3: {"a"}}, {"mask": torch.ones(2), 3: {"a"}}),
    ],
)
def test_examples_of_one_text_and_other_metadata_are_kept_apart(one: dict[Any, Any], other: dict[Any, Any]) -> None:
    tracker, rewards = PromptTracker(4, 2), torch.tensor([1.0, 3.0, 10.0, 30.0])
    rows = [Example("a sign", metadata) for metadata in (one, copy.deepcopy(one), other, other)]
    assert tracker.advantages(rows, rewards, context()).tolist() == pytest.approx([-1, 1, -1, 1], abs=1e-5)


def test_the_order_of_metadata_does_not_matter_and_a_text_is_an_example_without_any() -> None:
    tracker = PromptTracker(4, 2)
    rows = [Example("a", {"x": 1, "y": 2}), Example("a", {"y": 2, "x": 1}), "a", Example("a", place="line 3")]
    found = tracker.advantages(rows, torch.tensor([1.0, 3.0, 10.0, 30.0]), context())
    assert found.tolist() == pytest.approx([-1, 1, -1, 1], abs=1e-5)


def test_the_key_of_an_example_is_the_same_in_every_process_also_for_objects_at_other_addresses() -> None:
    trackers = PromptTracker(4, 2), PromptTracker(4, 2)
    for tracker in trackers:
        tracker.advantages([Example("a", {"of": object(), "target": "OPEN"})], torch.tensor([1.0]), context())
    assert trackers[0].state_dict() == trackers[1].state_dict()


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
def test_coarse_rewards_are_normalised_in_full_precision(dtype: torch.dtype) -> None:
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
    """Return a context with these weights and rewards as terms."""
    ctx = context()
    ctx.terms = lambda scores: {name: (weight, torch.tensor(values)) for name, (weight, values) in columns.items()}
    return ctx


def test_one_term_is_normalised_as_it_is() -> None:
    ctx = terms(**{"": (1.0, [1.0, 2.0, 3.0, 4.0])})
    found = of_terms(None, ctx, lambda rewards, name: over_batch(rewards, ctx))  # type: ignore[arg-type]
    assert torch.equal(found, over_batch(torch.tensor([1.0, 2.0, 3.0, 4.0]), ctx))


def test_separate_advantages_distinguish_what_the_sum_does_not() -> None:
    """The sum is equal for the second and the third image; separately, the reward that few get counts for more."""
    often, seldom = [1.0, 1.0, 0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    together = over_batch(torch.tensor(often) + torch.tensor(seldom), context())
    assert together[1] == together[2]
    ctx = terms(often=(1.0, often), seldom=(1.0, seldom))
    apart = of_terms(None, ctx, lambda rewards, name: over_batch(rewards, ctx))  # type: ignore[arg-type]
    each = [(torch.tensor(x) - sum(x) / 6) / torch.tensor(x).std(correction=0) for x in (often, seldom)]
    total = each[0] + each[1]
    torch.testing.assert_close(apart, (total - total.mean()) / total.std(correction=0), atol=1e-5, rtol=0)
    assert apart[2] > apart[1] + 0.5


def test_separate_advantages_are_of_one_size_and_scale_does_not_matter_but_weights_do() -> None:
    a, b = [22.0, 23.0, 21.0, 22.5], [0.25, 0.21, 0.28, 0.29]

    def combined(weight: float, scale: float) -> Tensor:
        ctx = terms(a=(1.0, a), b=(weight, [scale * value for value in b]))
        return of_terms(None, ctx, lambda rewards, name: over_batch(rewards, ctx))  # type: ignore[arg-type]

    torch.testing.assert_close(combined(0.5, 1.0), combined(0.5, 1000.0), atol=1e-4, rtol=0)
    for found in (combined(0.5, 1.0), combined(5.0, 1.0)):
        assert float(found.std(correction=0)) == pytest.approx(1, abs=1e-4)
    assert not torch.allclose(combined(0.5, 1.0), combined(5.0, 1.0), atol=0.1)


def test_a_tracker_normalises_each_reward_by_its_own_past() -> None:
    shared, apart = PromptTracker(4, 2), [PromptTracker(4, 2), PromptTracker(4, 2)]
    texts, a, b = ["x", "x", "y", "y"], torch.tensor([1.0, 2, 3, 4]), torch.tensor([10.0, 30, 20, 70])
    for _ in range(2):
        for name, rewards, alone in (("a", a, apart[0]), ("b", b, apart[1])):
            found = shared.advantages(texts, rewards, context(), name)
            assert torch.equal(found, alone.advantages(texts, rewards, context()))


# Baseline

TEXTS = ["x", "x", "y", "y"]
Kind = Literal["prompt", "step_prompt", "batch"]


def single() -> Any:
    """Return a context of which the only term is the values of the scores, NaN where they are not valid."""
    ctx = context()
    ctx.terms = lambda scores: {"": (1.0, scores.values.masked_fill(~scores.valid, torch.nan))}
    return ctx


def rounds(count: int = 3) -> list[Scores]:
    """Return scores of `TEXTS` in a few rounds; one image of the last could not be scored."""
    values = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(count, 4, dtype=torch.bool)
    valid[-1, 2] = False
    return [Scores(*columns) for columns in zip(values, valid, strict=True)]


def per_step(rewards: Tensor) -> Tensor:
    """Return two steps for each reward: twice it, and its negative."""
    return torch.stack([2 * rewards, -rewards], dim=1)


def same(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("kind", ["prompt", "step_prompt"])
def test_a_baseline_of_rewards_by_prompt_is_a_tracker(kind: Kind) -> None:
    baseline, tracker, ctx = Baseline(kind, 6, 3), PromptTracker(6, 3), single()
    for number, scores in enumerate(rounds()):
        rewards = scores.values.masked_fill(~scores.valid, torch.nan)
        found = baseline.advantages(scores, TEXTS, ctx)
        assert found.shape == (4,) and same(found, tracker.advantages(TEXTS, rewards, context()))
        assert ctx.to["own_statistics"] == (number > 0)  # two rewards of each prompt in the first round
        assert found.isnan().tolist() == (~scores.valid).tolist()


def test_a_baseline_of_returns_by_prompt_is_one_tracker_that_sees_all_steps() -> None:
    baseline, tracker, ctx = Baseline("prompt", 6, 3), PromptTracker(2 * 6, 2 * 3), single()
    for scores in rounds():
        returns = per_step(scores.values.masked_fill(~scores.valid, torch.nan))
        found = baseline.advantages(scores, TEXTS, ctx, per_step)
        each = ["x", "x", "x", "x", "y", "y", "y", "y"]
        assert found.shape == (4, 2)
        assert same(found, tracker.advantages(each, returns.flatten(), context()).view(4, 2))


def test_a_baseline_of_returns_by_prompt_and_step_is_a_tracker_for_each_step() -> None:
    baseline, trackers, ctx = Baseline("step_prompt", 6, 3), [PromptTracker(6, 3), PromptTracker(6, 3)], single()
    for scores in rounds():
        returns = per_step(scores.values.masked_fill(~scores.valid, torch.nan))
        found = baseline.advantages(scores, TEXTS, ctx, per_step)
        assert found.shape == (4, 2)
        for k, tracker in enumerate(trackers):
            assert same(found[:, k], tracker.advantages(TEXTS, returns[:, k], context()))


@pytest.mark.parametrize("returns", [None, per_step])
def test_a_baseline_of_the_batch_takes_all_values_of_the_round_together(returns: Any) -> None:
    baseline, ctx = Baseline("batch", 6, 3), single()
    for scores in rounds():
        values = scores.values.masked_fill(~scores.valid, torch.nan)
        values = per_step(values) if returns else values
        found = baseline.advantages(scores, TEXTS, ctx, *([returns] if returns else []))
        assert same(found, over_batch(values.flatten(), context()).view_as(values))
    assert "own_statistics" not in ctx.to and baseline.state_dict() == {"trackers": []}


def test_a_baseline_combines_the_advantages_of_several_rewards_each_with_its_own_past() -> None:
    first, second = [1.0, 2.0, 3.0, 5.0], [10.0, 0.0, 0.0, 30.0]
    baseline, apart = Baseline("prompt", 6, 2), [PromptTracker(6, 2), PromptTracker(6, 2)]
    for _ in range(2):
        ctx = terms(a=(1.0, first), b=(0.5, second))
        found = baseline.advantages(rounds()[0], TEXTS, ctx)
        each = [t.advantages(TEXTS, torch.tensor(v), context()) for t, v in zip(apart, (first, second), strict=True)]
        torch.testing.assert_close(found, over_batch(each[0] + 0.5 * each[1], context()))


@pytest.mark.parametrize("kind", ["prompt", "step_prompt", "batch"])
def test_a_baseline_comes_back_from_a_checkpoint_and_goes_on_as_before(tmp_path: Any, kind: Kind) -> None:
    baseline, other = Baseline(kind, 6, 3), Baseline(kind, 6, 3)
    first, *later = rounds()
    baseline.advantages(first, TEXTS, single(), per_step)
    other.load_state_dict(copy.deepcopy(load(save(tmp_path, 1, baseline.state_dict()))))
    for scores in later:
        assert same(*(b.advantages(scores, TEXTS, single(), per_step) for b in (baseline, other)))
    assert baseline.state_dict() == other.state_dict()


def test_the_advantages_within_groups_are_golden_and_tied_groups_drop_out() -> None:
    baseline, ctx = Baseline("group"), single()
    texts = ["a", "a", "a", "b", "b", "c", "d", "d", "a"]
    values = torch.tensor([1.0, 2.0, 3.0, 0.1, 0.1, 7.0, 5.0, 9.0, 100.0])
    valid = torch.tensor([True] * 7 + [False] * 2)
    found = baseline.advantages(Scores(values, valid), texts, ctx)
    large = 1 / ((2 / 3) ** 0.5 + 1e-4)
    assert found.tolist() == pytest.approx([-large, 0, large, *[NAN] * 6], nan_ok=True)
    assert ctx.to["tied_groups"] == pytest.approx(5 / 9)  # both of b and of d, and the only one of c
    assert baseline.state_dict() == {"trackers": []}


def test_a_group_takes_in_the_samples_of_other_processes() -> None:
    elsewhere = {
        torch.float32: torch.tensor([3.0, 50.0]),
        torch.int64: torch.tensor([_key(Example("x")), _key(Example("z"))]),
    }
    ctx = context(lambda values: torch.cat([values, elsewhere[values.dtype]]))
    mean, spread = group_statistics(torch.tensor([1.0, 2.0, 4.0]), ["x", "y", "y"], ctx)
    assert mean.tolist() == [2, 3, 3] and spread.tolist() == [1, 1, 1] and mean.dtype == torch.float64


def test_a_group_drops_out_only_if_no_reward_distinguishes_any_two_of_it() -> None:
    for second, expected in (([5.0, 5.0, 0.0, 0.0], [-1, 1, NAN, NAN]), ([5.0, 5.0, 0.0, 1.0], [-1, 1, -0.5, 0.5])):
        ctx, columns = context(), (torch.tensor([1.0, 3.0, 2.0, 2.0]), torch.tensor(second))

        def of(scores: Scores, columns: tuple[Tensor, Tensor] = columns) -> dict[str, tuple[float, Tensor]]:
            rewards = [column.masked_fill(~scores.valid, NAN) for column in columns]
            return {"a": (1.0, rewards[0]), "b": (0.5, rewards[1])}

        ctx.terms = of
        found = Baseline("group").advantages(rounds()[0], TEXTS, ctx)
        size = torch.tensor(expected).square().nanmean().sqrt()
        assert found.tolist() == pytest.approx([x / float(size) for x in expected], rel=1e-3, nan_ok=True)


def test_a_baseline_that_would_never_use_the_rewards_of_a_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="buffer_size: found 3, expected at least min_count, which is 4"):
        Baseline("prompt", 3, 4)
    assert Baseline("prompt", 4, 4).buffer_size == 4
