"""Euler steps with ancestral noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le
from torch import Tensor

from alignkit import Policy, PolicyFacts, Prompt, Sampler, Transition, check_ranges, diffusion
from alignkit_samplers.schedule import Spacing, check_steps, next_level, spaced_times


@dataclass
class EulerAncestral(Sampler):
    """Euler's method with fresh noise after every step (Karras et al. 2022; k-diffusion), the sampler of SDXL-Turbo.

    The source writes it for y = clean + s noise, where s = sigma / alpha grows without bound. From s to s' < s it takes

        y' = clean + down * noise + up * fresh,    up = eta s' sqrt(1 - (s' / s)^2),    down = sqrt(s'^2 - up^2)

    Latents here are x = alpha y, so both deviations are multiplied with the alpha' of the next time, and s' alpha' is
    its sigma'. With eta = 1 this is the posterior of the diffusion, the same as DDIM's at eta = 1. The two differ at
    the end, which here is the clean prediction and deterministic, and at the beginning, see `initial_scale`.
    """

    eta: Annotated[float, Ge(0), Le(1)] = 1.0
    """Share of the ancestral noise: 1 is Euler ancestral, 0 Euler's method, deterministic at every step (SD-Turbo's
    and SDXL-Lightning's)."""
    spacing: Spacing = "trailing"
    """Distribution of the times: "trailing" begins at pure noise, "leading" ends near the least."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def check(self, facts: PolicyFacts) -> None:
        check_steps(self.num_steps, facts.num_times)

    def grid(self, policy: Policy) -> Tensor:
        return spaced_times(policy, self.num_steps, self.spacing)

    def transition(self, policy: Policy, x: Tensor, k: Tensor, prompt: Prompt) -> Transition:
        grid = self.grid(policy).to(x.device)
        clean = policy.denoise(x, grid[k], prompt)
        alpha, sigma = policy.schedule(grid[k])
        alpha_next, sigma_next = next_level(policy, grid, k)
        ratio = (sigma_next / alpha_next) / (sigma / alpha)
        up = self.eta * sigma_next * (1 - ratio**2).clamp(min=0).sqrt()
        down = (sigma_next**2 - up**2).clamp(min=0).sqrt()
        noise = diffusion.to_noise(clean, x, alpha, sigma)
        mean = diffusion.columns(alpha_next, x) * clean + diffusion.columns(down, x) * noise
        return Transition(mean, up, clean)

    def initial_scale(self, policy: Policy) -> float:
        """The first latent is y = s noise, which neglects the little that alpha leaves of the image there. With
        "leading" times diffusers begins at y = sqrt(s^2 + 1) noise, which is unit noise."""
        first = self.grid(policy)[:1]
        return float(policy.schedule(first.to(policy.device))[1]) if self.spacing == "trailing" else 1.0

    def stochastic_steps(self) -> int:
        return self.num_steps - 1 if self.eta else 0
