"""Trajectories: their columns, their noise, and the examples that they carry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignkit.errors import PluginError
from alignkit.interfaces import Sampler
from alignkit.models.diffusers_policy import DiffusersPolicy
from alignkit.records import Example, Prompt, Rows
from alignkit.rollout import (
    Trajectories,
    choose_steps,
    encode_examples,
    run_sampler,
    sample,
    sample_trajectories,
    seeded_noises,
)
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
def test_a_sampler_states_beforehand_how_many_of_its_steps_are_stochastic(tiny_lcm: Path, sampler: Sampler) -> None:
    policy = DiffusersPolicy(str(tiny_lcm), trainable=False)
    noises = seeded_noises(SHAPE, sampler.num_steps, [(0, 0)])
    with torch.no_grad():
        found = run_sampler(policy, sampler, policy.encode(["a red circle"]), noises)
    assert int((found.std > 0).sum()) == sampler.stochastic_steps()


def test_a_trajectory_with_too_little_noise_is_refused(tiny_lcm: Path) -> None:
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


# examples that travel with rows

SIGNS = [Example("a sign", {"target": word}) for word in ("OPEN", "EXIT")]
CAT = Example("a cat", {"boxes": [[1, 2], [3, 4]]})


@pytest.fixture
def policy(tiny_lcm: Path) -> DiffusersPolicy:
    return DiffusersPolicy(str(tiny_lcm), trainable=False)


@dataclass(frozen=True)
class Numbered(Rows):
    """Rows that know their examples by number."""

    number: torch.Tensor
    prompt: Prompt


def test_examples_with_one_text_have_a_place_each_and_equal_ones_share_theirs(policy: DiffusersPolicy) -> None:
    examples = [SIGNS[0], CAT, SIGNS[1], Example("a sign", {"target": "OPEN"}), CAT]
    prompt = encode_examples(policy, examples)
    assert prompt.index.tolist() == [0, 1, 2, 0, 1] and len(prompt.table) == len(prompt.example_table) == 3
    assert prompt.examples == examples and prompt.texts == [e.text for e in examples]
    assert prompt.text_table == ("a sign", "a cat", "a sign")
    assert torch.equal(prompt.features, policy.encode(prompt.texts).features)
    first, cat, second, *_ = prompt.features
    assert torch.equal(first, second) and not torch.equal(first, cat)


def test_texts_are_encoded_as_examples_without_metadata(policy: DiffusersPolicy) -> None:
    prompt = encode_examples(policy, ["a sign", SIGNS[0], "a sign"])
    assert prompt.index.tolist() == [0, 1, 0] and prompt.examples == [Example("a sign"), SIGNS[0], Example("a sign")]
    plain = policy.encode(["a sign", "a cat"])
    assert plain.examples == [Example("a sign"), Example("a cat")]  # where only texts are known


def test_metadata_stays_with_its_row_through_selection_shuffles_and_splits(policy: DiffusersPolicy) -> None:
    examples = [SIGNS[0], SIGNS[1], CAT] * 4
    rows = Numbered(torch.arange(12), encode_examples(policy, examples))
    parts = [
        rows.select(torch.tensor([1, 1, 0, 11])), rows.shuffled(torch.Generator().manual_seed(0)), rows.to("cpu"),
        *rows.split(5), *rows.shuffled(torch.Generator().manual_seed(1)).even_split(5),
    ]  # fmt: skip
    for part in parts:
        assert part.prompt.examples == [examples[i] for i in part.number.tolist()]


# trajectories of a round


def context(policy: DiffusersPolicy, sampler: Sampler, seed: int = 0) -> Any:
    """Return a context with all that a rollout uses of one."""
    generator = torch.Generator().manual_seed(seed)
    noise = lambda count: torch.randn((count, *SHAPE), generator=generator)  # noqa: E731
    return SimpleNamespace(policy=policy, sampler=sampler, generator=generator, noise=noise)


def columns(found: Trajectories) -> list[torch.Tensor]:
    return [found.states, found.next_states, found.clean, found.std]


@torch.no_grad()
def test_trajectories_are_those_of_the_sampler_from_noise_of_the_generator_in_a_fixed_order(
    policy: DiffusersPolicy,
) -> None:
    ctx = context(policy, DDIM(3))
    before = torch.get_rng_state()
    found = sample_trajectories([SIGNS[0], SIGNS[1]], ctx, per_prompt=4, sharing=2)
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is not used
    by_hand = context(policy, DDIM(3))
    first = by_hand.noise(4).repeat_interleave(2, dim=0)  # one for two trajectories
    noises = torch.stack([first, *(by_hand.noise(8) for _ in range(3))], dim=1)
    assert torch.equal(ctx.generator.get_state(), by_hand.generator.get_state())
    expected = run_sampler(policy, DDIM(3), policy.encode(["a sign"] * 8), noises)
    assert all(torch.equal(a, b) for a, b in zip(columns(found), columns(expected), strict=True))
    assert torch.equal(found.samples, found.next_states[:, -1])


@torch.no_grad()
def test_the_trajectories_of_an_example_are_consecutive_and_carry_it(policy: DiffusersPolicy) -> None:
    found = sample_trajectories([SIGNS[0], CAT, SIGNS[1]], context(policy, LCM(2)), per_prompt=2)
    assert len(found) == 6 and found.prompt.examples == [SIGNS[0]] * 2 + [CAT] * 2 + [SIGNS[1]] * 2
    assert len(sample_trajectories(["a cat", CAT], context(policy, LCM(2)))) == 2


@pytest.mark.parametrize(("sharing", "distinct"), [(1, 8), (2, 4), (4, 2)])
@torch.no_grad()
def test_as_many_trajectories_as_share_it_start_from_one_noise_and_then_part(
    policy: DiffusersPolicy, sharing: int, distinct: int
) -> None:
    found = sample_trajectories(["a cat", "a sign"], context(policy, LCM(3)), per_prompt=4, sharing=sharing)
    for start in range(0, 8, sharing):
        assert bool((found.states[start : start + sharing, 0] == found.states[start, 0]).all())
    assert len(found.states[:, 0].unique(dim=0)) == distinct
    assert len(found.next_states[:, 0].unique(dim=0)) == 8


@torch.no_grad()
def test_the_stochastic_steps_are_those_with_a_spread_and_a_sampler_without_any_is_refused(
    policy: DiffusersPolicy,
) -> None:
    sampler = LCM(3)
    found = sample_trajectories(["a cat"], context(policy, sampler))
    assert found.stochastic_steps(sampler).tolist() == [0, 1]
    still = sample_trajectories(["a cat"], context(policy, DDIM(3, eta=0.0)))
    with pytest.raises(PluginError, match="sampler LCM: every step had std 0, expected 2 above 0"):
        still.stochastic_steps(sampler)


@pytest.mark.parametrize(("fraction", "kept"), [(1.0, 5), (0.6, 3), (0.59, 2), (0.01, 1)])
def test_a_share_of_the_steps_is_chosen_for_each_trajectory_each_step_once(fraction: float, kept: int) -> None:
    steps = torch.tensor([0, 2, 3, 5, 7])
    found = choose_steps(steps, 400, fraction, torch.Generator().manual_seed(0))
    assert found.shape == (400, kept)
    assert all(len(set(row)) == kept and set(row) <= set(steps.tolist()) for row in found.tolist())
    counts = torch.bincount(found.flatten(), minlength=8)[steps]
    assert bool((counts - 400 * kept / 5).abs().max() < 60)
    again, other = (choose_steps(steps, 400, fraction, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.equal(found, again) and not torch.equal(found, other)
