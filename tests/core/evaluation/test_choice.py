"""The point of a run whose weights are exported, and the line in which a point is shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from alignkit.evaluation.choice import choose
from alignkit.evaluation.rows import Row
from alignkit.evaluation.table import one_line

STEPS = (1, 2)


def point(rise: float, held_out: float = 0.0, count: int = 64) -> list[Row]:
    """A point at which the trained reward changed by `rise` and the held-out reward by `held_out`, +- 0.02."""
    rows = []
    for steps in STEPS:
        for name, change in (("reward", rise), ("exact", held_out)):
            row = Row(name, steps, count, 0.5, 0.5 + change, change, change - 0.02, change + 0.02)
            rows.append(replace(row, held_out=name == "exact"))
    return rows


def at(steps: int, reward: str, rows: list[Row], **changes: float) -> list[Row]:
    return [replace(row, **changes) if (row.num_steps, row.reward) == (steps, reward) else row for row in rows]


FELL_AT_TWO = at(2, "exact", point(0.3), difference=-0.05, low=-0.09, high=-0.01)


@pytest.mark.parametrize(
    ("points", "chosen"),
    [
        ({1: point(0.1), 2: point(0.2), 3: point(0.3)}, 3),
        ({1: point(0.1), 2: point(0.2), 3: point(0.3, -0.03)}, 2),
        ({1: point(0.1), 2: point(0.2), 3: FELL_AT_TWO}, 2),
        ({1: point(0.1), 2: point(0.2, -0.01), 3: point(0.15)}, 2),
        ({1: point(0.2), 2: point(0.2), 3: point(0.2)}, 1),
        ({1: point(0.2, -0.03), 2: point(0.2), 3: point(0.2)}, 2),
        ({1: point(0.01), 2: point(-0.1)}, 1),
        ({1: at(1, "reward", point(0.1), difference=0.4), 2: point(0.2)}, 1),
        ({1: point(0.1), 2: [*point(0.2), replace(point(0, -0.1)[1], reward="exact/part")]}, 2),
        ({1: point(0.1), 2: [*point(0.2), replace(point(0, -0.1)[1], reward="other")]}, 1),
        ({1: point(0.1), 2: [*point(0.2), replace(point(0, -0.1)[1], held_out=False)]}, 2),
        ({1: point(0.1), 2: point(0.2, count=4)}, 1),
        ({1: point(0.1, -0.1), 2: point(0.2, -0.1)}, None),
        ({1: point(-0.1), 2: point(0.0)}, None),
        ({1: point(0.1, count=4)}, None),
        ({1: [row for row in point(0.1) if row.held_out]}, None),
        ({}, None),
    ],
)
def test_the_highest_trained_reward_without_a_fall_is_chosen(
    points: Mapping[int, list[Row]], chosen: int | None
) -> None:
    assert choose(points).update == chosen


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        ({1: point(0.1), 2: point(0.2)}, "trained reward +0.200, no held-out reward fell"),
        (
            {1: point(0.1), 2: point(0.2), 3: FELL_AT_TWO},
            "trained reward +0.200, no held-out reward fell; update 3: trained reward +0.300, but exact -0.050 "
            "[-0.090, -0.010] at 2 steps",
        ),
        (
            {1: point(0.1), 2: point(0.05)},
            "trained reward +0.100, no held-out reward fell; update 2: trained reward +0.050",
        ),
        (
            {1: point(0.1, -0.1), 2: point(0.05, -0.05)},
            "no point is without a fall of a held-out reward: update 1: trained reward +0.100, but exact -0.100 "
            "[-0.120, -0.080] at 1 step",
        ),
        ({1: point(-0.1), 2: point(0.0)}, "the trained reward rose at no point"),
        ({1: point(0.1, count=4)}, "no point has a trained reward on at least 5 prompts"),
    ],
)
def test_the_choice_states_its_reason(points: Mapping[int, list[Row]], reason: str) -> None:
    assert choose(points).reason == reason


def test_a_point_is_one_line_with_values_and_changes_by_number_of_steps() -> None:
    rows = [*point(0.1, -0.03), replace(point(0.1)[0], reward="binding"), replace(point(0)[1], reward="exact/part")]
    assert one_line(rows) == "reward 0.600 (+0.100), 0.600 (+0.100); exact 0.470 (-0.030), 0.470 (-0.030) at 1, 2 steps"
    before = [replace(row, after=None, difference=None) for row in rows if row.num_steps == 1]
    assert one_line(before) == "reward 0.500; exact 0.500 at 1 step"
    assert (
        one_line(rows[1:4]) == "exact 0.470 (-0.030), 0.470 (-0.030); reward not scored, 0.600 (+0.100) at 1, 2 steps"
    )
