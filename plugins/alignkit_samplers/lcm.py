"""Multistep sampling of latent consistency models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from alignkit import Policy, PolicyFacts, Prompt, Sampler, Transition, check_ranges
from alignkit.errors import ConfigError
from alignkit_samplers.renoise import renoise


@dataclass
class LCM(Sampler):
    """Latent consistency sampling (Luo et al. 2023, Algorithm 2), with the schedule of diffusers' LCMScheduler.

    Every step predicts the clean latent and noises it again to the level of the next step; the last returns the
    prediction and is deterministic, so with one step no step has a likelihood.
    """

    consistency: ClassVar[bool] = True

    original_steps: Annotated[int, Ge(1)] = 50
    """Solver steps of the distillation. Must be what the checkpoint was distilled with."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.num_steps > self.original_steps:
            raise ValueError(
                f"num_steps: found {self.num_steps}, expected 1 to original_steps, which is {self.original_steps}"
            )

    def check(self, facts: PolicyFacts) -> None:
        if facts.num_times is not None and self.original_steps > facts.num_times:
            raise ConfigError(
                f"sampler.original_steps: found {self.original_steps}, expected 1 to {facts.num_times}, the number of "
                "times of the model"
            )

    def grid(self, policy: Policy) -> Tensor:
        times = policy.times()
        self.check(PolicyFacts(num_times=len(times)))
        places = np.arange(1, self.original_steps + 1) * (len(times) // self.original_steps) - 1
        index = np.floor(np.linspace(0, len(places), num=self.num_steps, endpoint=False)).astype(np.int64)
        return times[torch.from_numpy(places[::-1].copy()[index])]

    def transition(self, policy: Policy, x: Tensor, k: Tensor, prompt: Prompt) -> Transition:
        return renoise(policy, self.grid(policy).to(x.device), x, k, prompt)

    def stochastic_steps(self) -> int:
        return self.num_steps - 1

    def distilled_steps(self) -> int:
        return self.original_steps
