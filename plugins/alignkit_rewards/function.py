"""Any Python function as a reward, given by its name."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignkit import Example, Reward, Scores
from alignkit.errors import ConfigError
from alignkit.imports import CodeName, import_name, is_name
from alignkit.rewards.functions import scores_of


@dataclass
class Function(Reward):
    """Scores returned by `target(images, examples)`: a tensor (N,), N numbers, or Scores.

    The function gets images (N, 3, H, W) float32 in [0, 1] and N examples with `text` and `metadata`.
    """

    target: CodeName = ""
    """The function, as "module:function"; the module is in the working directory or installed."""
    gradient: bool = False
    """Whether the values have a useful gradient with respect to the pixels. This is not verified."""
    repeats: bool = False
    """Whether the same image and text always get the same value, so that scores are cached until the file of the
    function changes. This is not verified; other code that the function calls must not change either."""
    waits: bool = False
    """Whether the function waits for something else, such as a server, and should run in a thread of its own."""

    def __post_init__(self) -> None:
        self._function: Any = None

    @property
    def differentiable(self) -> bool:
        return self.gradient

    @property
    def deterministic(self) -> bool:
        return self.repeats

    @property
    def slow(self) -> bool:
        return self.waits

    @property
    def origin(self) -> str:
        return self.target

    def check(self, examples: Iterable[Example]) -> None:
        self.load(torch.device("cpu"))

    def load(self, device: torch.device) -> None:
        if self._function is None:
            self._function = self._import()

    def fingerprint(self) -> str:
        try:
            source = inspect.getsource(inspect.getmodule(self._function) or self._function)
        except (OSError, TypeError):  # built in or compiled: without source, versions cannot be distinguished
            return ""
        return f"{self.target}\n{source}"

    def _import(self) -> Any:
        wanted = 'expected "module:function", such as --set reward.function.target=my_rewards:sharpness'
        if not is_name(self.target):
            raise ConfigError(f"function: target is {self.target!r}, {wanted}")
        try:
            function = import_name(self.target)
        except (Exception, SystemExit) as error:  # a user's module may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(f"function: target {self.target!r} cannot be imported ({reason}); {wanted}") from error
        if not callable(function):
            raise ConfigError(f"function: target {self.target!r} is not a function; {wanted}")
        return function

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor | Scores:
        answer: Tensor | Scores = scores_of(self._function, images, examples, self.differentiable)
        return answer
