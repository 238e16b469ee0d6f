"""Exchange the weights of a network for a while, read the output of one of its layers, and its precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def exchanged(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Give the tensors `own` the values of those in `weights` with the same names, and restore their own after."""
    kept = {name: own[name].data for name in weights}
    try:
        for name, value in weights.items():
            own[name].data = value.to(own[name].device)
        torch.clear_autocast_cache()  # it holds half-precision copies of parameters and misses changes of `data`
        yield
    finally:
        for name, value in kept.items():
            own[name].data = value
        torch.clear_autocast_cache()


@contextmanager
def outputs_of(layer: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Collect what a layer returns at each call, of several tensors the first."""
    found: list[Tensor] = []

    def keep(_: object, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])

    hook = layer.register_forward_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


def precision_of(network: torch.nn.Module) -> torch.dtype:
    """Return the type of the first parameter. The property `dtype` of diffusers looks through all layers each time."""
    return next(network.parameters()).dtype
