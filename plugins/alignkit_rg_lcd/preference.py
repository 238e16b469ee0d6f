"""Preferences between the three latents of one row, as log-odds, and the divergence of two reward models in them."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

PAIRS = ((0, 1), (0, 2), (1, 2))
"""Pairs of the real latent, the student's prediction and the target (z_0, z_1 and z_2)."""
CERTAIN = 100.0
"""Log-odds of a certain preference."""

Direction = Literal["forward", "reverse"]
RealImages = Literal["judged", "never_worse", "always_best"]


def margins(scores: Tensor) -> Tensor:
    """Return the differences (N, 3) of scores (N, 3) over `PAIRS`."""
    first, second = ([pair[side] for pair in PAIRS] for side in (0, 1))
    return scores[:, first] - scores[:, second]


def with_real_images(odds: Tensor, real: RealImages) -> Tensor:
    """Return the expert's log-odds (N, 3) over `PAIRS`, those of real images changed as `real` states; NaN stays."""
    if real == "judged":
        return odds
    against_real = odds[:, :2].clamp(min=0) if real == "never_worse" else odds[:, :2] * 0 + CERTAIN
    changed = odds.clone()
    changed[:, :2] = against_real
    return changed


def divergence(proxy: Tensor, expert: Tensor, direction: Direction) -> Tensor:
    """Return the KL divergence between the preferences P of the proxy and Q of the expert, element by element.

    Both are log-odds. "forward" is KL(Q || P), as in the released code; "reverse" is KL(P || Q), as in Eq. 12.
    """
    of, to = (expert, proxy) if direction == "forward" else (proxy, expert)
    win = of.sigmoid() * (logsigmoid(of) - logsigmoid(to))
    lose = (-of).sigmoid() * (logsigmoid(-of) - logsigmoid(-to))
    return win + lose


def preference_loss(proxy: Tensor, expert: Tensor, direction: Direction) -> Tensor:
    """Return L_RM (Eq. 12) of log-odds (N, 3): the sum over pairs, the mean over rows. A pair with NaN counts as 0."""
    known = expert.isfinite()
    apart = divergence(proxy, expert.masked_fill(~known, 0), direction)
    return apart.masked_fill(~known, 0).sum(1).mean()
