"""How one reward is asked: again when it fails for a while, and held to its contract."""

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
from scoring_fixtures import EXAMPLES, IMAGES, Judge, Slow, loaded

# what passes is tried again


def test_a_failure_that_passes_changes_nothing_but_the_time(waits: list[float]) -> None:
    judge = Judge(fail=[1, 2])
    scores = loaded(judge, Scoring(retry_seconds=0.5)).score(IMAGES, EXAMPLES, 6)
    assert torch.equal(scores.values, loaded(Judge(), Scoring()).score(IMAGES, EXAMPLES, 6).values)
    assert judge.asked == 3 and waits == [0.5, 1.0]


@pytest.mark.parametrize("reward", [Judge, Slow])
def test_a_reward_that_never_answers_is_named_after_a_bounded_number_of_tries(
    waits: list[float], reward: type[Judge]
) -> None:
    judge = reward(fail=range(100))
    with pytest.raises(TransientError, match=r"^reward 'judge' did not answer, asked 4 times in 7 seconds: connection"):
        loaded(judge, Scoring(retries=3)).score(IMAGES, EXAMPLES, 6)
    assert judge.asked == 4 and waits == [1.0, 2.0, 4.0]


def test_a_reward_that_hangs_is_asked_no_more_once_the_time_is_up(waits: list[float]) -> None:
    class Hangs(Judge):
        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor | Scores:
            waits.append(120)
            return super().__call__(images, examples)

    with pytest.raises(TransientError, match="did not answer, asked 3 times in 363 seconds"):
        loaded(Hangs(fail=range(100)), Scoring()).score(IMAGES, EXAMPLES, 6)
    assert waits == [120, 1, 120, 2, 120]
    with pytest.raises(TransientError, match="did not answer, asked once"):
        loaded(Hangs(fail=range(100)), Scoring(retry_limit=120)).score(IMAGES, EXAMPLES, 6)


def test_one_second_is_told_as_one(waits: list[float]) -> None:
    with pytest.raises(TransientError, match="did not answer, asked 2 times in 1 second: connection refused"):
        loaded(Judge(fail=range(100)), Scoring(retries=1)).score(IMAGES, EXAMPLES, 6)


def test_what_does_not_pass_is_not_tried_again(waits: list[float]) -> None:
    class Broken(Judge):
        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
            self.asked += 1
            raise ValueError("no JSON: I would rather talk about ships")

    judge = Broken()
    told = "reward 'judge' failed while scoring image 0, 'prompt 0': ValueError: no JSON"
    with pytest.raises(PluginError, match=told):
        loaded(judge, Scoring()).score(IMAGES, EXAMPLES, 6)
    assert judge.asked == 2 and waits == []  # the second time to find the image


# numbers that are none


def test_a_score_that_is_no_number_is_refused_or_left_out_by_choice() -> None:
    class Odd(Reward):
        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
            return images.mean((1, 2, 3)).index_fill(0, torch.tensor([2]), torch.nan)

    told: list[str] = []
    with pytest.raises(PluginError, match=r"'odd' returned nan for image 2, 'prompt 2'.*scoring\.on_error"):
        loaded(Odd(), Scoring(), "odd").score(IMAGES, EXAMPLES, 6)
    scores = loaded(Odd(), Scoring(on_error="skip", warn=told.append), "odd").score(IMAGES, EXAMPLES, 6)
    assert scores.valid.tolist() == [True, True, False, True, True, True]
    assert list(scores.reasons) == ["", "", "odd: its score is not finite", "", "", ""]
    assert scores.values.isnan().tolist() == (~scores.valid).tolist()
    assert len(told) == 1 and "'odd'" in told[0]


def test_an_image_that_is_not_scored_has_no_gradient_and_spoils_none() -> None:
    """The root is of a number below 0 for one image: its score is masked, and without more its gradient is NaN."""

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


def test_what_a_reward_writes_into_metadata_reaches_no_other() -> None:
    class Counting(Judge):
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
