"""Rows of the additions to LaSRO: states with random numbers of their scores, pairs with the difference of rewards."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from alignkit import Prompt
from alignkit.groups import Pairs
from alignkit.rollout import States


@dataclass(frozen=True)
class PerturbedStates(States):
    """States with the random numbers of their scores."""

    other: Prompt | None = None
    """Another prompt of each row, for `contrast`."""
    blur: Tensor | None = None
    """(N, G, *S) added to the clean latent before it is scored; G is `gradient_samples`."""
    noise: Tensor | None = None
    """(N, G, *S) unit normal, for `purify`."""


@dataclass(frozen=True)
class ComparedPairs(Pairs):
    """Pairs with the difference of their rewards, for `label_scale`."""

    gap: Tensor
    """(N,) above 0."""
