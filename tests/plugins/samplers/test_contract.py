"""Promises of every sampler: trajectories replay, and a row does not depend on the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from alignkit.interfaces import Sampler
from alignkit.models.diffusers_policy import DiffusersPolicy
from alignkit.rollout import run_sampler
from alignkit_samplers.ddim import DDIM
from alignkit_samplers.euler_ancestral import EulerAncestral
from alignkit_samplers.lcm import LCM
from alignkit_samplers.renoise import Renoise

SAMPLERS = [DDIM, LCM, EulerAncestral, Renoise]


@pytest.fixture(scope="module")
def policy(tiny_teacher: Path) -> DiffusersPolicy:
    return DiffusersPolicy(str(tiny_teacher), trainable=False)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_replayed_trajectory_has_the_same_log_probability(
    policy: DiffusersPolicy, kind: type[Sampler], num_steps: int
) -> None:
    sampler = kind(num_steps)
    prompt = policy.encode(["a red circle", "a blue square"])
    generator = torch.Generator().manual_seed(0)
    noises = torch.randn(2, num_steps + 1, *policy.latent_shape, generator=generator)
    with torch.no_grad():
        found = run_sampler(policy, sampler, prompt, noises)
    for k in range(num_steps):
        at = torch.full((2,), k)
        with torch.no_grad():
            sampled = sampler.transition(policy, found.states[:, k], at, prompt)
        with torch.set_grad_enabled(True):
            step = sampler.transition(policy, found.states[:, k], at, prompt)
        assert torch.equal(step.std, found.std[:, k])
        assert torch.allclose(step.sample(noises[:, k + 1]), found.next_states[:, k], rtol=1e-6, atol=1e-6)
        assert bool(step.mean.isfinite().all()) and bool(step.std.isfinite().all())
        if bool((step.std > 0).all()):
            stored, replayed = (s.log_prob(found.next_states[:, k]) for s in (sampled, step))
            assert float((replayed - stored).abs().max()) < 1e-6
            expected = -((noises[:, k + 1] ** 2).flatten(1).mean(1)) / 2 - step.std.log() - 0.5 * np.log(2 * np.pi)
            assert torch.allclose(replayed, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_rows_at_different_steps_are_what_they_are_alone(policy: DiffusersPolicy, kind: type[Sampler]) -> None:
    sampler, prompt = kind(4), policy.encode(["a red circle", "a blue square", "a black heart"])
    x = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    k = torch.tensor([3, 0, 2])
    with torch.no_grad():
        together = sampler.transition(policy, x, k, prompt)
        for i in range(3):
            row = torch.tensor([i])
            alone = sampler.transition(policy, x[row], k[row], prompt.select(row))
            assert torch.allclose(together.mean[row], alone.mean, rtol=1e-4, atol=1e-3)
            assert torch.equal(together.std[row], alone.std)
