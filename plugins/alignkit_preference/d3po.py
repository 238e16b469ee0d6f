"""D3PO: direct preference optimisation of every step of two trajectories."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Lt
from torch import Tensor
from torch.nn import functional as F

from alignkit import Algorithm, Batch, Context, check_ranges
from alignkit_preference.trajectory_pairs import Pairs, collect_pairs, log_prob, winners_first


@dataclass
class D3PO(Algorithm[Pairs, Pairs]):
    """Direct preference for denoising diffusion policy optimisation (Yang et al. 2023, arXiv 2311.13231).

    Of two trajectories of a prompt the one with the better image is preferred, at every stochastic step; each
    likelihood is relative to that under the model before training. Equal rewards carry no preference and make no pair.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"stochastic_steps"})

    pairs: Annotated[int, Ge(1)] = 2
    """Pairs of trajectories of each prompt in a round."""
    beta: Annotated[float, Gt(0)] = 0.1
    """Factor of the log-ratios (D3PO's code)."""
    clip_range: Annotated[float, Gt(0), Lt(1)] = 0.1
    """Distance from 1 at which likelihood ratios are clipped (D3PO's code; 0.2 before a correction by its authors)."""
    shared_noise: bool = True
    """Start both trajectories of a pair from the same initial noise, as in D3PO's code."""
    reduction: Literal["mean", "sum"] = "mean"
    """The log-probability over latent dimensions. The paper writes the sum, its code takes the mean; `beta` and
    `clip_range` belong to that."""
    inner_epochs: Annotated[int, Ge(1)] = 1
    """Passes over the steps of a round."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def collect(self, batch: Batch, ctx: Context) -> Pairs:
        """Sample pairs, and take every step as a row, the better trajectory first."""
        return winners_first(collect_pairs(batch, self.pairs, self.shared_noise, ctx)[0], ctx).by_step()

    def updates(self, collected: Pairs, ctx: Context) -> Iterator[Pairs]:
        """Yield the steps in random order, in parts of nearly `ctx.rows_per_update` pairs, once each inner epoch."""
        for _ in range(self.inner_epochs):
            yield from collected.shuffled(ctx.generator).even_split(ctx.rows_per_update)

    def loss(self, rows: Pairs, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return step_preference(rows, self.beta, self.clip_range, ctx, self.reduction)


def step_preference(
    rows: Pairs, beta: float, clip_range: float, ctx: Context, reduction: str = "mean"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean loss over pairs of single steps, the winner first, and metrics."""
    now = log_prob(rows, ctx, reduction)
    with ctx.policy.reference():
        before = log_prob(rows, ctx, reduction)
    log_ratio = (now - before)[:, :, 0]
    loss = preference_loss(log_ratio, beta, clip_range).mean()
    margin = log_ratio[:, 0] - log_ratio[:, 1]
    metrics = {
        "margin": margin.mean(),
        "implicit_accuracy": (margin > 0).float().mean(),
        "clip_fraction": ((log_ratio.exp() - 1).abs() > clip_range).float().mean(),
        "log_ratio_size": log_ratio.abs().mean(),
    }
    return loss, metrics


def preference_loss(log_ratio: Tensor, beta: float, clip_range: float) -> Tensor:
    """Return -log sigmoid(beta (ln r_winner - ln r_loser)) (N,) of clamped ratios; log_ratio (N, 2), winner first."""
    ratio = log_ratio.exp().clamp(1 - clip_range, 1 + clip_range).log()
    return -F.logsigmoid(beta * (ratio[:, 0] - ratio[:, 1]))
