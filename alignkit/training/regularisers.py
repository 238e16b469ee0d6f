"""The regularisers of a run: their rows for each update, and the weighted sum of their terms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from alignkit.errors import PluginError
from alignkit.interfaces import Regulariser
from alignkit.records import Batch, Rows
from alignkit.training.context import TrainContext
from alignkit.training.predictions import recorded

Weighed = tuple[str, float, Regulariser[Any, Any]]
"""Name, weight and regulariser."""
Loss = tuple[Tensor, dict[str, Tensor]]
"""A scalar mean over rows, and metrics that are such means."""


@dataclass(frozen=True)
class UpdateRows:
    """The rows of one policy update: the algorithm's, and as many, or None, for each regulariser."""

    own: Rows
    others: tuple[Rows | None, ...]

    def __len__(self) -> int:
        return len(self.own)

    def split(self, size: int) -> Iterator[UpdateRows]:
        """Yield consecutive parts of at most `size` rows."""
        others = [repeat(None) if rows is None else rows.split(size) for rows in self.others]
        for own, *parts in zip(self.own.split(size), *others, strict=False):  # None repeats without end
            yield UpdateRows(own, tuple(parts))


class Regularisers:
    """Terms that are added to the loss of the algorithm; with no members this adds no cost."""

    def __init__(self, members: Sequence[Weighed] = ()) -> None:
        self._members = list(members)
        self._collected: list[Any] = []
        self._observing = any("predictions" in regulariser.needs for _, _, regulariser in self._members)

    def setup(self, ctx: TrainContext) -> None:
        for _, _, regulariser in self._members:
            regulariser.setup(ctx)

    def collect(self, batch: Batch, ctx: TrainContext) -> None:
        """Keep what each needs of a round's batch, until the next round."""
        self._collected = [regulariser.collect(batch, ctx) for _, _, regulariser in self._members]

    @torch.no_grad()
    def rows(self, own: Rows, ctx: TrainContext) -> UpdateRows:
        """Sample the rows that belong to `own`. Raises PluginError for a regulariser that returns more or fewer."""
        others = []
        for (name, _, regulariser), collected in zip(self._members, self._collected, strict=True):
            rows = regulariser.rows(collected, len(own), ctx)
            if rows is not None and len(rows) != len(own):
                raise PluginError(f"regulariser {name}: rows returned {len(rows)} rows, expected {len(own)} or None")
            others.append(rows)
        return UpdateRows(own, tuple(others))

    def loss(self, rows: UpdateRows, ctx: TrainContext, algorithm: Callable[[Any, TrainContext], Loss]) -> Loss:
        """Return the algorithm's loss on its rows plus every weighted term, and the metrics of all.

        A metric whose name is taken is logged as "regulariser/metric".
        """
        if not self._observing:
            (total, metrics), predictions = algorithm(rows.own, ctx), []
        else:
            with recorded(ctx.policy) as predictions:
                total, metrics = algorithm(rows.own, ctx)
        metrics = dict(metrics)
        for (name, weight, regulariser), own in zip(self._members, rows.others, strict=True):
            seen = predictions if "predictions" in regulariser.needs else []
            value, found = regulariser.loss(own, seen, ctx)
            total = total + weight * value
            metrics |= {f"{name}/{key}" if key in metrics else key: metric for key, metric in found.items()}
        return total, metrics

    def after_update(self, ctx: TrainContext) -> None:
        for _, _, regulariser in self._members:
            regulariser.after_update(ctx)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each by name."""
        return {name: regulariser.state_dict() for name, _, regulariser in self._members}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, _, regulariser in self._members:
            regulariser.load_state_dict(state[name])
