"""Rewards per number of sampler steps, before and after training, on the same prompts and the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alignkit.interfaces import Example, Policy, Sampler
from alignkit.rewards import WeightedRewards
from alignkit.rollout import sample, seeded_noises

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


@dataclass(frozen=True)
class Row:
    """One line of the table: means over the prompts scored both times, and the interval of their difference.

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
) -> Measurement:
    """Draw every example at every number of steps, and score it; keep the first few pictures.

    The noise of prompt i depends on `seed` and i alone, so two measurements compare prompt by prompt, whatever the
    weights and the batch size.
    """
    values: dict[tuple[int, str], Tensor] = {}
    columns: list[Tensor] = []
    for num_steps in steps:
        walker = replace(sampler, num_steps=num_steps)
        kept: list[Tensor] = []
        for start in range(0, len(examples), batch_size):
            part = examples[start : start + batch_size]
            rows = range(start, start + len(part))
            noises = seeded_noises(policy.latent_shape, num_steps, [(seed, row) for row in rows]).to(policy.device)
            images = policy.decode(sample(policy, walker, policy.encode([e.text for e in part]), noises))
            scores = rewards.score(images, part, batch_size)
            for name, found in {TOTAL: scores.values, **scores.parts}.items():
                column = values.setdefault((num_steps, name), torch.full((len(examples),), torch.nan))
                column[start : start + len(part)] = found.cpu()
            kept.extend((images[: max(0, pictures - start)] * 255).round().byte().cpu())
        columns.append(torch.stack(kept))
    return Measurement(values, torch.stack(columns, dim=1))


def bootstrap(before: Tensor, after: Tensor, samples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of after - before (P,), and its 95 % interval: percentiles over prompts drawn anew with replacement.

    Paired: a prompt keeps its two values together, so what makes prompts easy or hard cancels.
    """
    differences = after.double() - before.double()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(differences), (samples, len(differences)), generator=generator)
    bounds = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = differences[drawn].mean(1).quantile(bounds).tolist()
    return float(differences.mean()), low, high


def compare(before: Measurement, after: Measurement | None = None) -> list[Row]:
    """A row for every reward and number of steps; without `after`, the values before alone.

    A prompt that could not be scored in one of the two is left out of both; with none left there is no row.
    """
    rows = []
    for (num_steps, name), first in before.values.items():
        second = first if after is None else after.values[num_steps, name]
        scored = ~(first.isnan() | second.isnan())
        first, second = first[scored], second[scored]
        if not len(first):
            continue
        row = Row(name, num_steps, len(first), float(first.double().mean()))
        if after is not None:
            difference, low, high = bootstrap(first, second)
            row = replace(row, after=float(second.double().mean()), difference=difference, low=low, high=high)
        rows.append(row)
    return rows


def table(rows: Sequence[Row], title: str = "") -> Table:
    """The rows for the terminal. A total that equals a part is shown once, by the name of the part."""
    from rich import box
    from rich.table import Table

    compared = any(row.after is not None for row in rows)
    headings = ["steps", "reward", "before", *(["after", "change", "95 % interval"] if compared else [])]
    prompts = sorted({row.count for row in rows})
    caption = f"means over {' to '.join(map(str, prompts))} prompts that were not trained on" if rows else None
    # Plain enough for a terminal of 80 columns.
    shown = Table(title=title or None, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        shown.add_column(heading, justify="left" if heading == "reward" else "right", no_wrap=True)
    for row in rows:
        if row.reward == TOTAL and any(r is not row and replace(r, reward=TOTAL) == row for r in rows):
            continue
        cells = [str(row.num_steps), row.reward, f"{row.before:.3f}"]
        if compared:
            cells += [f"{row.after:.3f}", f"{row.difference:+.3f}", f"[{row.low:+.3f}, {row.high:+.3f}]"]
        shown.add_row(*cells)
    return shown
