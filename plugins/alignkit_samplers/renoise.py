"""Predict the clean latent, noise it again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from alignkit import diffusion
from alignkit.interfaces import Policy, Sampler
from alignkit.records import Prompt, Transition
from alignkit_samplers.schedule import Spacing, check_spaced, next_level, spaced_times


@dataclass
class Renoise(Sampler):
    """The walk of consistency models for models that are none: those distilled to few steps (SD-Turbo, DMD2).

    Every step predicts the clean latent and noises it again, with fresh noise, to the level of the next time; the
    last returns the prediction and is deterministic. An ancestral step keeps a part of the noise it came with, this one
    none: the noise it adds is the largest that the schedule allows, and what follows depends on the model through the
    clean prediction alone. The first step begins with unit noise.
    """

    spacing: Spacing = "trailing"
    """How the times are spread: "trailing" begins at pure noise, "leading" ends at the least."""

    def __post_init__(self) -> None:
        check_spaced(self.num_steps, self.spacing)

    def grid(self, policy: Policy) -> Tensor:
        return spaced_times(self.num_steps, self.spacing)

    def transition(self, policy: Policy, x: Tensor, k: Tensor, prompt: Prompt) -> Transition:
        return renoise(policy, self.grid(policy).to(x.device), x, k, prompt)

    def stochastic_steps(self) -> int:
        return self.num_steps - 1


def renoise(policy: Policy, grid: Tensor, x: Tensor, k: Tensor, prompt: Prompt) -> Transition:
    """alpha' clean + sigma' noise at the level of the next time of the grid; the clean latent itself at the last."""
    clean = policy.denoise(x, grid[k], prompt)
    alpha, sigma = next_level(policy, grid, k)
    return Transition(diffusion.columns(alpha, clean) * clean, sigma, clean)
