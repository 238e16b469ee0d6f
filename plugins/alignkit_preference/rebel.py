"""REBEL: regress the difference of two trajectories' log-likelihood ratios to that of their advantages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alignkit import Algorithm, Batch, Context, Rows, check_ranges
from alignkit.advantage import Baseline
from alignkit_preference.trajectory_pairs import Pairs, collect_pairs, log_prob


@dataclass(frozen=True)
class WeightedPairs(Rows):
    """Pairs of whole trajectories with their advantages, N rows."""

    pairs: Pairs
    advantages: Tensor
    """(N, 2)."""
    old_log_prob: Tensor | None = None
    """(N, 2) of both trajectories, the sum over steps, under the policy that sampled them."""


@dataclass
class REBEL(Algorithm[WeightedPairs, WeightedPairs]):
    """REBEL (Gao et al. 2024, arXiv 2404.16767), as its authors apply it to consistency models.

    Two trajectories of a prompt start from two noises. The difference of their log-likelihood ratios is regressed to
    the difference of their advantages; nothing is clipped.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"stochastic_steps"})
    takes_advantages: ClassVar[bool] = True

    pairs: Annotated[int, Ge(1)] = 2
    """Pairs of trajectories of each prompt in a round."""
    scale: Annotated[float, Gt(0)] = 1.0
    """Factor of the difference of log-likelihood ratios (the code's `rebel_lr`; the paper divides by eta)."""
    baseline: Literal["prompt", "batch", "group"] = "prompt"
    """Normalise a reward by the last rewards of the same prompt, by those of the round, or by those of the same prompt
    in the round; with "group" prompts whose images all got one score are left out."""
    buffer_size: int = 32
    """Rewards of a prompt that are kept."""
    min_count: Annotated[int, Ge(1)] = 16
    """Rewards that a prompt needs to be normalised by its own; until then it is by those of the round."""
    reduction: Literal["mean", "sum"] = "mean"
    """The log-probability over latent dimensions. The papers write the sum, their code takes the mean."""
    inner_epochs: Annotated[int, Ge(1)] = 1
    """Passes over the pairs of a round."""

    def __post_init__(self) -> None:
        check_ranges(self)
        self._baseline = Baseline(self.baseline, self.buffer_size, self.min_count)

    def collect(self, batch: Batch, ctx: Context) -> WeightedPairs:
        pairs, scores = collect_pairs(batch, self.pairs, shared_noise=False, ctx=ctx)
        examples = [example for example in pairs.prompt.examples for _ in range(2)]
        advantages = self._baseline.advantages(scores, examples, ctx).view(-1, 2)
        return WeightedPairs(pairs, advantages).select((~advantages.isnan().any(1)).nonzero()[:, 0])

    def updates(self, collected: WeightedPairs, ctx: Context) -> Iterator[WeightedPairs]:
        """Yield the pairs in random order, in parts of nearly `ctx.rows_per_update`, once each inner epoch."""
        rows, size = collected.shuffled(ctx.generator), ctx.rows_per_update
        if not len(rows):
            return
        # Computed again instead of kept from the trajectory: at the first update the log-ratios are then 0 exactly.
        with torch.no_grad():
            old = torch.cat([self._log_prob(part.pairs, ctx) for part in rows.even_split(size)])
        rows = replace(rows, old_log_prob=old)
        for epoch in range(self.inner_epochs):
            yield from (rows.shuffled(ctx.generator) if epoch else rows).even_split(size)

    def loss(self, rows: WeightedPairs, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        assert rows.old_log_prob is not None
        log_ratio = self._log_prob(rows.pairs, ctx) - rows.old_log_prob
        loss = squares(log_ratio, rows.advantages, self.scale).mean()
        found, wanted = (column[:, 0] - column[:, 1] for column in (log_ratio, rows.advantages))
        return loss, {"log_ratio_size": log_ratio.abs().mean(), "agreement": (found * wanted > 0).float().mean()}

    def _log_prob(self, pairs: Pairs, ctx: Context) -> Tensor:
        """Return the log-probabilities (N, 2) of whole trajectories.

        One step after the other, each computed again for its gradient: the loss is of their sum, and the graphs of all
        steps of 50 would not fit together.
        """
        count = pairs.k.shape[1]
        if count == 1:
            return log_prob(pairs, ctx, self.reduction)[:, :, 0]

        def of_step(x: Tensor, x_next: Tensor, k: Tensor) -> Tensor:
            return log_prob(replace(pairs, x=x, x_next=x_next, k=k), ctx, self.reduction)[:, :, 0]

        total = pairs.x.new_zeros(len(pairs), 2)
        for at in range(count):
            here = slice(at, at + 1)
            step = pairs.x[:, :, here], pairs.x_next[:, :, here], pairs.k[:, here]
            total = total + checkpoint(of_step, *step, use_reentrant=False)
        return total

    def state_dict(self) -> dict[str, Any]:
        return self._baseline.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._baseline.load_state_dict(state)


def squares(log_ratio: Tensor, advantages: Tensor, scale: float) -> Tensor:
    """Return (scale (log r_1 - log r_2) - (A_1 - A_2))^2 of each pair, (N,), of log-ratios and advantages (N, 2)."""
    return (scale * (log_ratio[:, 0] - log_ratio[:, 1]) - (advantages[:, 0] - advantages[:, 1])) ** 2
