"""Measure rewards at several numbers of sampler steps, before and after training, on equal prompts and noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from alignkit.data.decode import to_uint8
from alignkit.evaluation.rows import TOTAL, Row
from alignkit.evaluation.statistics import bootstrap, interval
from alignkit.evaluation.wins import WinRate, win_rate
from alignkit.interfaces import Policy, Sampler
from alignkit.records import Example
from alignkit.rewards.weighted import WeightedRewards, joined
from alignkit.rollout import sample_images


@dataclass(frozen=True)
class Measurement:
    """Scores of one set of weights on P prompts."""

    values: dict[tuple[int, str], Tensor]
    """By number of steps and name of the reward or part: (P,) float32 on the CPU, NaN where it could not be scored."""
    images: Tensor
    """(G, len(steps), 3, H, W) uint8, the first G prompts at each number of steps."""
    shown: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """The scores of `images` themselves, (G,) each; a value of the prompt is a mean over its samples."""
    features: dict[int, Tensor] = field(default_factory=dict)
    """By number of steps: features (N, D) of all images, if they were requested."""
    each: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """The scores of all images, (samples, P) each; `values` are their means over the samples."""

    def state_dict(self) -> dict[str, Any]:
        """Return values and images for a checkpoint, without the features and the scores of all images."""
        values, shown = ([[*key, column] for key, column in table.items()] for table in (self.values, self.shown))
        return {"values": values, "images": self.images, "shown": shown}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Restore a measurement from `state_dict`."""
        values, shown = (
            {(steps, name): column for steps, name, column in table}
            for table in (state["values"], state.get("shown", ()))
        )
        return cls(values, state["images"], shown)

    def scores(self) -> list[dict[str, float]]:
        """Return the scores of each of `images`, prompt by prompt, by name of the reward or part; NaN: not scored."""
        steps = list(dict.fromkeys(number for number, _ in self.shown)) or range(self.images.shape[1])
        return [
            {name: float(column[place]) for (k, name), column in self.shown.items() if k == number}
            for place in range(len(self.images))
            for number in steps
        ]


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
    """Sample and score every example at every number of steps; keep the images of the first `grid_size` examples.

    `features` maps images (N, 3, H, W) in [0, 1] to features (N, D), which are returned for all images. A prompt's
    value is the mean over those of its `samples` images that could be scored. `advance` is called after every batch
    with its number of network passes.

    The noise of image j of prompt i depends on `seed + j` and i alone, so two measurements are comparable prompt by
    prompt, independently of weights and batch size.
    """
    every = [*examples] * samples
    values: dict[tuple[int, str], Tensor] = {}
    each: dict[tuple[int, str], Tensor] = {}
    shown: dict[tuple[int, str], Tensor] = {}
    columns: list[Tensor] = []
    seen: dict[int, list[Tensor]] = {}
    shown_count = min(grid_size, len(examples))
    for num_steps in steps:
        at_steps = replace(sampler, num_steps=num_steps)
        kept: list[Tensor] = []

        def batches(
            num_steps: int = num_steps, sampler: Sampler = at_steps, kept: list[Tensor] = kept
        ) -> Iterator[tuple[Tensor, Sequence[Example]]]:
            for start in range(0, len(every), batch_size):
                part = every[start : start + batch_size]
                places = range(start, start + len(part))
                seeds = [(seed + place // len(examples), place % len(examples)) for place in places]
                images = sample_images(policy, sampler, [e.text for e in part], seeds)
                if features is not None:
                    seen.setdefault(num_steps, []).append(features(images).cpu())
                kept.extend(to_uint8(images[: max(0, shown_count - start)]).cpu())
                yield images, part
                advance(num_steps * len(part))

        # Slow rewards score while the next images are sampled.
        scores = joined(rewards.score_each(batches()))
        total = {TOTAL: scores.values} if rewards.rewards else {}  # nothing to sum if all rewards are held out
        for name, found in {**total, **scores.parts}.items():
            each[num_steps, name] = found.cpu().view(samples, -1)
            values[num_steps, name] = each[num_steps, name].nanmean(0)
            shown[num_steps, name] = found.cpu()[:shown_count].clone()
        columns.append(torch.stack(kept))
    kept_features = {number: torch.cat(parts) for number, parts in seen.items()}
    return Measurement(values, torch.stack(columns, dim=1), shown, kept_features, each)


def win_rates(first: str, one: Measurement, second: str, other: Measurement, reward: str) -> list[WinRate]:
    """Return how often an image of `one` scores higher than that of `other` from the same prompt and noise.

    One win rate for each number of steps. Pairs of which an image could not be scored are left out.
    """
    found = []
    for (num_steps, name), scores in one.each.items():
        if name != reward or (num_steps, name) not in other.each:
            continue
        columns = torch.stack([scores, other.each[num_steps, name]]).permute(2, 1, 0)  # (P, samples, 2)
        pairs = [[(a, b) for a, b in some.tolist() if not (math.isnan(a) or math.isnan(b))] for some in columns]
        if rate := win_rate(first, second, reward, num_steps, pairs):
            found.append(rate)
    return found


def compare(before: Measurement, after: Measurement | None = None, held_out: Sequence[str] = ()) -> list[Row]:
    """Return a row for every reward and number of steps; without `after`, only the values before.

    `held_out` names the rewards that are not trained on; their parts are held out too. A prompt that could not be
    scored in one of the measurements is left out of both; if none is left, there is no row.
    """
    rows = []
    for (num_steps, name), first in before.values.items():
        # A reward returns parts only for images that it could score, which afterwards may be none.
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
