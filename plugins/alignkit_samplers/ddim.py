"""DDIM, deterministic or stochastic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from alignkit import Policy, PolicyFacts, Prompt, Sampler, Transition, check_ranges, diffusion
from alignkit_samplers.schedule import Spacing, check_steps, spaced_times


@dataclass
class DDIM(Sampler):
    """DDIM (Song et al. 2021, Eq. 12 and 16).

    The last step goes to the time of least noise, train timestep 0, as the official policy-gradient implementations do.
    With eta = 1 it keeps a standard deviation, of about .029 for Stable Diffusion, and therefore a likelihood.
    """

    eta: Annotated[float, Ge(0), Le(1)] = 1.0
    """0 is deterministic, 1 the DDPM posterior."""
    spacing: Spacing = "trailing"
    """Distribution of the times: "trailing" begins at pure noise, as distilled models do; "leading" is what Stable
    Diffusion's own pipelines and the policy-gradient papers use with many steps."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def check(self, facts: PolicyFacts) -> None:
        check_steps(self.num_steps, facts.num_times)

    def grid(self, policy: Policy) -> Tensor:
        return spaced_times(policy, self.num_steps, self.spacing)

    def transition(self, policy: Policy, x: Tensor, k: Tensor, prompt: Prompt) -> Transition:
        grid = torch.cat([self.grid(policy), policy.times()[:1]]).to(x.device)
        clean = policy.denoise(x, grid[k], prompt)
        alpha, sigma = policy.schedule(grid[k])
        alpha_next, sigma_next = policy.schedule(grid[k + 1])
        std = diffusion.ddim_std(alpha, sigma, alpha_next, sigma_next, self.eta)
        noise = diffusion.to_noise(clean, x, alpha, sigma)
        direction = (sigma_next**2 - std**2).clamp(min=0).sqrt()
        mean = diffusion.columns(alpha_next, x) * clean + diffusion.columns(direction, x) * noise
        return Transition(mean, std, clean)

    def stochastic_steps(self) -> int:
        return self.num_steps if self.eta else 0
