"""One line of an evaluation: a reward at a number of steps, before and after."""

from __future__ import annotations

from dataclasses import dataclass

TOTAL = "reward"
"""The name of the weighted sum among the names of its parts."""


@dataclass(frozen=True)
class Row:
    """One line of the table: means over the prompts scored both times, and the 95 % interval of their difference.

    Rows of one table all have what came after, or none has.
    """

    reward: str
    num_steps: int
    count: int
    before: float
    after: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    before_low: float | None = None
    """95 % interval of the mean itself, which prompts differing from each other make wide."""
    before_high: float | None = None
    after_low: float | None = None
    after_high: float | None = None
    prompts: str = "unseen"
    """Where they are from: "seen", the first of the file that was trained from, or "unseen"."""
    run: str = ""
    """The run, where a table holds several."""
    held_out: bool = False
    """Whether the reward is measured and not trained on."""
