from __future__ import annotations

import importlib
import linecache
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignkit.errors import ConfigError, PluginError
from alignkit.records import Example
from alignkit.rewards.weighted import WeightedRewards
from alignkit_rewards.function import Function

SOURCE = """
import torch
from alignkit.records import Scores

number = 3

def brightness(images, examples):
    return images.mean((1, 2, 3))

def length(images, examples):
    return [len(example.text) for example in examples]

def first_only(images, examples):
    valid = torch.zeros(len(images), dtype=torch.bool)
    valid[0] = True
    return Scores(images.mean((1, 2, 3)), valid)

def not_a_number(images, examples):
    return images.mean((1, 2, 3)) * float("nan")

def too_many(images, examples):
    return images.mean((2, 3))

def nothing(images, examples):
    pass

def words(images, examples):
    return [example.text for example in examples]

def target_of(images, examples):
    return [example.metadata["target"] for example in examples]
"""


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "my_own_rewards.py").write_text(SOURCE)
    (tmp_path / "broken_rewards.py").write_text("import nothing_of_this_name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("my_own_rewards", None)


def scored(name: str, images: Tensor, examples: list[Example], **fields: Any) -> Any:
    reward = Function(target=f"my_own_rewards:{name}", **fields)
    reward.check(examples)
    reward.load(torch.device("cpu"))
    return WeightedRewards([("function", 1.0, reward)])(images, examples)


def test_a_tensor_numbers_and_scores_are_taken(images: Tensor, examples: list[Example]) -> None:
    torch.testing.assert_close(scored("brightness", images, examples).values, images.mean((1, 2, 3)))
    assert scored("length", images, examples).values.tolist() == [len(example.text) for example in examples]
    assert scored("first_only", images, examples).valid.tolist() == [True, False, False, False]


@pytest.mark.parametrize("gradient", [False, True])
def test_it_holds_the_contract(gradient: bool, holds_the_contract: Callable[..., None]) -> None:
    holds_the_contract(Function(target="my_own_rewards:brightness", gradient=gradient))


def test_metadata_reaches_the_function(images: Tensor) -> None:
    assert scored("target_of", images[:1], [Example("a", {"target": 0.5})]).values.tolist() == [0.5]


def test_the_gradient_flows_if_the_field_declares_it(images: Tensor, examples: list[Example]) -> None:
    assert not Function(target="my_own_rewards:brightness").differentiable
    assert Function(target="my_own_rewards:brightness", gradient=True).differentiable
    pixels = images.clone().requires_grad_()
    scored("brightness", pixels, examples, gradient=True).values.sum().backward()
    torch.testing.assert_close(pixels.grad, torch.full_like(images, 1 / images[0].numel()))


def test_a_bug_in_the_function_is_reported_with_the_reward(images: Tensor, examples: list[Example]) -> None:
    where = r"reward 'function' \(my_own_rewards:target_of\) failed while scoring image 0, 'a red circle'"
    with pytest.raises(PluginError, match=rf"{where}: KeyError: 'target' \(my_own_rewards.py, line \d+\)"):
        scored("target_of", images, examples)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not_a_number", r"nan for image 0, 'a red circle', expected a finite number"),
        ("too_many", r"values of shape \(4, 3\), expected shape \(4,\), one per image"),
        ("nothing", r"NoneType, expected a tensor \(4,\) or Scores"),
        ("words", r"list, expected a tensor \(4,\) or Scores"),
    ],
)
def test_a_wrong_return_value_is_reported_with_module_and_function(
    name: str, message: str, images: Tensor, examples: list[Example]
) -> None:
    with pytest.raises(
        PluginError, match=rf"^reward 'function' \(my_own_rewards:{name}\) returned {message}"
    ) as caught:
        scored(name, images, examples)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("", r'target is \'\', expected "module:function"'),
        ("my_own_rewards", r"target is 'my_own_rewards', expected"),
        ("my_own_rewards:gone", r"cannot be imported \(AttributeError: .*gone"),
        ("no_such_module:f", r"cannot be imported \(ModuleNotFoundError: .*no_such_module"),
        ("broken_rewards:f", r"cannot be imported \(ModuleNotFoundError: .*nothing_of_this_name"),
        ("my_own_rewards:number", "is not a function"),
    ],
)
def test_an_unusable_target_is_reported_before_anything_loads(target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"function: .*{message}") as caught:
        Function(target=target).check([])
    assert "\n" not in str(caught.value)


def test_scores_are_cached_only_if_the_user_declares_repeats_and_while_the_file_is_unchanged(tmp_path: Path) -> None:
    def loaded(**fields: Any) -> Function:
        sys.modules.pop("my_own_rewards", None)
        reward = Function(target="my_own_rewards:brightness", **fields)
        reward.load(torch.device("cpu"))
        return reward

    assert not loaded().deterministic and loaded(repeats=True).deterministic
    assert not loaded().slow and loaded(waits=True).slow
    before = loaded(repeats=True).fingerprint()
    assert before and loaded(repeats=True).fingerprint() == before
    (tmp_path / "my_own_rewards.py").write_text(SOURCE.replace("number = 3", "number = 4000"))
    importlib.invalidate_caches()
    linecache.clearcache()
    assert loaded(repeats=True).fingerprint() != before
    builtin = Function(target="builtins:len", repeats=True)
    builtin.load(torch.device("cpu"))
    assert builtin.fingerprint() == ""
