"""Win rates: how often the image of one run scores higher than that of another, on the same prompt and noise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from alignkit.evaluation.rows import TOTAL
from alignkit.page.record import Image, Record

Images = Mapping[tuple[int, int], Image]


@dataclass(frozen=True)
class WinRate:
    """The share of prompts on which `first` scores higher than `second`; a tie counts half."""

    first: str
    second: str
    reward: str
    num_steps: int
    count: int
    """Number of prompts."""
    rate: float
    low: float
    """Lower end of the 95 % interval (Wilson 1927), which has a width at 0 and 1 too; `high` is the upper end."""
    high: float


def win_rates(records: Sequence[Record]) -> list[WinRate]:
    """Compare each run with its model before training, and every two runs, at their exported or last points.

    Prompts that both have with the same text count, and rewards that scored both, without their parts. The weighted
    sum counts where both runs train the same rewards and it is more than one of them.
    """
    found: list[WinRate] = []
    ended = [record for record in records if record.end]
    for one in ended:
        if 0 in one.points:
            name = f"{one.name} before training" if len(records) > 1 else "before training"
            found += _rates(one.name, one.points[one.end].images, name, one.points[0].images, True)
    for one, other in combinations(ended, 2):
        alike = one.settings.get("reward") == other.settings.get("reward")
        found += _rates(one.name, one.points[one.end].images, other.name, other.points[other.end].images, alike)
    return found


def _rates(first: str, these: Images, second: str, those: Images, summed: bool) -> Iterator[WinRate]:
    keys = sorted(key for key in these.keys() & those.keys() if these[key].prompt == those[key].prompt)
    columns: dict[str, list[tuple[float | None, float | None]]] = {}
    for reward in dict.fromkeys(name for key in keys for name in these[key].scores if "/" not in name):
        columns[reward] = [(these[key].scores.get(reward), those[key].scores.get(reward)) for key in keys]
    total = columns.pop(TOTAL, None)
    if total is not None and summed and total not in columns.values():
        columns = {TOTAL: total, **columns}
    for reward, column in columns.items():
        for steps in sorted({number for _, number in keys}):
            pairs = [pair for pair, (_, number) in zip(column, keys, strict=True) if number == steps]
            wins = [((a > b) + (a >= b)) / 2 for a, b in pairs if a is not None and b is not None]
            if wins:
                yield WinRate(first, second, reward, steps, len(wins), *_wilson(sum(wins) / len(wins), len(wins)))


def _wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float, float]:
    """Return a share of `count` and its score interval."""
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    reach = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return share, max(0.0, middle - reach), min(1.0, middle + reach)
