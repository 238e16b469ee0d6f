"""Renoise: the clean prediction, noised again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.models.diffusers_policy import DiffusersPolicy
from alignkit_samplers.renoise import Renoise
from alignkit_samplers.schedule import Spacing


@pytest.fixture(scope="module")
def policy(tiny_teacher: Path) -> DiffusersPolicy:
    return DiffusersPolicy(str(tiny_teacher), trainable=False)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_the_next_state_depends_on_the_model_through_its_prediction_alone(
    policy: DiffusersPolicy, num_steps: int
) -> None:
    x = torch.randn(num_steps, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    k, sampler = torch.arange(num_steps), Renoise(num_steps)
    with torch.no_grad():
        step = sampler.transition(policy, x, k, policy.encode(["a red circle"] * num_steps))
    alpha, sigma = policy.schedule(sampler.grid(policy)[1:])
    assert torch.equal(step.std, torch.cat([sigma, torch.zeros(1)]))
    assert torch.allclose(step.mean[:-1], alpha.view(-1, 1, 1, 1) * step.clean[:-1])
    assert torch.equal(step.mean[-1], step.clean[-1])


@pytest.mark.parametrize("fields", [{"num_steps": 0}, {"spacing": "linspace"}])
def test_what_makes_no_schedule_is_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Renoise(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_steps", [1000, 1001])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_more_steps_than_the_model_has_times_are_refused(
    policy: DiffusersPolicy, num_steps: int, spacing: Spacing
) -> None:
    with pytest.raises(ConfigError, match=rf"sampler.num_steps: found {num_steps}, expected 1 to 999;"):
        Renoise(num_steps, spacing=spacing).grid(policy)


def test_a_number_of_steps_below_1_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^num_steps: found 0, expected 1 or more$"):
        Renoise(num_steps=0)
