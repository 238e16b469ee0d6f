"""Dense rewards of a trajectory from few queries, and the returns of its steps, as pure functions.

N trajectories of K steps, Q of them queried. `clean` (N, K, *S) holds the clean latent that is predicted at each step;
`step` (N, Q) the queried steps, ascending, and `rewards` (N, Q) their rewards, NaN where an image could not be scored.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

ALL_BELOW = {"three": 5, "two": 3, "one": 2}
"""Number of steps below which every step is queried. At four, three queries would save one and cost a bias."""
SMALLEST = 1e-8
"""Added to every similarity, so that a step that resembles no queried step gets their plain mean."""


def similarity(clean: Tensor, step: Tensor) -> Tensor:
    """Return the cosine of each predicted clean latent with that of step `step` (N,), (N, K) float32 (SDPO, Eq. 9)."""
    latents = clean.float().flatten(2)
    at = latents[torch.arange(len(latents), device=latents.device), step]
    return F.cosine_similarity(latents, at[:, None], dim=2)


def adaptive_anchor(clean: Tensor) -> Tensor:
    """Return the step (N,) between the ends that is least like the first and the last (SDPO, Eq. 10).

    Raises ValueError with fewer than 3 steps.
    """
    count, num_steps = clean.shape[:2]
    if num_steps < 3:
        raise ValueError(f"adaptive_anchor: found {num_steps} steps, expected at least 3: it lies between the ends")
    ends = torch.tensor([0, num_steps - 1], device=clean.device)
    first, last = (similarity(clean, end.expand(count)) for end in ends)
    return (first + last)[:, 1:-1].argmin(1) + 1


def queried_steps(clean: Tensor, queries: str, anchor: str, generator: torch.Generator) -> Tensor:
    """Choose the steps with predictions to score, ascending, (N, Q).

    `queries` is "three" (first, anchor, last), "two" (first and last), "one" (last) or "all"; `anchor` "adaptive",
    "random" or "fixed", which is the middle step.
    """
    count, num_steps = clean.shape[:2]
    if queries == "all" or num_steps < ALL_BELOW[queries]:
        return torch.arange(num_steps, device=clean.device).repeat(count, 1)
    first, last = torch.zeros(count, dtype=torch.long), torch.full((count,), num_steps - 1)
    if queries == "one":
        return last[:, None].to(clean.device)
    if queries == "two":
        return torch.stack([first, last], dim=1).to(clean.device)
    if anchor == "adaptive":
        middle = adaptive_anchor(clean).cpu()
    elif anchor == "random":
        middle = torch.randint(1, num_steps - 1, (count,), generator=generator)
    else:
        middle = torch.full((count,), (num_steps - 1) // 2)
    return torch.stack([first, middle, last], dim=1).to(clean.device)


def by_similarity(clean: Tensor, step: Tensor, rewards: Tensor) -> Tensor:
    """Return the mean of the queried rewards, weighted by likeness to the queried steps, (N, K) (SDPO, Eq. 11).

    Queried steps keep their own rewards. A negative cosine counts as 0.
    """
    weights = torch.stack([similarity(clean, column) for column in step.T], dim=2).clamp(min=0) + SMALLEST
    dense = (weights * rewards[:, None]).sum(2) / weights.sum(2)
    return dense.scatter(1, step, rewards)


def by_interpolation(num_steps: int, step: Tensor, rewards: Tensor) -> Tensor:
    """Interpolate the queried rewards linearly over the number of the step, (N, K); constant beyond the ends."""
    every = torch.arange(num_steps, device=step.device).repeat(len(step), 1)
    after = torch.searchsorted(step.contiguous(), every).clamp(max=step.shape[1] - 1)
    before = (after - 1).clamp(min=0)
    left, right = step.gather(1, before), step.gather(1, after)
    share = ((every - left) / (right - left).clamp(min=1)).clamp(0, 1)
    start, end = rewards.gather(1, before), rewards.gather(1, after)
    return (start + share * (end - start)).scatter(1, step, rewards)


def discounted_returns(rewards: Tensor, discount: float) -> Tensor:
    """Return G_i = R_i + discount G_{i+1} over steps in the order of sampling, (N, K) (SDPO, Eq. 13)."""
    if not discount:  # a step then depends on no other, not even on one that could not be scored
        return rewards
    returns = rewards.clone()
    for k in range(rewards.shape[1] - 2, -1, -1):
        returns[:, k] += discount * returns[:, k + 1]
    return returns
