"""The latent consistency sampler against diffusers' LCMScheduler."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler

from alignkit.errors import ConfigError
from alignkit.models.diffusers_policy import DiffusersPolicy
from alignkit_samplers.lcm import LCM

GOLDEN = {
    1: [999],
    2: [999, 499],
    3: [999, 679, 339],
    4: [999, 759, 499, 259],
    6: [999, 839, 679, 499, 339, 179],
    8: [999, 879, 759, 639, 499, 379, 259, 139],
}


@pytest.fixture(scope="module")
def policy(tiny_lcm: Path) -> DiffusersPolicy:
    return DiffusersPolicy(str(tiny_lcm), trainable=False)


@pytest.mark.parametrize("num_steps", GOLDEN)
def test_the_steps_are_golden(policy: DiffusersPolicy, num_steps: int) -> None:
    assert LCM(num_steps).grid(policy).tolist() == GOLDEN[num_steps]


@pytest.mark.parametrize("original_steps", [50, 40, 25])
def test_the_steps_are_those_of_diffusers_for_every_number(policy: DiffusersPolicy, original_steps: int) -> None:
    scheduler = LCMScheduler(original_inference_steps=original_steps)
    for num_steps in range(1, original_steps + 1):
        scheduler.set_timesteps(num_steps)
        assert LCM(num_steps, original_steps).grid(policy).tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_only_the_last_step_is_deterministic_and_returns_the_prediction(
    policy: DiffusersPolicy, num_steps: int
) -> None:
    k = torch.arange(num_steps)
    x = torch.randn(num_steps, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        step = LCM(num_steps).transition(policy, x, k, policy.encode(["a red circle"] * num_steps))
    assert (step.std > 0).tolist() == [True] * (num_steps - 1) + [False]
    assert torch.equal(step.mean[-1], step.clean[-1])
    alpha, sigma = policy.schedule(torch.tensor(GOLDEN[num_steps][1:], dtype=torch.long))
    assert torch.equal(step.std[:-1], sigma)
    assert torch.allclose(step.mean[:-1], alpha.view(-1, 1, 1, 1) * step.clean[:-1])


@pytest.mark.parametrize("fields", [{"num_steps": 0}, {"num_steps": 51}, {"original_steps": 0}])
def test_numbers_that_make_no_schedule_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        LCM(**fields)


def test_more_original_steps_than_the_model_has_times_are_refused(policy: DiffusersPolicy) -> None:
    with pytest.raises(ConfigError, match=r"sampler.original_steps: found 1001, expected 1 to 1000, the number"):
        LCM(original_steps=1001).grid(policy)


def test_a_number_of_steps_below_1_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^num_steps: found 0, expected 1 or more$"):
        LCM(num_steps=0)
