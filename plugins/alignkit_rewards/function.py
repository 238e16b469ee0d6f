"""Any function of Python as a reward, by its name."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.interfaces import Reward
from alignkit.records import Example, Scores
from alignkit.rewards.functions import scores_of


@dataclass
class Function(Reward):
    """What `target(images, examples)` returns, for images (N, 3, H, W) float32 in [0, 1] and N examples with `text` and
    `metadata`: a tensor (N,), N numbers, or Scores."""

    target: str = ""
    """The function, as "module:function"; the module lies in the working directory or is installed."""
    gradient: bool = False
    """Whether the values have a useful gradient with respect to the pixels. It is taken at its word."""
    repeats: bool = False
    """Whether the same image and text always get the same value, so that values are kept while the file of the
    function stays as it is. It is taken at its word, and what the function calls elsewhere must stay too."""
    waits: bool = False
    """Whether the function waits for something else, a server say, and is best called in a thread of its own."""

    def __post_init__(self) -> None:
        # The fields decide, not the class.
        self.differentiable = self.gradient  # type: ignore[misc]
        self.deterministic = self.repeats  # type: ignore[misc]
        self.slow = self.waits  # type: ignore[misc]
        self.origin = self.target  # type: ignore[misc]
        self._function: Any = None

    def check(self, examples: Iterable[Example]) -> None:
        self.load(torch.device("cpu"))

    def load(self, device: torch.device) -> None:
        if self._function is None:
            self._function = self._import()

    def fingerprint(self) -> str:
        try:
            source = inspect.getsource(inspect.getmodule(self._function) or self._function)
        except (OSError, TypeError):  # built in, or compiled: there is no text that would tell it from another version
            return ""
        return f"{self.target}\n{source}"

    def _import(self) -> Any:
        wanted = 'expected "module:function", as --set reward.function.target=my_rewards:sharpness'
        module, _, name = self.target.partition(":")
        if not module or not name:
            raise ConfigError(f"function: target is {self.target!r}, {wanted}")
        if os.getcwd() not in sys.path:  # the command `alignkit` does not look there by itself
            sys.path.append(os.getcwd())
        try:
            function = getattr(importlib.import_module(module), name)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(f"function: target {self.target!r} does not import ({reason}); {wanted}") from error
        if not callable(function):
            raise ConfigError(f"function: target {self.target!r} is no function; {wanted}")
        return function

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor | Scores:
        answer: Tensor | Scores = scores_of(self._function, images, examples, self.differentiable)
        return answer
