"""REBEL: regress the difference of two walks' log-likelihoods to the difference of what they are worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alignkit.advantage import PromptTracker, of_terms, over_batch
from alignkit.interfaces import Algorithm, Context
from alignkit.records import Batch, Rows
from alignkit_baselines.pairs import Pairs, log_prob, scored_pairs


@dataclass(frozen=True)
class Compared(Rows):
    """Pairs of whole walks, N rows."""

    pairs: Pairs
    advantages: Tensor
    """(N, 2)."""
    old_log_prob: Tensor | None = None
    """(N, 2) of both walks, the sum over steps, under the policy that drew them."""


@dataclass
class REBEL(Algorithm[Compared, Compared]):
    """REBEL (Gao et al. 2024, arXiv 2404.16767), as its authors apply it to consistency models.

    Two walks of a prompt start from two noises. What the update adds to the log-likelihood of one, less what it adds
    to that of the other, is regressed to the difference of their advantages; nothing is clipped.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"stochastic_steps"})
    takes_advantages: ClassVar[bool] = True

    pairs: int = 2
    """Pairs of walks of each prompt in a round."""
    scale: float = 1.0
    """What the difference of log-likelihoods is multiplied with (the code's `rebel_lr`; the paper divides by eta)."""
    baseline: Literal["prompt", "batch"] = "prompt"
    """What a reward is measured by: the last rewards of the same prompt, or those of the round."""
    buffer_size: int = 32
    """Rewards of a prompt that are kept."""
    min_count: int = 16
    """Rewards a prompt must have got before it is measured by its own; until then it is by those of the round."""
    reduction: Literal["mean", "sum"] = "mean"
    """The log-probability over latent dimensions. The papers write the sum, their code takes the mean."""
    inner_epochs: int = 1
    """Times that a round is learned from."""

    def __post_init__(self) -> None:
        for name in ("pairs", "min_count", "inner_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.scale <= 0:
            raise ValueError(f"scale is {self.scale}, expected more than 0")
        if self.buffer_size < self.min_count:
            raise ValueError(f"buffer_size is {self.buffer_size}, expected at least min_count = {self.min_count}")
        self._tracker = PromptTracker(self.buffer_size, self.min_count)

    def collect(self, batch: Batch, ctx: Context) -> Compared:
        pairs, scores = scored_pairs(batch, self.pairs, shared_noise=False, ctx=ctx)
        texts = [e.text for e in batch.examples for _ in range(2 * self.pairs)]

        def measured(rewards: Tensor, name: str) -> Tensor:
            if self.baseline == "prompt":
                return self._tracker.advantages(texts, rewards, ctx, name)
            return over_batch(rewards, ctx)

        advantages = of_terms(scores, ctx, measured)
        compared = Compared(pairs, advantages.view(-1, 2))
        return compared.select((~compared.advantages.isnan().any(1)).nonzero()[:, 0])

    def updates(self, collected: Compared, ctx: Context) -> Iterator[Compared]:
        """Inner epochs over the pairs in random order, in parts of nearly `ctx.rows_per_update` pairs."""
        rows, size = collected.shuffled(ctx.generator), ctx.rows_per_update
        if not len(rows):
            return
        # Asked for again instead of kept from the walk: at the first update nothing has been added, exactly.
        with torch.no_grad():
            old = torch.cat([self._log_prob(part.pairs, ctx) for part in rows.even_split(size)])
        rows = replace(rows, old_log_prob=old)
        for epoch in range(self.inner_epochs):
            yield from (rows.shuffled(ctx.generator) if epoch else rows).even_split(size)

    def loss(self, rows: Compared, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        assert rows.old_log_prob is not None
        added = self._log_prob(rows.pairs, ctx) - rows.old_log_prob
        loss = squares(added, rows.advantages, self.scale).mean()
        gained, worth = added[:, 0] - added[:, 1], rows.advantages[:, 0] - rows.advantages[:, 1]
        return loss, {"log_ratio_size": added.abs().mean(), "agreement": (gained * worth > 0).float().mean()}

    def _log_prob(self, pairs: Pairs, ctx: Context) -> Tensor:
        """(N, 2) of whole walks. One step after the other, each computed again for its gradient: the loss is of their
        sum, and the graphs of all steps of 50 would not fit together."""
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
        return self._tracker.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._tracker.load_state_dict(state)


def squares(added: Tensor, advantages: Tensor, scale: float) -> Tensor:
    """(scale (added_1 - added_2) - (A_1 - A_2))^2 of each pair, (N, 2) both, (N,)."""
    return (scale * (added[:, 0] - added[:, 1]) - (advantages[:, 0] - advantages[:, 1])) ** 2
