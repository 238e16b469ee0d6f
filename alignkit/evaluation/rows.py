"""One row of an evaluation: a reward at a number of steps, before and after training."""

from __future__ import annotations

from dataclasses import dataclass

TOTAL = "reward"
"""Name of the weighted sum, next to the names of its parts."""


@dataclass(frozen=True)
class Row:
    """Means over the prompts scored both times, and the 95 % interval of their difference.

    Either all rows of a table have the values after training, or none has.
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
    """95 % interval of the mean itself, which is wide because prompts differ from each other."""
    before_high: float | None = None
    after_low: float | None = None
    after_high: float | None = None
    prompts: str = "unseen"
    """Kind of prompts: "seen", the first ones of the training file, or "unseen"."""
    run: str = ""
    """Name of the run, if the table holds several."""
    departure: str = ""
    """The part of the run's settings that is not the paper's, in a few words; empty: none."""
    update: int | None = None
    """Update of the checkpoint, if every checkpoint of the run was measured; None: the weights that it exports."""
    held_out: bool = False
    """Whether the reward is measured but not trained on."""
