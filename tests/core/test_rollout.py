"""Trajectories: what they record, and noise that depends on nothing but its own seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alignkit.interfaces import Sampler
from alignkit.models.diffusers_policy import DiffusersPolicy
from alignkit.rollout import run_sampler, sample, seeded_noises
from alignkit_samplers.ddim import DDIM
from alignkit_samplers.lcm import LCM

SHAPE = (4, 8, 8)


def test_every_state_is_the_next_state_of_the_step_before(tiny_lcm: Path) -> None:
    policy = DiffusersPolicy(str(tiny_lcm), trainable=False)
    prompt, noises = policy.encode(["a red circle", "a blue square"]), seeded_noises(SHAPE, 4, [(0, 0), (0, 1)])
    with torch.no_grad():
        found = run_sampler(policy, LCM(4), prompt, noises)
    assert found.states.shape == found.next_states.shape == found.clean.shape == (2, 4, *SHAPE)
    assert torch.equal(found.states[:, 0], noises[:, 0])
    assert torch.equal(found.states[:, 1:], found.next_states[:, :-1])
    assert torch.equal(found.next_states[:, -1], found.clean[:, -1])
    assert (found.std > 0).tolist() == [[True, True, True, False]] * 2
    assert torch.equal(sample(policy, LCM(4), prompt, noises), found.next_states[:, -1])


@pytest.mark.parametrize("sampler", [LCM(1), LCM(4), DDIM(3), DDIM(3, eta=0.0), DDIM(2, eta=0.5)])
def test_a_sampler_states_the_number_of_its_stochastic_steps_beforehand(tiny_lcm: Path, sampler: Sampler) -> None:
    policy = DiffusersPolicy(str(tiny_lcm), trainable=False)
    noises = seeded_noises(SHAPE, sampler.num_steps, [(0, 0)])
    with torch.no_grad():
        found = run_sampler(policy, sampler, policy.encode(["a red circle"]), noises)
    assert int((found.std > 0).sum()) == sampler.stochastic_steps()


def test_too_little_noise_is_refused(tiny_lcm: Path) -> None:
    policy = DiffusersPolicy(str(tiny_lcm), trainable=False)
    with pytest.raises(ValueError, match="4 steps need 5 noises, found 3"):
        run_sampler(policy, LCM(4), policy.encode(["a red circle"]), seeded_noises(SHAPE, 2, [(0, 0)]))


def test_noise_depends_on_its_own_seed_and_index_alone() -> None:
    together = seeded_noises(SHAPE, 2, [(0, 0), (0, 1), (1, 0)])
    assert together.shape == (3, 3, *SHAPE)
    assert torch.equal(together[1:2], seeded_noises(SHAPE, 2, [(0, 1)]))
    assert len({tuple(row.flatten().tolist()) for row in together}) == 3


def test_trajectories_of_fewer_steps_start_from_the_same_noise() -> None:
    assert torch.equal(seeded_noises(SHAPE, 8, [(3, 4)])[:, :3], seeded_noises(SHAPE, 2, [(3, 4)]))


def test_seeded_noise_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    seeded_noises(SHAPE, 1, [(-5, 2)])
    assert torch.equal(torch.get_rng_state(), before)
