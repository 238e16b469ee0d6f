"""The rounds of scored samples that the surrogate learns from again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from alignkit_lasro.pairs import Scored, counterparts, mixed


class Memory:
    """The last `size` rounds, on the CPU.

    Their groups begin with `own` samples of the policy; those up to `samples` are of the model before training.
    """

    def __init__(self, size: int, own: int, samples: int) -> None:
        self.rounds: list[tuple[Scored, list[str]]] = []
        self.changes: list[tuple[Scored, list[str]]] = []
        """Of the same rounds, samples of the policy with those of the model before training from the same noises."""
        self._size, self._own, self._samples = size, own, samples

    def add(self, scored: Scored, texts: list[str]) -> None:
        """Keep a round with its texts, and let go of the oldest."""
        scored = scored.to("cpu")
        self.rounds = [*self.rounds, (scored, texts)][-self._size :]
        if self._own < self._samples:
            self.changes = [*self.changes, (counterparts(scored, self._own, self._samples), texts)][-self._size :]

    def draw(
        self, choice: Literal["extremes", "random"], size: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, list[str]]:
        """Winners (N, *S), losers and their texts of about `size` pairs, the newest round always among them.

        Half of them are of policy and model before training, where there are such: few of those differ in reward, so
        that among all others they would hardly be seen.
        """
        parts = [self.rounds, self.changes] if self.changes else [self.rounds]
        found = [mixed(rounds, choice, size // len(parts), generator) for rounds in parts]
        winner, loser = (torch.cat(column) for column in zip(*(part[:2] for part in found), strict=True))
        return winner, loser, [text for part in found for text in part[2]]

    def state_dict(self) -> list[dict[str, Any]]:
        return [{"texts": texts, **vars(scored)} for scored, texts in self.rounds]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        self.rounds, self.changes = [], []
        for entry in state:
            self.add(Scored(**{name: value for name, value in entry.items() if name != "texts"}), entry["texts"])
