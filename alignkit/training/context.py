"""The core's side of `Context`: chance, scoring, and the metrics of the update under way."""

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


class TrainContext(Context):
    """What an algorithm may touch during a run."""

    def __init__(
        self,
        accelerator: Accelerator,
        policy: Policy,
        teacher: Policy | None,
        sampler: Sampler,
        rewards: WeightedRewards,
        surrogate: Surrogate | None,
        seed: int,
        rows_per_update: int,
        chunk: int,
        combination: Combination,
    ) -> None:
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
        """Why an image of this process could not be scored, of the last one of which it was told."""
        self.failed_together = False
        """Whether scoring failed, and every process knows it."""
        self._metrics: dict[str, list[float]] = defaultdict(list)

    def noise(self, count: int) -> Tensor:
        return torch.randn((count, *self.policy.latent_shape), generator=self.generator).to(self.policy.device)

    @torch.no_grad()
    def score(
        self,
        latents: Tensor,
        examples: Sequence[Example],
        log: bool = True,
        others: Sequence[tuple[int, Example]] = (),
    ) -> Scores:
        self._there_are_rewards()
        if wrong := [row for row, _ in others if row not in range(len(latents))]:
            raise IndexError(f"others: row {wrong[0]} of {len(latents)} latents")
        places: list[int] = []
        failed: AlignkitError | None = None
        scores: list[Scores] = []
        try:
            # In the precision that decoder and rewards were loaded in, as when the run is measured.
            with torch.autocast(self.policy.device.type, enabled=False):
                scores = self._rewards.score_each(self._chunks(latents, examples, others, places))
        except AlignkitError as error:
            failed = error
        # What one process was refused ends all of them here, where none waits for the others.
        for reason in gather_object([failed]):
            if reason is not None:
                self.failed_together = True
                raise reason
        found = joined(scores).select(torch.tensor(places).argsort())
        return self._combined(found, len(latents) if log else 0)

    def _chunks(
        self, latents: Tensor, examples: Sequence[Example], others: Sequence[tuple[int, Example]], places: list[int]
    ) -> Iterator[tuple[Tensor, Sequence[Example]]]:
        """Images with their examples, and then with the others that are asked about them, a few at a time; where
        each stands among examples and others goes into `places`."""
        for start in range(0, len(latents), self._chunk):
            rows = range(start, min(start + self._chunk, len(latents)))
            images = self.policy.decode(latents[rows.start : rows.stop])
            places += rows
            yield images, examples[rows.start : rows.stop]
            about = [(place, *other) for place, other in enumerate(others, len(latents)) if other[0] in rows]
            for i in range(0, len(about), self._chunk):
                at, row, asked = zip(*about[i : i + self._chunk], strict=True)
                places += at
                yield images[[r - start for r in row]], asked

    def _there_are_rewards(self) -> None:
        if not self._rewards.names:
            raise PluginError("the algorithm asks for scores and says uses_rewards = False, so there is no reward")

    def differentiable_score(self, latents: Tensor, examples: Sequence[Example], log: bool = False) -> Scores:
        self._there_are_rewards()
        # As in `score`: what is followed is what is measured, and decoders of SDXL overflow in half precision.
        with torch.autocast(self.policy.device.type, enabled=False):
            scores = self._rewards(self.policy.decode(latents), examples)
            return self._combined(scores, len(examples) if log else 0)

    def _combined(self, scores: Scores, logged: int) -> Scores:
        """The scores with what to learn from as values. Of the first `logged` the plain weighted sum is logged: it
        stays one measure all along the run, whatever the statistics."""
        self.images += len(scores.values) * self.accelerator.num_processes
        if logged:
            own = scores.select(slice(logged))
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
        return replace(scores, values=self.combination.values(scores))

    def terms(self, scores: Scores) -> Mapping[str, tuple[float, Tensor]]:
        return self.combination.terms(scores)

    def begin_round(self) -> None:
        """Take what was scored in the round before into how rewards are combined, and log it."""
        self.log(**self.combination.begin_round())

    def state_dict(self) -> dict[str, Any]:
        """What this process needs to go on: chance, messages, metrics under way, how rewards are combined."""
        return {
            "generator": self.generator.get_state(),
            "warnings": list(self.warnings),
            "metrics": {name: list(values) for name, values in self._metrics.items()},
            "combination": self.combination.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The reverse of `state_dict`."""
        self.generator.set_state(state["generator"])
        # What was found while this process loaded may be new.
        self.warnings = list(dict.fromkeys([*state["warnings"], *self.warnings]))
        self._metrics = defaultdict(list, {name: list(values) for name, values in state["metrics"].items()})
        self.combination.load_state_dict(state["combination"])

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
        """Images that were scored since the last call, over all processes."""
        count, self.images = self.images, 0
        return count

    def take_metrics(self) -> dict[str, float]:
        """Means over the values logged since the last call, and over processes."""
        logged = [(name, value) for name, values in self._metrics.items() for value in values]
        self._metrics.clear()
        # As objects: a process may have nothing to say about a metric, such as pairs when all its rewards are tied.
        together: dict[str, list[float]] = defaultdict(list)
        for name, value in gather_object(logged):
            together[name].append(value)
        return {name: sum(values) / len(values) for name, values in sorted(together.items())}

    def why_idle(self) -> str:
        """What was logged since the last update says about rounds without any, and what to do about it."""
        metrics, told = self.take_metrics(), next(filter(None, gather_object([self.reason])), "")
        reason = f" ({told})" if told else ""
        if "reward" not in metrics:
            return f"no image could be scored{reason}; try the reward with alignkit score"
        some = f", but for a part of them{reason}," if "unscored" in metrics else ""
        return (
            f"the images were scored{some} and no two were told apart, or none reached a threshold of the method; "
            "draw more images of each prompt, or take another reward"
        )
