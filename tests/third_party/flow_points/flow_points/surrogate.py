"""A surrogate on points."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alignkit import Policy, Prompt, Surrogate


@dataclass
class PointScorer(Surrogate):
    """A network on the point and the text; its scores are log-odds up to a constant."""

    width: int = 32
    """Width of the hidden layer."""

    def load(self, policy: Policy) -> None:
        inputs = math.prod(policy.latent_shape) + policy.encode([""]).features.shape[-1]
        layers = nn.Linear(inputs, self.width), nn.SiLU(), nn.Linear(self.width, 1)
        self._network = nn.Sequential(*layers).to(policy.device).requires_grad_(False)

    def score(self, latents: Tensor, prompt: Prompt) -> Tensor:
        scores: Tensor = self._network(torch.cat([latents.flatten(1), prompt.features.mean(1)], dim=1))[:, 0]
        return scores

    def loss(self, winner: Tensor, loser: Tensor, prompt: Prompt) -> Tensor:
        return -F.logsigmoid(self.score(winner, prompt) - self.score(loser, prompt)).mean()

    def module(self) -> nn.Module:
        return self._network
