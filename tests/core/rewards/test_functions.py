from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import alignkit
from alignkit.errors import AlignkitError, PluginError
from alignkit.interfaces import Reward
from alignkit.records import Example, Scores
from alignkit.registry import default_registry
from alignkit.rewards.weighted import WeightedRewards
from alignkit.testing import check_reward, coarse_images
from method_checks import assert_a_stopped_run_ends_with_the_same_bits

IMAGES = coarse_images(3)
EXAMPLES = [Example("a"), Example("bb"), Example("ccc")]


@pytest.fixture(autouse=True)
def _own_registry(plugins: Any) -> None:
    """Unregister the functions that a test registers."""


def redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """How red it is.

    More words.
    """
    return images[:, 0].mean((1, 2))


def test_a_function_becomes_a_reward_under_its_name() -> None:
    made = alignkit.reward(redness)
    assert isinstance(made, Reward) and not made.differentiable
    row = default_registry().find("reward", "redness")
    assert (row.help, row.distribution) == ("How red it is.", __name__)
    check_reward(default_registry().get("reward", "redness")())
    torch.testing.assert_close(made(IMAGES, ["a", "b", "c"]), IMAGES[:, 0].mean((1, 2)))


def test_the_decorator_sets_the_properties_of_the_reward() -> None:
    made = alignkit.reward(name="red", differentiable=True, bounds=(0.0, 1.0), deterministic=False)(redness)
    assert (made.differentiable, made.bounds, made.deterministic) == (True, (0.0, 1.0), False)
    check_reward(made)
    assert default_registry().get("reward", "red") is type(made)


@pytest.mark.parametrize(
    "function",
    [lambda i, p: [len(x) for x in p], lambda i, p: np.array([1, 2, 3]), lambda i, p: torch.tensor([1, 2, 3])],
)
def test_prompts_are_texts_and_results_any_numbers(function: Any) -> None:
    made = alignkit.reward(name="lengths")(function)
    assert WeightedRewards([("lengths", 1.0, made)])(IMAGES, EXAMPLES).values.tolist() == [1, 2, 3]


def test_scores_pass_through() -> None:
    made = alignkit.reward(name="first")(lambda i, p: Scores(torch.ones(3), torch.tensor([True, False, False])))
    assert WeightedRewards([("first", 1.0, made)])(IMAGES, EXAMPLES).valid.tolist() == [True, False, False]


def test_a_result_that_is_not_a_number_is_reported_with_the_function() -> None:
    made = alignkit.reward(name="wordy")(lambda i, p: "many")
    with pytest.raises(PluginError, match=rf"reward 'wordy' \(plugin alignkit.reward of {__name__}\) returned str"):
        WeightedRewards([("wordy", 1.0, made)])(IMAGES, EXAMPLES)


def test_defining_it_again_replaces_it_and_an_installed_name_is_refused() -> None:
    alignkit.reward(redness)
    again = alignkit.reward(redness)
    assert default_registry().get("reward", "redness") is type(again)
    with pytest.raises(AlignkitError, match="reward clip_score is already registered by plugin alignkit_rewards of"):
        alignkit.reward(name="clip_score")(redness)
    with pytest.raises(AlignkitError, match="found the name '<lambda>', expected snake_case"):
        alignkit.reward(lambda images, prompts: images)


def test_a_run_trains_with_it_and_resumes(tiny_run: Any) -> None:
    alignkit.reward(redness)
    settings = {
        "algorithm.name": "ddpo", "reward": ["redness"], "evaluate.rewards": ["brightness"], "train.updates": 2,
        "train.rows_per_update": 64,
    }  # fmt: skip
    assert_a_stopped_run_ends_with_the_same_bits(tiny_run, settings)


def test_the_decorator_does_not_import_torch() -> None:
    code = "import alignkit, sys; alignkit.reward(name='r')(lambda i, p: p); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
