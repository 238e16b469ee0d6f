"""The times of a sampler's steps, and the noise levels between them."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from alignkit import Policy
from alignkit.errors import ConfigError

Spacing = Literal["trailing", "leading"]


def spaced_times(policy: Policy, num_steps: int, spacing: Spacing) -> Tensor:
    """Times (num_steps,) at even distances in the table of the policy, the noisiest first (Lin et al. 2024, Table 2).

    "trailing" begins at pure noise, where a distilled model begins. "leading" ends at the second entry of the table,
    with the offset of one that every checkpoint of Stable Diffusion has; without it the last step would begin at the
    least noise. Raises ConfigError for as many steps as there are times, or more.
    """
    times = policy.times()
    check_steps(num_steps, len(times))
    if spacing == "leading":
        return times[torch.arange(num_steps - 1, -1, -1) * (len(times) // num_steps) + 1]
    # In NumPy, as diffusers does: torch rounds ties such as 937.5 another way.
    places = np.arange(len(times), 0, -len(times) / num_steps).round()[:num_steps] - 1
    return times[torch.from_numpy(places.astype(np.int64))]


def check_steps(num_steps: int, num_times: int | None) -> None:
    """Raise ConfigError for as many steps as the model has times, or more; None: their number is not known yet."""
    if num_times is not None and num_steps >= num_times:
        raise ConfigError(
            f"sampler.num_steps: found {num_steps}, expected 1 to {num_times - 1}; the model has {num_times} times"
        )


def next_level(policy: Policy, grid: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma (N,) after step k (N,): those of the next time of the grid, and no noise after the last."""
    last = k == len(grid) - 1
    alpha, sigma = policy.schedule(grid[(k + 1).clamp(max=len(grid) - 1)])
    return torch.where(last, 1.0, alpha), torch.where(last, 0.0, sigma)
