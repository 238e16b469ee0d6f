"""Rewards per number of sampler steps, before and after training, on the same prompts and the same noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from alignkit.interfaces import Example, Policy, Sampler
from alignkit.rewards import WeightedRewards, joined
from alignkit.rollout import sample_pictures

if TYPE_CHECKING:
    from rich.table import Table

TOTAL = "reward"
"""The name of the weighted sum among the names of its parts."""


@dataclass(frozen=True)
class Measurement:
    """What one set of weights scores on P prompts."""

    values: dict[tuple[int, str], Tensor]
    """By number of steps and name of the reward or part: (P,) float32 on the CPU, NaN where it could not be scored."""
    pictures: Tensor
    """(G, len(steps), 3, H, W) uint8, the first G prompts at each number of steps."""
    features: dict[int, Tensor] = field(default_factory=dict)
    """By number of steps: features (N, D) of all pictures, where they were asked for."""

    def state_dict(self) -> dict[str, Any]:
        """Values and pictures as a checkpoint takes them; features are left out."""
        values = [[steps, name, column] for (steps, name), column in self.values.items()]
        return {"values": values, "pictures": self.pictures}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The reverse of `state_dict`."""
        return cls({(steps, name): column for steps, name, column in state["values"]}, state["pictures"])


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
    watched: bool = False
    """Whether the reward is measured and not trained on."""


@torch.no_grad()
def evaluate(
    policy: Policy,
    sampler: Sampler,
    rewards: WeightedRewards,
    examples: Sequence[Example],
    steps: Sequence[int],
    seed: int,
    batch_size: int,
    pictures: int = 8,
    features: Callable[[Tensor], Tensor] | None = None,
    samples: int = 1,
    drawn: Callable[[int], None] = lambda passes: None,
) -> Measurement:
    """Draw every example at every number of steps, and score it; keep the first few pictures.

    `features` maps pictures (N, 3, H, W) in [0, 1] to what is kept of them all, (N, D). A prompt's value is the mean
    over its `samples` pictures that could be scored. `drawn` is told the passes of the network behind every batch.

    The noise of picture j of prompt i depends on `seed + j` and i alone, so two measurements compare prompt by prompt,
    whatever the weights and the batch size.
    """
    every = [*examples] * samples
    values: dict[tuple[int, str], Tensor] = {}
    columns: list[Tensor] = []
    seen: dict[int, list[Tensor]] = {}
    for num_steps in steps:
        walker = replace(sampler, num_steps=num_steps)
        kept: list[Tensor] = []

        def batches(
            num_steps: int = num_steps, walker: Sampler = walker, kept: list[Tensor] = kept
        ) -> Iterator[tuple[Tensor, Sequence[Example]]]:
            for start in range(0, len(every), batch_size):
                part = every[start : start + batch_size]
                places = range(start, start + len(part))
                seeds = [(seed + place // len(examples), place % len(examples)) for place in places]
                images = sample_pictures(policy, walker, [e.text for e in part], seeds)
                if features is not None:
                    seen.setdefault(num_steps, []).append(features(images).cpu())
                kept.extend((images[: max(0, pictures - start)] * 255).round().byte().cpu())
                yield images, part
                drawn(num_steps * len(part))

        # Slow rewards answer while the next pictures are drawn.
        scores = joined(rewards.score_each(batches()))
        total = {TOTAL: scores.values} if rewards.rewards else {}  # where all are watched there is nothing to sum
        for name, found in {**total, **scores.parts}.items():
            values[num_steps, name] = found.cpu().view(samples, -1).nanmean(0)
        columns.append(torch.stack(kept))
    return Measurement(values, torch.stack(columns, dim=1), {k: torch.cat(parts) for k, parts in seen.items()})


def bootstrap(before: Tensor, after: Tensor, samples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of after - before (P,), and its 95 % interval: percentiles over prompts drawn anew with replacement.

    Paired: a prompt keeps its two values together, so what makes prompts easy or hard cancels.
    """
    return interval(after.double() - before.double(), samples, seed)


def interval(values: Tensor, samples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of `values` (P,), and its 95 % interval as percentiles of the means of resampled values."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (samples, len(values)), generator=generator)
    low, high = values.double()[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(values.double().mean()), low, high


def compare(before: Measurement, after: Measurement | None = None, watched: Sequence[str] = ()) -> list[Row]:
    """A row for every reward and number of steps; without `after`, the values before alone.

    `watched` are the rewards that are not trained on; their parts are not, either.
    A prompt that could not be scored in one of the two is left out of both; with none left there is no row.
    """
    rows = []
    for (num_steps, name), first in before.values.items():
        # A reward gives parts where it could score a picture; afterwards that may be nowhere.
        second = first if after is None else after.values.get((num_steps, name), torch.full_like(first, torch.nan))
        scored = ~(first.isnan() | second.isnan())
        first, second = first[scored], second[scored]
        if not len(first):
            continue
        mean, low, high = interval(first)
        row = Row(
            name,
            num_steps,
            len(first),
            mean,
            before_low=low,
            before_high=high,
            watched=name.partition("/")[0] in watched,
        )
        if after is not None:
            mean, low, high = interval(second)
            row = replace(row, after=mean, after_low=low, after_high=high)
            difference, low, high = bootstrap(first, second)
            row = replace(row, difference=difference, low=low, high=high)
        rows.append(row)
    return rows


def table(rows: Sequence[Row], title: str = "", wide: bool = False) -> Table:
    """Rows of one kind of prompts for the terminal. A total that equals a part is shown once, by the part's name.

    `wide` has room for the intervals of the means as well, some 110 columns.
    """
    from rich import box
    from rich.table import Table

    compared = any(row.after is not None for row in rows)
    several = len({row.run for row in rows}) > 1
    texts = ["reward", *(["run"] if several else [])]
    headings = ["steps", *texts, "before", *(["after", "change", "95 % interval"] if compared else [])]
    counts = sorted({row.count for row in rows})
    which = {"unseen": "that were not trained on", "seen": "of the file that was trained from"}
    caption = f"means over {' to '.join(map(str, counts))} prompts {which[rows[0].prompts]}" if rows else None

    def mean(value: float | None, low: float | None, high: float | None) -> str:
        return f"{value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if wide and low is not None else "")

    # Plain enough for a terminal of 80 columns, where it is not wide.
    shown = Table(title=title or None, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        # Where there is no room, names go over two lines; numbers never do.
        is_text = heading in texts
        shown.add_column(heading, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    for row in rows:
        if row.reward == TOTAL and any(r is not row and replace(r, reward=TOTAL) == row for r in rows):
            continue
        cells = [
            str(row.num_steps),
            *(getattr(row, name) for name in texts),
            mean(row.before, row.before_low, row.before_high),
        ]
        if compared:
            cells += [
                mean(row.after, row.after_low, row.after_high),
                f"{row.difference:+.3f}",
                f"[{row.low:+.3f}, {row.high:+.3f}]",
            ]
        shown.add_row(*(cell.removeprefix("-") if cell == "-0.000" else cell for cell in cells))
    return shown
