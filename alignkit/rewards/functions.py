"""Use Python functions as rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, overload

from alignkit.errors import AlignkitError
from alignkit.interfaces import Reward
from alignkit.records import Example, Scores
from alignkit.registry import Component, default_registry

if TYPE_CHECKING:
    from torch import Tensor


class FunctionReward(Reward):
    """A reward that calls a function of images and prompts."""

    function: ClassVar[Callable[..., Any]]

    def __call__(self, images: Tensor, examples: Sequence[Example | str]) -> Tensor | Scores:
        prompts = [example if isinstance(example, str) else example.text for example in examples]
        scores: Tensor | Scores = scores_of(type(self).function, images, prompts, self.differentiable)
        return scores


@overload
def reward(function: Callable[..., Any], /) -> FunctionReward: ...
@overload
def reward(
    *,
    name: str = "",
    differentiable: bool = False,
    deterministic: bool = True,
    bounds: tuple[float | None, float | None] = (None, None),
) -> Callable[[Callable[..., Any]], FunctionReward]: ...
def reward(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str = "",
    differentiable: bool = False,
    deterministic: bool = True,
    bounds: tuple[float | None, float | None] = (None, None),
) -> Any:
    """Register a function as a reward in this process, under its own name or `name`:

        @alignkit.reward
        def redness(images, prompts):
            return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))

        run = alignkit.load(overrides={"reward": ["redness"]})

    `function(images, prompts)` takes images (N, 3, H, W) float32 in [0, 1] and N texts, and returns a tensor (N,), N
    numbers or `Scores`. It runs without gradient unless `differentiable` is set. To resume a run, define the function
    again first. A second definition replaces the first. Raises AlignkitError for the name of an installed reward.
    """
    if function is None:
        return lambda given: _registered(given, name, differentiable, deterministic, bounds)
    return _registered(function, name, differentiable, deterministic, bounds)


def _registered(
    function: Callable[..., Any],
    name: str,
    differentiable: bool,
    deterministic: bool,
    bounds: tuple[float | None, float | None],
) -> FunctionReward:
    name = name or getattr(function, "__name__", "")
    if not name.isidentifier() or not name.islower():
        raise AlignkitError(f'alignkit.reward: found the name {name!r}, expected snake_case; set it with name="..."')
    contents = {
        "function": staticmethod(function), "differentiable": differentiable, "deterministic": deterministic,
        "bounds": bounds, "__doc__": function.__doc__, "__module__": function.__module__,
    }  # fmt: skip
    made: type[FunctionReward] = type(name, (FunctionReward,), contents)
    help = next(iter((function.__doc__ or "A Python function").strip().splitlines()), "")
    target = f"{function.__module__}:{name}"
    default_registry().add(Component("reward", name, help, target, "alignkit.reward", function.__module__, ""), made)
    return made()


def scores_of(function: Callable[..., Any], images: Tensor, given: Sequence[Any], differentiable: bool) -> Any:
    """Call `function(images, given)`, without gradient unless `differentiable`; convert numbers to a tensor (N,)."""
    import torch

    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        found = function(images, given)
    if isinstance(found, torch.Tensor | Scores) or found is None:
        return found
    try:
        return torch.as_tensor(found, dtype=torch.float32, device=images.device)
    except (TypeError, ValueError, RuntimeError):
        return found  # CheckedReward reports the wrong type
