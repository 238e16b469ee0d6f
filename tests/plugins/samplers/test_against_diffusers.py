"""Compare each sampler with diffusers' scheduler: the same network, noise and latents at every step.

The network is a fixed function, read as each prediction type in turn. Schedulers of the Euler family hold y = x / alpha
where a sampler here holds x; their latents are divided by sqrt(1 + s^2) = 1 / alpha before they are compared.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
)
from torch import Tensor

from alignkit import diffusion
from alignkit.interfaces import Sampler
from alignkit.records import Prompt
from alignkit.rollout import run_sampler
from alignkit_samplers.ddim import DDIM
from alignkit_samplers.euler_ancestral import EulerAncestral
from alignkit_samplers.lcm import LCM
from alignkit_samplers.renoise import Renoise
from alignkit_samplers.schedule import spaced_times

# diffusers' Euler schedulers hand tensors to NumPy in a way that NumPy 2 will not take for ever.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
STEPS = [1, 2, 3, 4, 5, 6, 7, 8, 50]
PROMPT = Prompt(table=torch.zeros(1, 1, 1), index=torch.zeros(2, dtype=torch.long))


class FixedPolicy:
    """The part of a policy that samplers need."""

    device = torch.device("cpu")

    def __init__(self, prediction: str, consistency: bool = False) -> None:
        self.prediction, self.consistency = prediction, consistency
        self.levels = DDPMScheduler(**BETAS).alphas_cumprod

    def times(self) -> Tensor:
        return torch.arange(len(self.levels))

    def network(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(0.7 * x.roll(1, dims=1) + 0.3 * x + t.view(-1, 1, 1, 1) / 1000)

    def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.levels[t].sqrt(), (1 - self.levels[t]).sqrt()

    def denoise(self, x: Tensor, t: Tensor, prompt: Prompt, guidance_scale: Tensor | None = None) -> Tensor:
        clean = diffusion.to_clean(self.prediction, self.network(x, t), x, *self.schedule(t))
        if not self.consistency:
            return clean
        c_skip, c_out = diffusion.boundary_scalings(t)
        return diffusion.columns(c_skip, x) * x + diffusion.columns(c_out, x) * clean


def unit_noises(num_steps: int) -> Tensor:
    """(2, K + 1, *S): the initial noise, then what a generator of seed 3 gives step by step."""
    initial = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(3)
    return torch.stack([initial, *(torch.randn(initial.shape, generator=generator) for _ in range(num_steps))], dim=1)


def theirs(scheduler: Any, policy: FixedPolicy, noises: Tensor, **step: Any) -> list[Tensor]:
    """Return the latents after each step of diffusers' loop, x = alpha y where the scheduler holds y."""
    y = noises[:, 0] * scheduler.init_noise_sigma
    generator, states = torch.Generator().manual_seed(3), []
    for k, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(y, t)
        times = t.long().expand(len(y))
        output = policy.network(scaled, times)
        if scheduler.config.prediction_type != policy.prediction:  # what Euler ancestral of diffusers does not speak
            clean = diffusion.to_clean(policy.prediction, output, scaled, *policy.schedule(times))
            output = diffusion.to_noise(clean, scaled, *policy.schedule(times))
        y = scheduler.step(output, t, y, generator=generator, **step).prev_sample
        states.append(y / (1 + scheduler.sigmas[k + 1] ** 2).sqrt() if hasattr(scheduler, "sigmas") else y)
    return states


def assert_same_trajectory(sampler: Sampler, policy: FixedPolicy, expected: list[Tensor], noises: Tensor) -> None:
    found = run_sampler(policy, sampler, PROMPT, noises).next_states  # type: ignore[arg-type]
    for k, state in enumerate(expected):
        assert torch.allclose(found[:, k], state, atol=1e-4 * float(state.abs().max()), rtol=1e-4), k


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_euler_ancestral(num_steps: int, prediction: str, spacing: Any) -> None:
    spoken = "epsilon" if prediction == "sample" else prediction
    scheduler = EulerAncestralDiscreteScheduler(
        **BETAS, prediction_type=spoken, timestep_spacing=spacing, steps_offset=1
    )
    scheduler.set_timesteps(num_steps)
    policy, noises, sampler = (
        FixedPolicy(prediction),
        unit_noises(num_steps),
        EulerAncestral(num_steps, spacing=spacing),
    )
    begin = scheduler.init_noise_sigma / (1 + scheduler.sigmas[0] ** 2) ** 0.5
    assert sampler.initial_scale(policy) == pytest.approx(float(begin), rel=1e-6)  # type: ignore[arg-type]
    assert_same_trajectory(sampler, policy, theirs(scheduler, policy, noises), noises)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_euler_ancestral_with_eta_zero_is_euler(num_steps: int, prediction: str, spacing: Any) -> None:
    scheduler = EulerDiscreteScheduler(**BETAS, prediction_type=prediction, timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(num_steps)
    policy, noises = FixedPolicy(prediction), unit_noises(num_steps)
    sampler = EulerAncestral(num_steps, eta=0.0, spacing=spacing)
    assert_same_trajectory(sampler, policy, theirs(scheduler, policy, noises), noises)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("num_steps", "spacing"), [(k, "leading") for k in STEPS] + [(k, "trailing") for k in STEPS if 1000 % k == 0]
)
def test_ddim(num_steps: int, spacing: Any, eta: float, prediction: str) -> None:
    scheduler = DDIMScheduler(
        **BETAS, prediction_type=prediction, timestep_spacing=spacing, steps_offset=1, clip_sample=False,
        set_alpha_to_one=False,
    )  # fmt: skip
    scheduler.set_timesteps(num_steps)
    policy, noises = FixedPolicy(prediction), unit_noises(num_steps)
    expected = theirs(scheduler, policy, noises, eta=eta)
    assert_same_trajectory(DDIM(num_steps, eta, spacing), policy, expected, noises)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("num_steps", STEPS)
def test_ddim_takes_the_next_time_from_the_schedule_where_that_is_uneven(num_steps: int, prediction: str) -> None:
    # DDIMScheduler subtracts 1000 // K from the time, which misses the next entry where K does not divide 1000.
    scheduler = DDPMScheduler(**BETAS, prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(timesteps=DDIM(num_steps).grid(FixedPolicy(prediction)).tolist())  # type: ignore[arg-type]
    policy, noises = FixedPolicy(prediction), unit_noises(num_steps)
    expected = theirs(scheduler, policy, noises)[:-1]  # its last step ends without noise
    assert_same_trajectory(DDIM(num_steps, eta=1.0), policy, expected, noises)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("num_steps", STEPS)
def test_lcm(num_steps: int, prediction: str) -> None:
    scheduler = LCMScheduler(**BETAS, prediction_type=prediction)
    scheduler.set_timesteps(num_steps)
    policy, noises = FixedPolicy(prediction, consistency=True), unit_noises(num_steps)
    assert_same_trajectory(LCM(num_steps), policy, theirs(scheduler, policy, noises), noises)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_renoise_is_lcm_without_the_boundary_on_its_own_times(num_steps: int, prediction: str, spacing: Any) -> None:
    # With the times scaled up that far c_skip is 0 and c_out is 1: the network's own clean latent.
    scheduler = LCMScheduler(**BETAS, prediction_type=prediction, timestep_scaling=1e9, original_inference_steps=1000)
    sampler, policy, noises = Renoise(num_steps, spacing), FixedPolicy(prediction), unit_noises(num_steps)
    scheduler.set_timesteps(timesteps=sampler.grid(policy).tolist())  # type: ignore[arg-type]
    assert_same_trajectory(sampler, policy, theirs(scheduler, policy, noises), noises)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_the_times_are_those_of_diffusers_for_every_number(spacing: Any) -> None:
    scheduler = DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
    policy: Any = FixedPolicy("epsilon")
    for num_steps in range(1, 1000):
        scheduler.set_timesteps(num_steps)
        times = spaced_times(policy, num_steps, spacing).tolist()
        assert times == scheduler.timesteps.tolist()[:num_steps], num_steps
        assert len(set(times)) == num_steps and min(times) >= 0
