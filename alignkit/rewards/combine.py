"""Combine several rewards into one training signal, with running statistics and lower bounds on mean rewards.

Statistics and multipliers change between rounds only, so all scores of a round are on one scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignkit.config.sections import RewardConfig, ScoringConfig
from alignkit.errors import ConfigError
from alignkit.records import Scores

EPS = 1e-6
"""Added to a standard deviation before it divides."""
MULTIPLIER_LIMIT = 100.0
"""Upper limit of a multiplier, so that a bound that cannot be met does not displace all other rewards."""


@dataclass(frozen=True)
class Statistics:
    """Count, mean and sum of squared deviations of numbers, in float64."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: Tensor) -> Statistics:
        """Compute the statistics of values (N,), ignoring NaN."""
        known = values.detach().cpu().double()
        known = known[~known.isnan()]
        if not len(known):
            return cls()
        mean = float(known.mean())
        return cls(float(len(known)), mean, float((known - mean).square().sum()))

    def merged(self, other: Statistics) -> Statistics:
        """Merge with the statistics of other values (Chan, Golub and LeVeque 1983)."""
        count = self.count + other.count
        if not count:
            return self
        step = other.mean - self.mean
        mean = self.mean + step * other.count / count
        return Statistics(count, mean, self.squares + other.squares + step**2 * self.count * other.count / count)

    def decayed(self, decay: float) -> Statistics:
        """Scale the count by `decay`; mean and standard deviation stay the same."""
        return Statistics(self.count * decay, self.mean, self.squares * decay)

    @property
    def std(self) -> float:
        return math.sqrt(self.squares / self.count) if self.count else math.nan

    def standardised(self, values: Tensor) -> Tensor:
        """Return (values - mean) / standard deviation, with gradient to the values."""
        return (values - self.mean) / (self.std + EPS)


class Combination:
    """Combine the scores of a run's rewards as `[scoring]` sets, with the state that a resumed run needs."""

    def __init__(
        self,
        rewards: Sequence[RewardConfig],
        scoring: ScoringConfig,
        gather: Callable[[list[Any]], list[Any]] = lambda mine: mine,
    ) -> None:
        """Start without statistics. `gather` concatenates the lists of all processes, in rank order."""
        self.mode, self._scoring, self._gather = scoring.combine, scoring, gather
        self._weights = {r.name: r.weight for r in rewards}
        self._floors = {r.name: r.at_least for r in rewards if r.at_least is not None}
        self._multipliers = dict.fromkeys(self._floors, 0.0)
        self._starts = {name: Statistics() for name in self._floors}
        self._running = {name: Statistics() for name in self._weights}
        self._seen = {name: Statistics() for name in self._weights}
        """Statistics of this process since the last round began."""
        self._counting = bool(self._floors) or self.mode == "normalised"
        self._rounds = 0
        """Rounds counted so far; the first `start_rounds` of them define the start."""

    @staticmethod
    def check(rewards: Sequence[RewardConfig], scoring: ScoringConfig, takes_advantages: bool, algorithm: str) -> None:
        """Raise ConfigError for settings that cannot be combined."""
        if scoring.combine == "advantage" and not takes_advantages:
            raise ConfigError(
                f'scoring.combine: found "advantage", but algorithm {algorithm} learns from rewards, not from '
                'advantages; expected "sum" or "normalised"'
            )
        bounded = [r.name for r in rewards if r.at_least is not None]
        if bounded and len(rewards) < 2:
            raise ConfigError(
                f"reward.at_least: {bounded[0]} is the only reward; expected another one to maximise under this bound"
            )
        if bounded and scoring.combine == "sum":
            raise ConfigError(
                f'reward.at_least: set for {bounded[0]} while scoring.combine is "sum"; multipliers need rewards on a '
                'common scale, expected "normalised" or "advantage"'
            )
        if rewards and all(r.weight == 0 for r in rewards):
            raise ConfigError("reward: every weight is 0; expected at least one that is not")

    def weights(self) -> dict[str, float]:
        """Return the current weight of each reward: (weight + multiplier) / (1 + sum of the multipliers).

        The multipliers are those of the Lagrangian; the division keeps the scale of the combined reward (Dai et al.
        2023, Safe RLHF, arXiv 2310.12773).
        """
        if not self._floors:
            return dict(self._weights)
        total = 1 + sum(self._multipliers.values())
        return {name: (w + self._multipliers.get(name, 0.0)) / total for name, w in self._weights.items()}

    def values(self, scores: Scores) -> Tensor:
        """Return the combined rewards (N,), NaN where an image could not be scored."""
        if self.mode != "normalised":
            return scores.values
        self._start(scores)
        values = torch.zeros_like(scores.values)
        for name, weight in self.weights().items():
            values = values + weight * self._running[name].standardised(scores.parts[name])
        return values.masked_fill(~scores.valid, torch.nan)

    def terms(self, scores: Scores) -> dict[str, tuple[float, Tensor]]:
        """Return (weight, rewards (N,)) of each term of the advantage, as defined by `Context.terms`."""
        if self.mode != "advantage":
            return {"": (1.0, scores.values.masked_fill(~scores.valid, torch.nan))}
        return {
            name: (w, scores.parts[name].masked_fill(~scores.valid, torch.nan)) for name, w in self.weights().items()
        }

    def _start(self, scores: Scores) -> None:
        """Initialise the running statistics with the first scores of the run, from all processes."""
        if all(not s.count for s in self._running.values()):
            self._running = self._over_processes({name: Statistics.of(scores.parts[name]) for name in self._weights})

    def see(self, scores: Scores) -> None:
        """Add scores of the policy's samples to the statistics of the next round."""
        if not self._counting:
            return
        self._start(scores)
        for name, seen in self._seen.items():
            self._seen[name] = seen.merged(Statistics.of(scores.parts[name]))

    def begin_round(self) -> dict[str, float]:
        """Update statistics and multipliers with the scores since the last call, and return metrics of the bounds.

        A multiplier rises by `multiplier_rate` for each standard deviation that the round's mean is below the floor,
        falls likewise above it, and is never negative: gradient ascent on the dual of "maximise the sum subject to
        mean >= floor", as in Moskovitz et al. 2023 (constrained RLHF, arXiv 2310.04373).
        """
        if not self._counting:
            return {}
        seen = self._over_processes(self._seen)
        self._seen = {name: Statistics() for name in self._weights}
        if not any(new.count for new in seen.values()):
            return {}
        for name, new in seen.items():
            # The statistics that `_start` made are dropped, because `new` contains the same scores.
            known = self._running[name].decayed(self._scoring.statistics_decay) if self._rounds else Statistics()
            if new.count:
                self._running[name] = known.merged(new)
        starting = self._rounds < self._scoring.start_rounds
        self._rounds += 1
        metrics = {}
        for name in self._floors:
            if starting:
                self._starts[name] = self._starts[name].merged(seen[name])
            floor = self.floor(name)
            known_floor = not math.isnan(floor) and not (starting and self._floors[name] == "start")
            if known_floor and seen[name].count:
                below = (floor - seen[name].mean) / (self._running[name].std + EPS)
                moved = self._multipliers[name] + self._scoring.multiplier_rate * below
                self._multipliers[name] = min(max(0.0, moved), MULTIPLIER_LIMIT)
            if known_floor:
                metrics[f"reward/{name}/floor"] = floor
                metrics[f"reward/{name}/multiplier"] = self._multipliers[name]
        return metrics

    def floor(self, name: str) -> float:
        """Return the lower bound on the mean of a reward; NaN while the mean at the start is unknown."""
        wanted = self._floors[name]
        if wanted != "start":
            return float(wanted)
        return self._starts[name].mean if self._starts[name].count else math.nan

    def _over_processes(self, own: Mapping[str, Statistics]) -> dict[str, Statistics]:
        """Merge the statistics of all processes."""
        found = {name: Statistics() for name in own}
        for process in self._gather([dict(own)]):
            for name, statistics in process.items():
                found[name] = found[name].merged(statistics)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint; it is equal in all processes except for "seen"."""
        tables = {"running": self._running, "starts": self._starts, "seen": self._seen}
        packed = {key: {n: [s.count, s.mean, s.squares] for n, s in table.items()} for key, table in tables.items()}
        return {**packed, "multipliers": dict(self._multipliers), "rounds": self._rounds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from `state_dict`."""
        self._running, self._starts, self._seen = (
            {name: Statistics(*numbers) for name, numbers in state[key].items()}
            for key in ("running", "starts", "seen")
        )
        self._multipliers, self._rounds = dict(state["multipliers"]), state["rounds"]
