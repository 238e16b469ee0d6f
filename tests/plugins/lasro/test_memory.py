"""The memory of rounds: random pairs, mixtures of new and older rounds, counterparts, and what a checkpoint keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alignkit import Example
from alignkit.groups import Scored
from alignkit.training.checkpoint import load, save
from alignkit_lasro.memory import Memory, counterparts, mixed, random_pairs

NAN = float("nan")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scored(groups: int, samples: int = 2, seed: int = 0) -> Scored:
    """Return groups of one number a latent, of which the reward is the latent itself."""
    latents = torch.randn(groups, samples, 1, generator=generator(seed))
    return Scored(latents, latents[:, :, 0], torch.arange(groups), torch.zeros(groups, dtype=torch.long))


def test_random_pairs_have_the_better_sample_first_and_none_without_a_score() -> None:
    rewards = torch.rand(200, 5, generator=generator(1))
    rewards[torch.rand(200, 5, generator=generator(2)) < 0.3] = NAN
    rows, kept = torch.arange(200), 0
    for seed in range(20):
        better, worse, labelled = random_pairs(rewards, generator(seed))
        first, second = rewards[rows, better][labelled], rewards[rows, worse][labelled]
        assert bool((first > second).all())
        kept += int(labelled.sum())
    assert 0.35 * 4000 < kept < 0.65 * 4000  # .7 squared is .49


def test_a_tied_group_gives_no_random_pair() -> None:
    _, _, labelled = random_pairs(torch.tensor([[0.5, 0.5, 0.5], [0.0, 0.0, 0.0]]), generator())
    assert labelled.tolist() == [False, False]


def test_every_two_samples_of_a_group_are_paired_about_equally_often() -> None:
    rewards = torch.arange(4.0).repeat(12000, 1)
    better, worse, labelled = random_pairs(rewards, generator())
    assert bool(labelled.all())
    counts = torch.bincount(better * 4 + worse, minlength=16)
    assert (counts > 0).sum() == 6
    assert bool((counts[counts > 0] - 2000).abs().max() < 200)


@pytest.mark.parametrize(("rounds", "found"), [(1, 64), (2, 48), (9, 64)])
def test_no_more_pairs_are_mixed_than_there_is_room_for(rounds: int, found: int) -> None:
    groups = 500
    examples = [Example(str(i)) for i in range(groups)]
    winners, losers, gaps, own = mixed([(scored(groups), examples)] * rounds, "extremes", 64, generator())
    assert len(winners) == len(losers) == len(gaps) == len(own) == found


def test_counterparts_pair_each_reference_sample_with_the_own_sample_of_its_noise() -> None:
    given = scored(3, samples=5)  # two own samples; the third, fourth and fifth have the noises 0, 1, 0
    found = counterparts(given, own=2, samples=5)
    latents = given.latents[0, :, 0].tolist()
    assert found.latents[:3, :, 0].tolist() == [[latents[a], latents[b]] for a, b in ((0, 2), (1, 3), (0, 4))]
    assert torch.equal(found.rewards, found.latents[:, :, 0]) and found.text.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def signs() -> list[Example]:
    """Return four examples of one text; a reward compares them with their targets."""
    return [Example("a sign", {"target": target}, "prompts.jsonl") for target in ("OPEN", "EXIT", "STOP", "TAXI")]


def test_half_of_a_sample_is_of_counterparts_and_every_pair_has_its_own_example() -> None:
    memory, examples = Memory(2, own=1, samples=2), signs()
    for seed in range(3):
        memory.add(scored(4, seed=seed), examples)
    assert len(memory.rounds) == len(memory.changes) == 2
    winner, loser, gap, own = memory.sample("extremes", 8, generator())
    assert len(winner) == len(own) > 4 and bool((winner > loser).all())
    assert torch.equal(gap, (winner - loser).flatten())  # here a reward is the sample itself
    for value, example in zip(winner.flatten().tolist(), own, strict=True):
        places = [row for kept, _ in memory.rounds for row in range(4) if value in kept.latents[row].flatten().tolist()]
        assert [examples[row] for row in places] == [example]


def test_a_memory_comes_back_from_a_checkpoint_with_its_counterparts(tmp_path: Path) -> None:
    memory, other = Memory(2, own=1, samples=2), Memory(2, own=1, samples=2)
    for seed in range(2):
        memory.add(scored(4, seed=seed), signs())
    other.load_state_dict(load(save(tmp_path, 1, {"memory": memory.state_dict()}))["memory"])
    for (*found, examples), (*same, same_examples) in [
        (memory.sample("random", 8, generator(seed)), other.sample("random", 8, generator(seed))) for seed in range(3)
    ]:
        assert all(map(torch.equal, found, same))
        assert examples == same_examples and same_examples[0].place == "prompts.jsonl"
