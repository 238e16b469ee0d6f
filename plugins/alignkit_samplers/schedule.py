"""The times of a walk, and the noise levels between them."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from alignkit.interfaces import Policy

Spacing = Literal["trailing", "leading"]


def spaced_times(num_steps: int, spacing: Spacing) -> Tensor:
    """The times (num_steps,) of a schedule of 1000, the noisiest first (Lin et al. 2024, Table 2).

    "trailing" begins at 999, where a distilled model begins. "leading" ends at 1, with the offset of one that every
    checkpoint of Stable Diffusion names; without it the last step would begin where the noise has ended.
    """
    if spacing == "leading":
        return torch.arange(num_steps - 1, -1, -1) * (1000 // num_steps) + 1
    # In NumPy, as diffusers does: torch rounds ties such as 937.5 another way.
    times = np.arange(1000, 0, -1000 / num_steps).round()[:num_steps] - 1
    return torch.from_numpy(times.astype(np.int64))


def check_spaced(num_steps: int, spacing: str) -> None:
    """Raise ValueError for what makes no schedule."""
    if not 1 <= num_steps <= 999:
        raise ValueError(f"num_steps is {num_steps}, expected 1 to 999")
    if spacing not in ("trailing", "leading"):
        raise ValueError(f"spacing is {spacing!r}, expected trailing or leading")


def next_level(policy: Policy, grid: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma (N,) behind step k (N,): those of the next time of the grid, and no noise behind the last."""
    last = k == len(grid) - 1
    alpha, sigma = policy.schedule(grid[(k + 1).clamp(max=len(grid) - 1)])
    return torch.where(last, 1.0, alpha), torch.where(last, 0.0, sigma)
