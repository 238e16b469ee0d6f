"""The core's implementation of `Context`: randomness, scoring, and the metrics of the update under way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from alignkit.errors import AlignkitError, PluginError
from alignkit.interfaces import Context, Policy, Sampler, Surrogate
from alignkit.records import Example, Scores
from alignkit.rewards.combine import Combination
from alignkit.rewards.weighted import WeightedRewards, joined

Question = tuple[int, Example]
"""A row of the latents, and the example under which its image is scored."""


class TrainContext(Context):
    """All that an algorithm may touch during a run."""

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        policy: Policy,
        sampler: Sampler,
        rewards: WeightedRewards,
        combination: Combination,
        teacher: Policy | None = None,
        surrogate: Surrogate | None = None,
        seed: int = 0,
        rows_per_update: int,
        chunk: int,
    ) -> None:
        """`rewards` are those of the sum, loaded; `chunk` images are decoded and scored at once."""
        self.accelerator = accelerator
        self.policy, self.teacher, self.sampler, self.surrogate = policy, teacher, sampler, surrogate
        self._rewards, self._chunk, self.combination = rewards, chunk, combination
        self.generator = torch.Generator().manual_seed(seed * 1000 + accelerator.process_index)
        self.rows_per_update = rows_per_update
        self.update = 0
        self.warming_up = False
        self.images = 0
        """Images scored since `take_images`."""
        self.warnings: list[str] = []
        self.reason = ""
        """The last reason that a reward of this process gave for an image that it could not score."""
        self.failed_together = False
        """Whether scoring failed, and every process knows it."""
        self._metrics: dict[str, list[float]] = defaultdict(list)

    def noise(self, count: int) -> Tensor:
        return torch.randn((count, *self.policy.latent_shape), generator=self.generator).to(self.policy.device)

    # scoring

    @torch.no_grad()
    def score(
        self,
        latents: Tensor,
        examples: Sequence[Example],
        log: bool = True,
        others: Sequence[Question] = (),
    ) -> Scores:
        self._require_rewards()
        if wrong := [row for row, _ in others if row not in range(len(latents))]:
            raise IndexError(f"others: found row {wrong[0]}, expected less than {len(latents)}, the number of latents")
        questions = [*enumerate(examples), *others]
        groups = _grouped([row for row, _ in questions], len(latents), self._chunk)
        found = self._scored_together(self._images(latents, questions, groups))
        places = torch.tensor([place for parts in groups.values() for part in parts for place in part])
        return self._combined(found.select(places.argsort()), len(latents) if log else 0)

    def _images(
        self, latents: Tensor, questions: Sequence[Question], groups: Mapping[range, Sequence[Sequence[int]]]
    ) -> Iterator[tuple[Tensor, list[Example]]]:
        """Yield images and examples of each part of each group; the latents of a group are decoded once."""
        for rows, parts in groups.items():
            images = self.policy.decode(latents[rows.start : rows.stop])
            for part in parts:
                chosen = [questions[place] for place in part]
                yield images[[row - rows.start for row, _ in chosen]], [example for _, example in chosen]

    def _scored_together(self, chunks: Iterator[tuple[Tensor, list[Example]]]) -> Scores:
        """Score all chunks; what ends one process ends all of them here, where none waits for the others."""
        failed: AlignkitError | None = None
        scores: list[Scores] = []
        try:
            # In the precision that decoder and rewards were loaded in, as in an evaluation.
            with torch.autocast(self.policy.device.type, enabled=False):
                scores = self._rewards.score_each(chunks)
        except AlignkitError as error:
            failed = error
        for reason in gather_object([failed]):
            if reason is not None:
                self.failed_together = True
                raise reason
        return joined(scores)

    def _require_rewards(self) -> None:
        if not self._rewards.names:
            raise PluginError(
                "the algorithm requests scores, but its uses_rewards is False, so the run has no reward; set it to True"
            )

    def differentiable_score(self, latents: Tensor, examples: Sequence[Example], log: bool = False) -> Scores:
        self._require_rewards()
        # As in `score`: the gradient is that of the evaluated score, and decoders of SDXL overflow in half precision.
        with torch.autocast(self.policy.device.type, enabled=False):
            scores = self._rewards(self.policy.decode(latents), examples)
            return self._combined(scores, len(examples) if log else 0)

    def _combined(self, scores: Scores, logged: int) -> Scores:
        """Return the scores with the combined value to learn from.

        Of the first `logged` the plain weighted sum is logged, which stays one measure throughout the run, whatever
        the statistics of the combination."""
        self.images += len(scores.values) * self.accelerator.num_processes
        if logged:
            self._log_scores(scores.select(slice(logged)))
        return replace(scores, values=self.combination.values(scores))

    def _log_scores(self, own: Scores) -> None:
        """Log the mean of the sum and of each part over valid images, and count the scores for the combination."""
        self.combination.see(own)
        if bool(own.valid.any()):
            self.log(reward=own.values[own.valid].detach().mean())
            for name, values in own.parts.items():  # a part may be of some images alone
                known = values[own.valid & values.isfinite()].detach()
                if len(known):
                    self.log(**{f"reward/{name}": known.mean()})
        self.reason = own.reason or self.reason
        if not bool(own.valid.all()):
            self.log(unscored=(~own.valid).float().mean())

    def terms(self, scores: Scores) -> Mapping[str, tuple[float, Tensor]]:
        return self.combination.terms(scores)

    def begin_round(self) -> None:
        """Update the combination of rewards with the scores of the round before, and log its state."""
        self.log(**self.combination.begin_round())

    def gather(self, values: Tensor) -> Tensor:
        gathered: Tensor = self.accelerator.gather(values)
        return gathered

    def log(self, **metrics: float | Tensor) -> None:
        for name, value in metrics.items():
            self._metrics[name].append(float(value))

    def warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)

    def take_images(self) -> int:
        """Return how many images were scored since the last call, over all processes."""
        count, self.images = self.images, 0
        return count

    def take_metrics(self) -> dict[str, float]:
        """Return the means over the values logged since the last call, and over processes."""
        logged = [(name, value) for name, values in self._metrics.items() for value in values]
        self._metrics.clear()
        # As objects: a process may lack a metric, such as one of pairs where all its rewards are tied.
        together: dict[str, list[float]] = defaultdict(list)
        for name, value in gather_object(logged):
            together[name].append(value)
        return {name: sum(values) / len(values) for name, values in sorted(together.items())}

    def why_idle(self) -> str:
        """Explain, from what was logged since the last update, why rounds gave no rows, and what to do about it."""
        metrics, given = self.take_metrics(), next(filter(None, gather_object([self.reason])), "")
        reason = f" ({given})" if given else ""
        if "reward" not in metrics:
            return f"no image could be scored{reason}; try the reward with alignkit score"
        some = f"; some images could not be scored{reason}" if "unscored" in metrics else ""
        return (
            "all images of a prompt got the same score, or none passed the algorithm's threshold; raise the samples "
            f"per prompt or use another reward{some}"
        )

    # what a checkpoint keeps

    def state_dict(self) -> dict[str, Any]:
        """Return what this process needs to go on: its RNG, warnings, metrics under way, statistics of the rewards."""
        return {
            "generator": self.generator.get_state(),
            "warnings": list(self.warnings),
            "metrics": {name: list(values) for name, values in self._metrics.items()},
            "combination": self.combination.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.generator.set_state(state["generator"])
        # Loading in this process may have added warnings.
        self.warnings = list(dict.fromkeys([*state["warnings"], *self.warnings]))
        self._metrics = defaultdict(list, {name: list(values) for name, values in state["metrics"].items()})
        self.combination.load_state_dict(state["combination"])


def _grouped(rows: Sequence[int], count: int, size: int) -> dict[range, list[list[int]]]:
    """Group places of `rows` by the run of `size` latents that their row lies in, in parts of at most `size` places.

    The first `count` places are those of the latents themselves and make the first part of each group, so that how
    they are batched does not depend on the places after them."""
    runs = [range(start, min(start + size, count)) for start in range(0, count, size)]
    further: dict[int, list[int]] = defaultdict(list)
    for place, row in enumerate(rows[count:], start=count):
        further[row // size].append(place)
    return {
        run: [list(run), *(further[i][start : start + size] for start in range(0, len(further[i]), size))]
        for i, run in enumerate(runs)
    }
