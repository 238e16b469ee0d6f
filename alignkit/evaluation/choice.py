"""Choose among the points of a run: the highest trained reward at which no held-out reward fell; the smallest FID."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alignkit.evaluation.hacking import ENOUGH, fallen
from alignkit.evaluation.realism import FID
from alignkit.evaluation.rows import TOTAL, Row


@dataclass(frozen=True)
class Choice:
    """The point whose weights are exported."""

    update: int | None
    """Its update; None: no point qualifies."""
    reason: str
    """The comparison with other points, or why none qualifies, in one line."""


def choose(points: Mapping[int, Sequence[Row]]) -> Choice:
    """Choose among points, rows by update in increasing order; of two equally good ones the earlier.

    A point qualifies if the trained reward, as the mean over numbers of steps, is higher than before training, and no
    held-out reward is lower beyond its paired 95 % interval at any number of steps. The one with the largest rise of
    the trained reward is chosen. Rows of fewer than `ENOUGH` prompts do not count.
    """
    rises = {update: rise for update, rows in points.items() if (rise := _rise(rows)) is not None}
    if not rises:
        return Choice(None, f"no point has a trained reward on at least {ENOUGH} prompts")
    falls = {update: fallen(points[update]) for update in rises}
    best = max((u for u in rises if rises[u] > 0 and not falls[u]), key=rises.__getitem__, default=None)
    highest = max(rises, key=rises.__getitem__)
    if best is None:
        if rises[highest] <= 0:
            return Choice(None, "the trained reward rose at no point")
        return Choice(None, f"no point is without a fall of a held-out reward: {_hacked(highest, rises, falls)}")
    reason = f"trained reward {rises[best]:+.3f}, no held-out reward fell"
    if rises[highest] > rises[best]:
        reason += f"; {_hacked(highest, rises, falls)}"
    elif (last := max(points)) != best and last in rises:
        reason += f"; update {last}: trained reward {rises[last]:+.3f}"
    return Choice(best, reason)


def _rise(rows: Sequence[Row]) -> float | None:
    """Return the change of the trained reward, the mean over numbers of steps; None if there is none to rely on."""
    found = [r.difference for r in rows if r.reward == TOTAL and r.difference is not None and r.count >= ENOUGH]
    return sum(found) / len(found) if found else None


def _hacked(update: int, rises: Mapping[int, float], falls: Mapping[int, Sequence[Row]]) -> str:
    """State the rise and the largest fall at a point that has a fall."""
    row = min(falls[update], key=lambda r: r.difference or 0.0)
    return (
        f"update {update}: trained reward {rises[update]:+.3f}, but {row.reward} {row.difference:+.3f} "
        f"[{row.low:+.3f}, {row.high:+.3f}] at {row.num_steps} step{'s' * (row.num_steps > 1)}"
    )


def elbow(rows: Sequence[Row]) -> str:
    """Return in one line the point of a run with the smallest FID and its reward; empty without such rows.

    The elbow rule (LaSRO, 2411.15247, appendix E): beyond that point the reward rises at the expense of realism. FID
    is the mean over numbers of steps.
    """

    def mean(update: int, name: str) -> float:
        found = [row.after for row in rows if (row.update, row.reward) == (update, name) and row.after is not None]
        return sum(found) / len(found)

    updates = sorted({row.update for row in rows if row.update is not None and row.reward == FID})
    if not updates:
        return ""
    best = min(updates, key=lambda update: mean(update, FID))
    return (
        f"the smallest {FID} of the points is {mean(best, FID):.3f}, at update {best}, reward {mean(best, TOTAL):.3f}"
    )
