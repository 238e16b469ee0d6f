"""Rewards per number of sampler steps, before and after training, on the same prompts and the same noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from alignkit.evaluation.rows import TOTAL, Row
from alignkit.evaluation.statistics import bootstrap, interval
from alignkit.interfaces import Policy, Sampler
from alignkit.records import Example
from alignkit.rewards.weighted import WeightedRewards, joined
from alignkit.rollout import sample_images

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Measurement:
    """What one set of weights scores on P prompts."""

    values: dict[tuple[int, str], Tensor]
    """By number of steps and name of the reward or part: (P,) float32 on the CPU, NaN where it could not be scored."""
    images: Tensor
    """(G, len(steps), 3, H, W) uint8, the first G prompts at each number of steps."""
    features: dict[int, Tensor] = field(default_factory=dict)
    """By number of steps: features (N, D) of all images, where they were asked for."""

    def state_dict(self) -> dict[str, Any]:
        """Values and images as a checkpoint takes them; features are left out."""
        values = [[steps, name, column] for (steps, name), column in self.values.items()]
        return {"values": values, "images": self.images}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The reverse of `state_dict`."""
        return cls({(steps, name): column for steps, name, column in state["values"]}, state["images"])


@torch.no_grad()
def measure(
    policy: Policy,
    sampler: Sampler,
    rewards: WeightedRewards,
    examples: Sequence[Example],
    steps: Sequence[int],
    seed: int,
    batch_size: int,
    grid_size: int = 8,
    features: Callable[[Tensor], Tensor] | None = None,
    samples: int = 1,
    advance: Callable[[int], None] = lambda passes: None,
) -> Measurement:
    """Draw every example at every number of steps, and score it; keep the first few images.

    `features` maps images (N, 3, H, W) in [0, 1] to what is kept of them all, (N, D). A prompt's value is the mean
    over its `samples` images that could be scored. `advance` is called with the network passes of every batch.

    The noise of image j of prompt i depends on `seed + j` and i alone, so two measurements compare prompt by prompt,
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
                images = sample_images(policy, walker, [e.text for e in part], seeds)
                if features is not None:
                    seen.setdefault(num_steps, []).append(features(images).cpu())
                kept.extend((images[: max(0, grid_size - start)] * 255).round().byte().cpu())
                yield images, part
                advance(num_steps * len(part))

        # Slow rewards answer while the next images are drawn.
        scores = joined(rewards.score_each(batches()))
        total = {TOTAL: scores.values} if rewards.rewards else {}  # where all are held out there is nothing to sum
        for name, found in {**total, **scores.parts}.items():
            values[num_steps, name] = found.cpu().view(samples, -1).nanmean(0)
        columns.append(torch.stack(kept))
    return Measurement(values, torch.stack(columns, dim=1), {k: torch.cat(parts) for k, parts in seen.items()})


def compare(before: Measurement, after: Measurement | None = None, held_out: Sequence[str] = ()) -> list[Row]:
    """A row for every reward and number of steps; without `after`, the values before alone.

    `held_out` are the rewards that are not trained on; their parts are not, either.
    A prompt that could not be scored in one of the two is left out of both; with none left there is no row.
    """
    rows = []
    for (num_steps, name), first in before.values.items():
        # A reward gives parts where it could score an image; afterwards that may be nowhere.
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
            held_out=name.partition("/")[0] in held_out,
        )
        if after is not None:
            mean, low, high = interval(second)
            row = replace(row, after=mean, after_low=low, after_high=high)
            difference, low, high = bootstrap(first, second)
            row = replace(row, difference=difference, low=low, high=high)
        rows.append(row)
    return rows
