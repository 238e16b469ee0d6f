from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from alignkit.errors import AlignkitError, ConfigError, PluginError, TransientError
from alignkit.interfaces import Reward
from alignkit.records import Example, Scores
from alignkit.registry import default_registry
from alignkit.rewards.checked import Scoring
from alignkit.rewards.weighted import WeightedRewards, quantize

EXAMPLES = [Example(f"prompt {i}") for i in range(5)]
IMAGES = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Given(Reward):
    """A reward that returns the result of a function."""

    def __init__(self, function: Callable[[Tensor, Sequence[Example]], Any]) -> None:
        self.function = function

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Any:
        return self.function(images, examples)


class Brightness(Reward):
    differentiable = True

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        return images.mean((1, 2, 3))


def test_the_sum_is_weighted_and_the_parts_are_raw() -> None:
    number = Given(
        lambda x, e: Scores(torch.arange(5.0), torch.ones(5, dtype=torch.bool), {"half": torch.arange(5.0) / 2})
    )
    scores = WeightedRewards([("bright", 2.0, Brightness()), ("number", -0.5, number)])(IMAGES, EXAMPLES)
    bright = quantize(IMAGES).mean((1, 2, 3))
    torch.testing.assert_close(scores.values, 2 * bright - 0.5 * torch.arange(5.0))
    assert list(scores.parts) == ["bright", "number", "number/half"]
    torch.testing.assert_close(scores.parts["number"], torch.arange(5.0))
    torch.testing.assert_close(scores.parts["number/half"], torch.arange(5.0) / 2)


def test_a_reward_that_modifies_its_images_and_examples_affects_no_other() -> None:
    def writes(images: Tensor, examples: Sequence[Example]) -> Tensor:
        values = images.mean((1, 2, 3))
        images.mul_(-1).add_(1)
        examples.sort(key=lambda e: e.text, reverse=True)  # type: ignore[attr-defined]
        return values

    def reads(images: Tensor, examples: Sequence[Example]) -> Tensor:
        return images.mean((1, 2, 3)) + torch.tensor([float(e.text.split()[1]) for e in examples])

    alone = WeightedRewards([("reads", 1.0, Given(reads))])(IMAGES, EXAMPLES).values
    given = quantize(IMAGES), list(EXAMPLES)
    both = WeightedRewards([("writes", 1.0, Given(writes)), ("reads", 1.0, Given(reads))])
    for scores in (both(*given), both.score(*given, 5), both.score(*given, 2)):
        assert torch.equal(scores.parts["reads"], alone)
    assert given[1] == EXAMPLES and torch.equal(given[0], quantize(IMAGES))


def test_a_reward_that_modifies_its_images_and_fails_is_retried_with_the_originals() -> None:
    seen: list[Tensor] = []

    def fails_once(images: Tensor, examples: Sequence[Example]) -> Tensor:
        seen.append(images.clone())
        images.zero_()
        if len(seen) == 1:
            raise TransientError("come again")
        return torch.zeros(len(images))

    WeightedRewards([("r", 1.0, Given(fails_once))], scoring=Scoring(retry_seconds=0))(IMAGES, EXAMPLES)
    assert len(seen) == 2 and torch.equal(*seen)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float64])
def test_every_type_is_promoted_to_float32_before_it_is_weighted(dtype: torch.dtype) -> None:
    scores = WeightedRewards([("r", 0.3, Given(lambda x, e: torch.ones(len(e)).to(dtype)))])(IMAGES, EXAMPLES)
    assert scores.values.dtype == scores.parts["r"].dtype == torch.float32
    torch.testing.assert_close(scores.values, torch.full((5,), 0.3))


def test_a_row_is_valid_only_if_all_rewards_scored_it_and_is_nan_otherwise() -> None:
    values = torch.tensor([1.0, torch.nan, 1.0, 1.0, 1.0])
    first = Given(lambda x, e: Scores(values, ~values.isnan()))
    second = Given(lambda x, e: Scores(torch.ones(5), torch.tensor([True, True, True, False, True])))
    scores = WeightedRewards([("a", 1.0, first), ("b", 1.0, second)])(IMAGES, EXAMPLES)
    assert scores.valid.tolist() == [True, False, True, False, True]
    assert scores.values.isnan().tolist() == [False, True, False, True, False]
    assert scores.parts["a"].isnan().tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_every_image_that_could_not_be_scored_has_its_reason(chunk: int) -> None:
    def odd_ones(images: Tensor, examples: Sequence[Example]) -> Scores:
        odd = [int(e.text.split()[1]) % 2 for e in examples]
        return Scores(images.mean((1, 2, 3)), torch.tensor(odd) == 0, {}, [f"{i} is odd" if i else "" for i in odd])

    def fourth(images: Tensor, examples: Sequence[Example]) -> Scores:
        return Scores(images.mean((1, 2, 3)), torch.tensor(["4" not in e.text for e in examples]))

    members = [("bright", 1.0, Brightness()), ("odd", 1.0, Given(odd_ones)), ("fourth", 1.0, Given(fourth))]
    scores = WeightedRewards(members).score(IMAGES, EXAMPLES, chunk)
    assert scores.valid.tolist() == [True, False, True, False, False]
    assert list(scores.reasons) == ["", "odd: 1 is odd", "", "odd: 1 is odd", ""]
    assert scores.reason == "odd: 1 is odd" and scores.select(slice(1)).reason == ""
    assert list(scores.select(torch.tensor([3, 0])).reasons) == ["odd: 1 is odd", ""]
    assert list(scores.select(~scores.valid).reasons) == ["odd: 1 is odd", "odd: 1 is odd", ""]
    held_out = WeightedRewards([("bright", 1.0, Brightness())], [("odd", Given(odd_ones))])
    assert not held_out.score(IMAGES, EXAMPLES, chunk).reason


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
def test_chunks_give_the_same_scores_as_one_batch_in_order_without_gradient(chunk: int) -> None:
    seen: list[int] = []

    def count(images: Tensor, examples: Sequence[Example]) -> Tensor:
        seen.append(len(examples))
        return torch.tensor([float(e.text.split()[1]) for e in examples]) + images.mean((1, 2, 3))

    rewards = WeightedRewards([("count", 1.0, Given(count)), ("bright", 1.0, Brightness())])
    whole = rewards(IMAGES, EXAMPLES)
    seen.clear()
    scores = rewards.score(IMAGES.clone().requires_grad_(), EXAMPLES, chunk)
    assert max(seen) == min(chunk, 5)
    assert sum(seen) == 5
    assert not scores.values.requires_grad
    torch.testing.assert_close(scores.values, whole.values)
    torch.testing.assert_close(scores.parts["count"], whole.parts["count"])


def test_a_part_that_only_some_chunks_have_is_nan_elsewhere() -> None:
    def first_only(images: Tensor, examples: Sequence[Example]) -> Scores:
        parts = {"first": torch.ones(len(examples))} if examples[0].text == "prompt 0" else {}
        return Scores(torch.zeros(len(examples)), torch.ones(len(examples), dtype=torch.bool), parts)

    scores = WeightedRewards([("r", 1.0, Given(first_only))]).score(IMAGES, EXAMPLES, 2)
    assert scores.parts["r/first"].isnan().tolist() == [False, False, True, True, True]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.ones(5, 1), r"'bad' returned values of shape \(5, 1\), expected shape \(5,\)"),
        (torch.tensor(1.0), r"'bad' returned values of shape \(\), expected shape \(5,\)"),
        (Scores(torch.ones(5), torch.ones(5) > 0, {}, ["x"]), "'bad' returned 1 reasons, expected 5"),
        ([1.0] * 5, r"'bad' returned list, expected a tensor \(5,\) or Scores"),
        (None, "'bad' returned NoneType"),
        (Scores(torch.ones(5), torch.ones(4)), r"'bad' returned valid of shape \(4,\)"),
        (Scores(torch.ones(5), torch.ones(5), {"x": torch.ones(2)}), r"'bad' returned part 'x' of shape \(2,\)"),
        (Scores([1.0] * 5, torch.ones(5)), "'bad' returned values of list"),  # type: ignore[arg-type]
        (torch.tensor([0, 0, torch.nan, 0, 0]), "'bad' returned nan for image 2, 'prompt 2'"),
        (torch.tensor([0, 0, 0, -torch.inf, 0]), "'bad' returned -inf for image 3, 'prompt 3'"),
    ],
)
def test_a_broken_contract_is_one_line_that_names_the_reward(output: Any, message: str) -> None:
    rewards = WeightedRewards([("fine", 1.0, Brightness()), ("bad", 1.0, Given(lambda x, e: output))])
    with pytest.raises(PluginError, match=message) as caught:
        rewards.score(IMAGES, EXAMPLES, 8)
    assert "\n" not in str(caught.value)


def test_an_exception_inside_a_reward_is_chained_and_reported_in_one_line() -> None:
    def fail(images: Tensor, examples: Sequence[Example]) -> Tensor:
        raise KeyError("no such\nthing")

    with pytest.raises(PluginError, match="reward 'bad' failed while scoring image 0, 'prompt 0': KeyError") as caught:
        WeightedRewards([("bad", 1.0, Given(fail))])(IMAGES, EXAMPLES)
    assert isinstance(caught.value.__cause__, KeyError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("chunk", [2, 8])
def test_a_reward_that_fails_is_named_with_its_plugin_and_the_image_it_fails_on(plugins: Any, chunk: int) -> None:
    plugins.install("acme_rewards", REWARDS, version="0.7")
    registry = default_registry()

    def message(name: str) -> str:
        with pytest.raises(PluginError) as caught:
            WeightedRewards([(name, 1.0, registry.get("reward", name)())]).score(IMAGES, EXAMPLES, chunk)
        return str(caught.value)

    origin = "(plugin acme_rewards of acme_rewards 0.7)"
    raised = f"reward 'raises' {origin} failed while scoring image 3, 'prompt 3': KeyError: 'gone' ("
    assert message("raises").startswith(raised)
    assert message("nans").startswith(f"reward 'nans' {origin} returned nan for image 3, 'prompt 3', expected a")
    assert message("misshapen").startswith(f"reward 'misshapen' {origin} returned values of shape")
    crowded = message("crowded")
    assert f"scoring {min(chunk, 5)} images in one batch (each alone succeeds): ValueError" in crowded


REWARDS = """
from alignkit import hookimpl
from alignkit.interfaces import Reward

@hookimpl
def register_rewards(register):
    for name in ("raises", "nans", "misshapen", "crowded"):
        register(name, f"acme_rewards:{name.capitalize()}", "help")

class Raises(Reward):
    def __call__(self, images, examples):
        return images.new_tensor([gone() if e.text == "prompt 3" else 1.0 for e in examples])

def gone():
    raise KeyError("gone")

class Nans(Reward):
    def __call__(self, images, examples):
        return images.new_tensor([float("nan") if e.text == "prompt 3" else 1.0 for e in examples])

class Misshapen(Reward):
    def __call__(self, images, examples):
        return images.mean((2, 3))

class Crowded(Reward):
    def __call__(self, images, examples):
        if len(images) > 1:
            raise ValueError("one at a time")
        return images.mean((1, 2, 3))
"""


def test_an_error_meant_for_the_user_passes_unchanged() -> None:
    class Refusing(Brightness):
        def check(self, examples: Iterable[Example]) -> None:
            raise ConfigError(f"no {next(iter(examples)).text}")

        def load(self, device: torch.device) -> None:
            raise OSError("gone")

    rewards = WeightedRewards([("r", 1.0, Brightness()), ("s", 1.0, Refusing())])
    with pytest.raises(AlignkitError, match=r"^no prompt 0$"):
        rewards.check(iter(EXAMPLES))
    with pytest.raises(PluginError, match="reward 's' failed while loading: OSError: gone"):
        rewards.load(torch.device("cpu"))


@pytest.mark.parametrize("bad", [1, 4, 9, None])
def test_a_refused_prompt_is_reported_with_its_location_and_wrong_settings_without(bad: int | None) -> None:
    checked = []

    class Picky(Brightness):
        def check(self, examples: Iterable[Example]) -> None:
            given = list(examples)
            checked.append(len(given))
            if bad is None or any(int(example.text) >= bad for example in given):
                raise ConfigError("picky: cannot be scored")

    rewards = WeightedRewards([("picky", 1.0, Picky())])
    examples = [Example(str(i), place=f"p.txt, line {i}") for i in range(1, 10)]
    where = f"p.txt, line {bad}: " if bad else ""
    with pytest.raises(ConfigError, match=f"^{where}picky: cannot be scored$"):
        rewards.check(examples)
    assert len(checked) <= 6  # of nine; each may be a call to a server
    with pytest.raises(ConfigError, match=r"^picky: cannot be scored$"):
        rewards.check([Example("9")])


def test_no_reward_and_a_name_used_twice_are_refused() -> None:
    with pytest.raises(ConfigError, match="none is given"):
        WeightedRewards([])
    with pytest.raises(ConfigError, match="'r' is listed 2 times"):
        WeightedRewards([("r", 1.0, Brightness()), ("r", 0.5, Brightness())])


def test_the_sum_is_differentiable_only_if_every_reward_is() -> None:
    black_box = Given(lambda x, e: x.mean((1, 2, 3)))
    assert WeightedRewards([("r", 1.0, Brightness())]).differentiable
    assert not WeightedRewards([("r", 1.0, Brightness()), ("s", 1.0, black_box)]).differentiable


def test_the_gradient_of_a_reward_reaches_the_pixels() -> None:
    x = IMAGES.clone().requires_grad_()
    WeightedRewards([("r", 3.0, Brightness())])(x, EXAMPLES).values.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 3 / 48))


def test_quantize_gives_the_values_of_an_8_bit_file() -> None:
    x = torch.tensor([-0.3, 0.0, 0.4 / 255, 0.6 / 255, 0.5, 1.0, 1.7])
    torch.testing.assert_close(quantize(x) * 255, torch.tensor([0.0, 0, 0, 1, 128, 255, 255]))
    assert torch.equal(quantize(quantize(x)), quantize(x))


def test_a_clamped_value_gets_only_the_gradient_that_leads_back() -> None:
    x = torch.tensor([-0.3, -0.3, 0.5, 0.5, 1.7, 1.7], requires_grad=True)
    slope = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    (quantize(x) * slope).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, -1.0, 1.0, -1.0, 1.0, 0.0]
