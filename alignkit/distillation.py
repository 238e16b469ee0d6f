"""The latent consistency distillation loss (Luo et al. 2023, Algorithm 1; RG-LCD, Eq. 9 and 13)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from alignkit import diffusion
from alignkit.errors import ConfigError
from alignkit.interfaces import Context, Policy, Sampler
from alignkit.records import PolicyFacts, Prompt, Rows

Distance = Literal["huber", "l2"]


@dataclass(frozen=True)
class Noised(Rows):
    """Captioned latents with the random numbers of one distillation step."""

    latents: Tensor
    """(N, *S) of real images."""
    prompt: Prompt
    noise: Tensor
    """(N, *S) unit normal."""
    level: Tensor
    """(N,) index of the solver step, in 1 .. ode_steps."""
    guidance_scale: Tensor
    """(N,) guidance scale of the augmented teacher (w + 1 of the LCM paper)."""


@dataclass(frozen=True)
class Distillation:
    """The settings of the loss; defaults are those of the LCM paper and of diffusers' script."""

    ode_steps: int = 50
    guidance_scale_min: float = 6.0
    guidance_scale_max: float = 16.0
    huber_c: float = 1e-3
    distance: Distance = "huber"

    def __post_init__(self) -> None:
        if self.ode_steps < 1:
            raise ValueError(f"ode_steps: found {self.ode_steps}, expected 1 or more")
        if self.guidance_scale_min > self.guidance_scale_max:
            raise ValueError(
                f"guidance_scale_min: found {self.guidance_scale_min}, expected at most guidance_scale_max, which is "
                f"{self.guidance_scale_max}"
            )

    def check(self, sampler: Sampler, facts: PolicyFacts, section: str = "algorithm") -> None:
        """Raise ConfigError for a student that this loss cannot distil: one that is no latent consistency model, or
        whose times the solver's steps do not divide evenly.

        `section` is where the settings stand in a run file.
        """
        if not sampler.consistency:
            raise ConfigError(
                f"sampler.name: found {type(sampler).__name__}, expected lcm: only a latent consistency model has this "
                "distillation loss. If the model is one, set lcm; one of many steps becomes one with lcd and "
                'model.prediction = "consistency"; one distilled otherwise, as SD-Turbo, is trained without this loss '
                "(regulariser = [], if the algorithm can do without)"
            )
        # A consistency sampler of a third party may have no such grid.
        if (steps := sampler.distilled_steps()) not in (0, self.ode_steps):
            raise ConfigError(
                f"{section}.ode_steps: found {self.ode_steps}, expected {steps}, which is "
                "sampler.original_steps; both must be what the model was distilled with"
            )
        if facts.num_times is not None:
            self.check_steps(facts.num_times, f"{section}.ode_steps")

    def check_steps(self, num_times: int, key: str = "ode_steps") -> None:
        """Raise ConfigError where the solver's steps do not divide this number of times evenly."""
        if num_times % self.ode_steps:
            raise ConfigError(
                f"{key}: found {self.ode_steps}, expected a divisor of {num_times}, the number of times of the model"
            )

    def sample(self, latents: Tensor, prompt: Prompt, ctx: Context) -> Noised:
        """Sample a solver step, a guidance scale and noise for each latent (N, *S)."""
        count, device = len(latents), latents.device
        level = torch.randint(1, self.ode_steps + 1, (count,), generator=ctx.generator).to(device)
        share = torch.rand(count, generator=ctx.generator).to(device)
        return Noised(
            latents,
            prompt,
            ctx.noise(count),
            level,
            self.guidance_scale_min + share * (self.guidance_scale_max - self.guidance_scale_min),
        )

    def times(self, policy: Policy) -> Tensor:
        """The times of the solver (ode_steps + 1,), on the policy's device: that of least noise, then one a step.

        Raises ConfigError where the steps do not divide the times of the policy evenly.
        """
        times = policy.times()
        self.check_steps(len(times))
        stride = len(times) // self.ode_steps
        return torch.cat([times[:1], times[stride - 1 :: stride]]).to(policy.device)

    def noised(self, policy: Policy, rows: Noised) -> tuple[Tensor, Tensor]:
        """z_t (N, *S) and t (N,): the latents noised to their solver times, by the schedule of `policy`."""
        t = self.times(policy)[rows.level]
        return diffusion.add_noise(rows.latents, rows.noise, *policy.schedule(t)), t

    def solve(self, teacher: Policy, rows: Noised) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One guided DDIM step of the teacher: (z_t, t, z_t', t') with t' the next lower solver time."""
        z, t = self.noised(teacher, rows)
        t_next = self.times(teacher)[rows.level - 1]
        alpha, sigma = teacher.schedule(t)
        with torch.no_grad():
            clean = teacher.denoise(z, t, rows.prompt, rows.guidance_scale)
            noise = diffusion.to_noise(clean, z, alpha, sigma)
            z_next = diffusion.add_noise(clean, noise, *teacher.schedule(t_next))
        return z, t, z_next, t_next

    def loss(
        self, policy: Policy, teacher: Policy, rows: Noised, average: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return the distance (N,) between the student's prediction at t and its target at t'."""
        return self.distances(*self.predictions(policy, teacher, rows, average))

    def predictions(
        self, policy: Policy, teacher: Policy, rows: Noised, average: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return f_theta(z_t, t) and, without gradient, the target f_theta-(z_t', t'), (N, *S) both.

        theta- are the weights of `average` by name, or the student's own if it has none.
        """
        z, t, z_next, t_next = self.solve(teacher, rows)
        with torch.no_grad(), policy.using(average) if average else nullcontext():
            target = self.predict(policy, z_next, t_next, rows)
        return self.predict(policy, z, t, rows), target

    def predict(self, policy: Policy, x: Tensor, t: Tensor, rows: Noised) -> Tensor:
        """Return f_theta(x, t) (N, *S), at the sampled guidance scale if the student takes one.

        An LCM-LoRA takes none: its weights hold the guidance of its teacher, and it predicts with the text alone.
        """
        scale = rows.guidance_scale if policy.guidance_embedded else torch.ones_like(rows.guidance_scale)
        return policy.denoise(x, t, rows.prompt, scale)

    def distances(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean over elements of pseudo-Huber or squared distances between latents (N, *S), (N,)."""
        difference = prediction - target
        each = difference**2 if self.distance == "l2" else pseudo_huber(difference, self.huber_c)
        return each.flatten(1).mean(1)


class Average:
    """theta-, the average of the student that gives the target (decay mu of Algorithm 1); with decay 0 none."""

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"target_decay: found {decay}, expected at least 0 and less than 1")
        self.decay = decay
        self.weights: dict[str, Tensor] = {}

    def start(self, policy: Policy) -> None:
        """Start from the student's weights."""
        if self.decay:
            self.weights = {name: p.detach().clone() for name, p in policy.weights().items()}

    @torch.no_grad()
    def follow(self, policy: Policy) -> None:
        """Update theta- <- mu theta- + (1 - mu) theta."""
        own = policy.weights()
        for name, average in self.weights.items():
            average.lerp_(own[name], 1 - self.decay)

    def state_dict(self) -> dict[str, Any]:
        return {"target": dict(self.weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state["target"].items():
            self.weights[name].copy_(value)


def pseudo_huber(difference: Tensor, c: float) -> Tensor:
    """Return sqrt(u^2 + c^2) - c, element by element."""
    return (difference**2 + c**2).sqrt() - c
