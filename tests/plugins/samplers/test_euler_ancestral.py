"""Euler ancestral: the numbers of its paper's form, and what it shares with DDIM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.models.diffusers_policy import DiffusersPolicy
from alignkit_samplers.ddim import DDIM
from alignkit_samplers.euler_ancestral import EulerAncestral
from alignkit_samplers.schedule import Spacing


@pytest.fixture(scope="module")
def policy(tiny_teacher: Path) -> DiffusersPolicy:
    return DiffusersPolicy(str(tiny_teacher), trainable=False)


def states(policy: DiffusersPolicy, count: int) -> torch.Tensor:
    return torch.randn(count, *policy.latent_shape, generator=torch.Generator().manual_seed(0))


def test_four_trailing_steps_have_the_golden_deviations(policy: DiffusersPolicy) -> None:
    sampler = EulerAncestral(4)
    assert sampler.grid(policy).tolist() == [999, 749, 499, 249]
    alpha, sigma = policy.schedule(sampler.grid(policy))
    assert (sigma / alpha).tolist() == pytest.approx([14.6146469, 4.0817308, 1.6128871, 0.6932054], rel=1e-5)
    prompt = policy.encode(["a red circle"] * 4)
    with torch.no_grad():
        step = sampler.transition(policy, states(policy, 4), torch.arange(4), prompt)
    alpha_next = torch.cat([alpha[1:], torch.ones(1)])
    assert (step.std / alpha_next).tolist() == pytest.approx([3.9193053, 1.4816264, 0.6259146, 0.0], rel=1e-5)
    noise = (states(policy, 4) - alpha.view(-1, 1, 1, 1) * step.clean) / sigma.view(-1, 1, 1, 1)
    kept = (step.mean / alpha_next.view(-1, 1, 1, 1) - step.clean) / noise
    assert kept.flatten(1).median(1).values.tolist() == pytest.approx([1.1399877, 0.6373288, 0.2979339, 0], abs=1e-3)
    assert torch.equal(step.mean[-1], step.clean[-1])


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("num_steps", [2, 3, 4, 5, 6, 7, 8, 50])
def test_before_the_last_step_it_is_ddim(policy: DiffusersPolicy, num_steps: int, eta: float) -> None:
    x, k = states(policy, num_steps), torch.arange(num_steps)
    prompt = policy.encode(["a red circle"] * num_steps)
    with torch.no_grad():
        euler = EulerAncestral(num_steps, eta).transition(policy, x, k, prompt)
        ddim = DDIM(num_steps, eta).transition(policy, x, k, prompt)
    assert torch.allclose(euler.std[:-1], ddim.std[:-1], rtol=1e-4, atol=1e-6)
    assert torch.allclose(euler.mean[:-1], ddim.mean[:-1], rtol=1e-3, atol=1e-3)
    assert float(euler.std[-1]) == 0
    assert (eta == 0) or float(ddim.std[-1]) > 0


def test_the_beginning_leaves_out_the_image_that_trailing_times_cannot_hide(policy: DiffusersPolicy) -> None:
    assert EulerAncestral(4).initial_scale(policy) == pytest.approx(14.6146469 / (1 + 14.6146469**2) ** 0.5, rel=1e-6)
    assert EulerAncestral(4, spacing="leading").initial_scale(policy) == 1.0


@pytest.mark.parametrize("fields", [{"num_steps": 0}, {"eta": -0.1}, {"spacing": "linspace"}])
def test_what_makes_no_schedule_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        EulerAncestral(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_steps", [1000, 1001])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_more_steps_than_the_model_has_times_are_refused(
    policy: DiffusersPolicy, num_steps: int, spacing: Spacing
) -> None:
    with pytest.raises(ConfigError, match=rf"sampler.num_steps: found {num_steps}, expected 1 to 999;"):
        EulerAncestral(num_steps, spacing=spacing).grid(policy)


def test_a_number_of_steps_below_1_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^num_steps: found 0, expected 1 or more$"):
        EulerAncestral(num_steps=0)
