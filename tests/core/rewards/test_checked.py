"""One wrapped reward: retries, validation of its output, and copies of its inputs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from alignkit.errors import PluginError, TransientError
from alignkit.interfaces import Reward
from alignkit.records import Example, Scores
from alignkit.rewards.checked import Scoring
from alignkit.rewards.weighted import WeightedRewards
from scoring_fixtures import EXAMPLES, IMAGES, Flaky, Slow, loaded

# transient failures are retried


def test_a_transient_failure_changes_nothing_but_the_time(waits: list[float]) -> None:
    reward = Flaky(fail=[1, 2])
    scores = loaded(reward, Scoring(retry_seconds=0.5)).score(IMAGES, EXAMPLES, 6)
    assert torch.equal(scores.values, loaded(Flaky(), Scoring()).score(IMAGES, EXAMPLES, 6).values)
    assert reward.calls == 3 and waits == [0.5, 1.0]


@pytest.mark.parametrize("kind", [Flaky, Slow])
def test_a_reward_that_keeps_failing_is_named_after_a_bounded_number_of_attempts(
    waits: list[float], kind: type[Flaky]
) -> None:
    reward = kind(fail=range(100))
    with pytest.raises(TransientError, match=r"^reward 'flaky' failed after 4 attempts in 7 seconds: connection"):
        loaded(reward, Scoring(retries=3)).score(IMAGES, EXAMPLES, 6)
    assert reward.calls == 4 and waits == [1.0, 2.0, 4.0]


def test_a_reward_that_hangs_is_not_retried_after_the_time_limit(waits: list[float]) -> None:
    class Hangs(Flaky):
        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor | Scores:
            waits.append(120)
            return super().__call__(images, examples)

    with pytest.raises(TransientError, match="failed after 3 attempts in 363 seconds"):
        loaded(Hangs(fail=range(100)), Scoring()).score(IMAGES, EXAMPLES, 6)
    assert waits == [120, 1, 120, 2, 120]
    with pytest.raises(TransientError, match="failed after 1 attempt: connection refused"):
        loaded(Hangs(fail=range(100)), Scoring(retry_limit=120)).score(IMAGES, EXAMPLES, 6)


def test_one_second_is_singular_in_the_message(waits: list[float]) -> None:
    with pytest.raises(TransientError, match="failed after 2 attempts in 1 second: connection refused"):
        loaded(Flaky(fail=range(100)), Scoring(retries=1)).score(IMAGES, EXAMPLES, 6)


def test_other_failures_are_not_retried(waits: list[float]) -> None:
    class Broken(Flaky):
        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
            self.calls += 1
            raise ValueError("no JSON: I would rather talk about ships")

    reward = Broken()
    message = "reward 'flaky' failed while scoring image 0, 'prompt 0': ValueError: no JSON"
    with pytest.raises(PluginError, match=message):
        loaded(reward, Scoring()).score(IMAGES, EXAMPLES, 6)
    assert reward.calls == 2 and waits == []  # the second time to find the image


# scores that are not finite


def test_a_score_that_is_not_finite_is_refused_or_skipped() -> None:
    class Odd(Reward):
        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
            return images.mean((1, 2, 3)).index_fill(0, torch.tensor([2]), torch.nan)

    warnings: list[str] = []
    with pytest.raises(PluginError, match=r"'odd' returned nan for image 2, 'prompt 2'.*scoring\.on_error"):
        loaded(Odd(), Scoring(), "odd").score(IMAGES, EXAMPLES, 6)
    scores = loaded(Odd(), Scoring(on_error="skip", warn=warnings.append), "odd").score(IMAGES, EXAMPLES, 6)
    assert scores.valid.tolist() == [True, True, False, True, True, True]
    assert list(scores.reasons) == ["", "", "odd: its score is not finite", "", "", ""]
    assert scores.values.isnan().tolist() == (~scores.valid).tolist()
    assert len(warnings) == 1 and "'odd'" in warnings[0]


def test_an_image_that_is_not_scored_gets_no_gradient_and_affects_no_other() -> None:
    """One image takes the root of a negative number: masking its score alone would leave its gradient NaN."""

    class Root(Reward):
        differentiable = True

        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
            return (images.mean((1, 2, 3)) - 2.0 * torch.tensor([e.text == "prompt 2" for e in examples])).sqrt()

    images = IMAGES.clone().requires_grad_()
    scores = loaded(Root(), Scoring(on_error="skip"), "root")(images, EXAMPLES)
    scores.values[scores.valid].sum().backward()
    assert images.grad is not None and scores.valid.tolist() == [True, True, False, True, True, True]
    assert images.grad.flatten(1).abs().amax(1).gt(0).tolist() == scores.valid.tolist()
    assert bool(images.grad.isfinite().all())


def test_a_reward_that_modifies_metadata_affects_no_other() -> None:
    class Counting(Flaky):
        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor | Scores:
            for example in examples:
                assert "seen" not in example.metadata and example.metadata["deep"] == [1]
                example.metadata["seen"] = True  # type: ignore[index]
                example.metadata["deep"].append(2)
            return super().__call__(images, examples)

    rewards = WeightedRewards([("a", 1.0, Counting()), ("b", 1.0, Counting())])
    examples = [Example("a", {"deep": [1]})] * 6
    rewards.score(IMAGES, examples, 2)
    assert examples[0].metadata == {"deep": [1]}
