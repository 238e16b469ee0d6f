"""Rounds of scored samples that the surrogate learns from again; not in LaSRO's paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from alignkit import Example
from alignkit.groups import Scored, extremes

PairChoice = Literal["extremes", "random"]


class Memory:
    """The last `size` rounds, on the CPU.

    Their groups begin with `own` samples of the policy; those up to `samples` are of the model before training.
    """

    def __init__(self, size: int, own: int, samples: int) -> None:
        self.rounds: list[tuple[Scored, list[Example]]] = []
        self.changes: list[tuple[Scored, list[Example]]] = []
        """Pairs of the same rounds: a sample of the policy and one of the model before training, from one noise."""
        self._size, self._own, self._samples = size, own, samples

    def add(self, scored: Scored, examples: list[Example]) -> None:
        """Add a round with the examples of its batch, and drop the oldest."""
        scored = scored.to("cpu")
        self.rounds = [*self.rounds, (scored, examples)][-self._size :]
        if self._own < self._samples:
            self.changes = [*self.changes, (counterparts(scored, self._own, self._samples), examples)][-self._size :]

    def sample(
        self, choice: PairChoice, size: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, list[Example]]:
        """Return about `size` pairs, the newest round always among them: winners (N, *S), losers, how much more reward
        the winners got (N,), and the examples.

        Half of them compare the policy with the model before training, if there are such pairs: few of those differ in
        reward, so they would be rare among all others.
        """
        parts = [self.rounds, self.changes] if self.changes else [self.rounds]
        found = [mixed(rounds, choice, size // len(parts), generator) for rounds in parts]
        winner, loser, gap = (torch.cat(column) for column in zip(*(part[:3] for part in found), strict=True))
        return winner, loser, gap, [example for part in found for example in part[3]]

    def state_dict(self) -> list[dict[str, Any]]:
        return [{"examples": [vars(e) for e in examples], **vars(scored)} for scored, examples in self.rounds]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        self.rounds, self.changes = [], []
        for entry in state:
            columns = {name: value for name, value in entry.items() if name != "examples"}
            self.add(Scored(**columns), [Example(**saved) for saved in entry["examples"]])


def random_pairs(rewards: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Choose any two samples of each group, the better one first; otherwise as `extremes`."""
    order = torch.rand(rewards.shape, generator=generator).argsort(1)
    first, second = order[:, 0], order[:, 1]
    rows = torch.arange(len(rewards))
    left, right = rewards[rows, first], rewards[rows, second]
    # NaN compares as False both ways, so a sample that could not be scored is in no pair.
    better, worse = torch.where(left >= right, first, second), torch.where(left >= right, second, first)
    return better, worse, (left > right) | (left < right)


def counterparts(scored: Scored, own: int, samples: int) -> Scored:
    """Return groups of two from the same noise: a sample of the policy, and one of the model before training.

    `scored` holds `own` samples of the policy, then those of the model before training up to `samples`, each from the
    noise of the own sample at its place.
    """
    place = torch.arange(own, samples)
    members = torch.stack([(place - own) % own, place], dim=1)
    return Scored(
        latents=scored.latents[:, members].flatten(0, 1),
        rewards=scored.rewards[:, members].flatten(0, 1),
        text=scored.text.repeat_interleave(len(place)),
        step=scored.step.repeat_interleave(len(place)),
    )


def mixed(
    rounds: Sequence[tuple[Scored, Sequence[Example]]], choice: PairChoice, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, list[Example]]:
    """Choose up to `size` pairs of the newest of `rounds`, which come with their examples, and of older ones at random.

    Where there are older ones half of the room is for the newest, and of each older one a part is chosen. Returns
    winners (N, *S), losers, gaps (N,) and examples; N is 0 where no group carries a label.
    """
    winners: list[Tensor] = []
    losers: list[Tensor] = []
    gaps: list[Tensor] = []
    examples: list[Example] = []
    fresh, kept = rounds[-1:], rounds[:-1]
    order = torch.randperm(len(kept), generator=generator).tolist()
    for scored, batch in [*fresh, *(kept[i] for i in order)]:
        if choice == "extremes":
            best, worst, labelled = extremes(scored.rewards)
        else:
            best, worst, labelled = random_pairs(scored.rewards, generator)
        rows = labelled.nonzero()[:, 0]
        room = size if not kept else size // 2 if not winners else size // 4
        if kept or len(rows) > room:
            rows = rows[torch.randperm(len(rows), generator=generator)[:room]]
        winners.append(scored.latents[rows, best[rows]])
        losers.append(scored.latents[rows, worst[rows]])
        gaps.append(scored.rewards[rows, best[rows]] - scored.rewards[rows, worst[rows]])
        examples += [batch[i] for i in scored.text[rows].tolist()]
        if len(examples) >= size:
            break
    return torch.cat(winners), torch.cat(losers), torch.cat(gaps), examples
