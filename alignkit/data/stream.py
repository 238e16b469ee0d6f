"""Endless shuffled passes over a data set, with a single number as the position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alignkit.records import Example


class Stream:
    """Endless shuffled passes over a number of items. Item `i` of the stream depends on the seed and `i` alone."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def indices(self, start: int, size: int) -> list[int]:
        """Return the items at positions start .. start + size."""
        order: dict[int, np.ndarray] = {}
        found = []
        for position in range(start, start + size):
            epoch, place = divmod(position, self.count)
            if epoch not in order:
                order[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            found.append(int(order[epoch][place]))
        return found


def slice_of(position: int, size: int, rank: int, processes: int) -> tuple[int, int]:
    """Return (start, size) of the items that process `rank` reads if each of `processes` takes `size` items a batch."""
    return (position * processes + rank) * size, size


def examples_at(examples: Sequence[Example], stream: Stream, start: int, size: int) -> list[Example]:
    """Return the examples at positions start .. start + size of a stream over them."""
    return [examples[i] for i in stream.indices(start, size)]
