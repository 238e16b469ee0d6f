"""Recording what a policy predicts, for regularisers that look at the predictions of another loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from alignkit.interfaces import Policy
from alignkit.records import Prediction, Prompt


@contextmanager
def recorded(policy: Policy) -> Iterator[list[Prediction]]:
    """Yield a list that grows by every prediction with gradient that `policy` makes inside the block.

    For the length of the block the instance has a `denoise` of its own, which calls the usual one and notes it. So the
    policy stays the same object, whoever holds it, samplers predict through it as always, and outside the block
    nothing is spent. Predictions without gradient (of targets, of the model before training) are left out, and so are
    calls that `denoise` itself makes: one prediction is noted once, whatever parts the policy makes it from.
    """
    found: list[Prediction] = []
    own = vars(policy).get("denoise")
    denoise = policy.denoise
    within = False

    def noting(x: Tensor, t: Tensor, prompt: Prompt, guidance_scale: Tensor | None = None) -> Tensor:
        nonlocal within
        if within:
            return denoise(x, t, prompt, guidance_scale)
        within = True
        try:
            clean = denoise(x, t, prompt, guidance_scale)
        finally:
            within = False
        if torch.is_grad_enabled() and clean.requires_grad:
            found.append(Prediction(x, t, prompt, guidance_scale, clean))
        return clean

    policy.denoise = noting  # type: ignore[method-assign]
    try:
        yield found
    finally:
        if own is None:
            del policy.denoise
        else:
            policy.denoise = own  # type: ignore[method-assign]
