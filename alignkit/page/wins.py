"""Win rates of the runs on a page: against the model before training, and against each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

from alignkit.evaluation.rows import TOTAL
from alignkit.evaluation.wins import WinRate, win_rate
from alignkit.page.record import Image, Record

Images = Mapping[tuple[int, int], Image]


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
            known = [[(a, b)] for a, b in pairs if a is not None and b is not None]
            if found := win_rate(first, second, reward, steps, known):
                yield found
