"""DDIM: its schedule and its posterior."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.models.diffusers_policy import DiffusersPolicy
from alignkit_samplers.ddim import DDIM
from alignkit_samplers.schedule import Spacing


@pytest.fixture(scope="module")
def policy(tiny_teacher: Path) -> DiffusersPolicy:
    return DiffusersPolicy(str(tiny_teacher), trainable=False)


@pytest.mark.parametrize(
    ("num_steps", "golden"),
    [(1, [999]), (2, [999, 499]), (3, [999, 666, 332]), (4, [999, 749, 499, 249]), (50, list(range(999, 0, -20)))],
)
def test_the_steps_are_golden(policy: DiffusersPolicy, num_steps: int, golden: list[int]) -> None:
    assert DDIM(num_steps).grid(policy).tolist() == golden


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 7])
def test_eta_one_is_the_posterior_of_the_diffusion_and_goes_to_the_next_entry_of_the_schedule(
    policy: DiffusersPolicy, num_steps: int
) -> None:
    sampler = DDIM(num_steps, eta=1.0)
    x = torch.randn(num_steps, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        step = sampler.transition(policy, x, torch.arange(num_steps), policy.encode(["a red circle"] * num_steps))
    t = sampler.grid(policy)
    t_next = torch.cat([t[1:], torch.zeros(1, dtype=torch.long)])
    level, level_next = policy._alphas.double()[t], policy._alphas.double()[t_next]
    ratio = level / level_next
    # q(x_next | x, clean) of Ho et al. 2020, Eq. 7, between any two levels.
    to_clean = (level_next.sqrt() * (1 - ratio) / (1 - level)).view(-1, 1, 1, 1)
    to_x = (ratio.sqrt() * (1 - level_next) / (1 - level)).view(-1, 1, 1, 1)
    variance = (1 - level_next) / (1 - level) * (1 - ratio)
    expected = to_clean * step.clean.double() + to_x * x.double()
    assert torch.allclose(step.mean.double(), expected, rtol=1e-3, atol=1e-3)
    assert torch.allclose(step.std.double(), variance.sqrt(), rtol=1e-3)
    assert float(step.std[-1]) == pytest.approx(0.029, abs=0.001)


def test_eta_zero_is_deterministic_at_every_step(policy: DiffusersPolicy) -> None:
    x = torch.ones(4, *policy.latent_shape)
    with torch.no_grad():
        step = DDIM(4, eta=0.0).transition(policy, x, torch.arange(4), policy.encode(["a red circle"] * 4))
    assert step.std.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("fields", [{"num_steps": 0}, {"eta": -0.1}, {"eta": 1.1}, {"spacing": ""}])
def test_numbers_that_make_no_schedule_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        DDIM(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_steps", [1000, 1001])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_more_steps_than_the_model_has_times_are_refused(
    policy: DiffusersPolicy, num_steps: int, spacing: Spacing
) -> None:
    with pytest.raises(ConfigError, match=rf"sampler.num_steps: found {num_steps}, expected 1 to 999;"):
        DDIM(num_steps, spacing=spacing).grid(policy)


def test_a_number_of_steps_below_1_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^num_steps: found 0, expected 1 or more$"):
        DDIM(num_steps=0)
