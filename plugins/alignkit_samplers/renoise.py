"""Predict the clean latent and noise it again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from alignkit import Policy, PolicyFacts, Prompt, Sampler, Transition, check_ranges, diffusion
from alignkit_samplers.schedule import Spacing, check_steps, next_level, spaced_times


@dataclass
class Renoise(Sampler):
    """Consistency sampling for other models that were distilled to few steps (SD-Turbo, DMD2).

    Every step predicts the clean latent and noises it again, with fresh noise, to the level of the next time; the
    last returns the prediction and is deterministic. An ancestral step keeps a part of the noise in its input, this one
    none: it adds the most noise that the schedule allows, and the later steps depend on the model through the clean
    prediction alone. The first step begins with unit noise.
    """

    spacing: Spacing = "trailing"
    """Distribution of the times: "trailing" begins at pure noise, "leading" ends near the least."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def check(self, facts: PolicyFacts) -> None:
        check_steps(self.num_steps, facts.num_times)

    def grid(self, policy: Policy) -> Tensor:
        return spaced_times(policy, self.num_steps, self.spacing)

    def transition(self, policy: Policy, x: Tensor, k: Tensor, prompt: Prompt) -> Transition:
        return renoise(policy, self.grid(policy).to(x.device), x, k, prompt)

    def stochastic_steps(self) -> int:
        return self.num_steps - 1


def renoise(policy: Policy, grid: Tensor, x: Tensor, k: Tensor, prompt: Prompt) -> Transition:
    """alpha' clean + sigma' noise at the level of the next time of the grid; the clean latent itself at the last."""
    clean = policy.denoise(x, grid[k], prompt)
    alpha, sigma = next_level(policy, grid, k)
    return Transition(diffusion.columns(alpha, clean) * clean, sigma, clean)
