"""Pairwise sample optimisation of models that were distilled to few steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt
from torch import Tensor
from torch.nn import functional as F

from alignkit import Algorithm, Batch, Context, Rows, check_ranges
from alignkit_preference.d3po import step_preference
from alignkit_preference.noised import LatentPairs, NoisedPairs, encode_pairs, errors, margin, metrics, noised
from alignkit_preference.trajectory_pairs import Pairs, collect_pairs, winners_first


@dataclass
class PSO(Algorithm[Pairs | LatentPairs, Rows]):
    """Pairwise sample optimisation (Miao et al. 2024, arXiv 2410.03190, ICLR 2025).

    Preferences of distilled models, at the few steps that they are sampled with. Online, two trajectories of a text are
    sampled and compared by the reward, and the better is made more likely at every stochastic step. Offline, pairs of
    images are given, and for both the model predicts the noise at the times of its steps: the winner is a target, the
    loser best an image that the model sampled itself.
    """

    mode: Literal["online", "offline"] = "online"
    """Sample pairs and compare them by the reward, or take given ones from [data] pairs."""
    beta: Annotated[float, Gt(0)] | None = None
    """Factor of the preference; left out: 50 online, 5 offline (the authors' code)."""
    pairs: Annotated[int, Ge(1)] = 1
    """Online: pairs of trajectories of each text in a round."""
    clip_range: Annotated[float, Gt(0), Lt(1)] = 0.1
    """Online: distance from 1 at which likelihood ratios are clipped (the code)."""
    reduction: Literal["mean", "sum"] = "mean"
    """Online: the log-probability over latent dimensions; the code takes the mean."""
    shared_noise: bool = False
    """Online: start both trajectories of a pair from the same noise. The code does not, whatever its comment says."""
    inner_epochs: Annotated[int, Ge(1)] = 1
    """Passes over the pairs of a round."""
    objective: Literal["sigmoid", "hinge"] = "sigmoid"
    """Offline: the preference relative to the model before training, or, without that model, a margin of 1 / beta
    between the errors (the code's second loss)."""
    prior_weight: Annotated[float, Ge(0)] = 0.5
    """Offline: weight of the loser's error, which keeps what the model samples by itself (the code)."""

    def __post_init__(self) -> None:
        check_ranges(self)
        self._beta = self.beta if self.beta is not None else {"online": 50.0, "offline": 5.0}[self.mode]

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"stochastic_steps"} if self.mode == "online" else {"pairs"})

    @property
    def uses_rewards(self) -> bool:
        return self.mode == "online"

    def collect(self, batch: Batch, ctx: Context) -> Pairs | LatentPairs:
        """Sample pairs and take every step as a row, the better trajectory first; or encode the given pairs."""
        if self.mode == "offline":
            return encode_pairs(batch.pairs, ctx)
        return winners_first(collect_pairs(batch, self.pairs, self.shared_noise, ctx)[0], ctx).by_step()

    def updates(self, collected: Pairs | LatentPairs, ctx: Context) -> Iterator[Rows]:
        """Yield steps in random order, or the given pairs with new noise, once each inner epoch."""
        for _ in range(self.inner_epochs):
            if isinstance(collected, Pairs):
                yield from collected.shuffled(ctx.generator).even_split(ctx.rows_per_update)
            else:
                yield noised(collected, ctx.sampler.grid(ctx.policy), ctx)

    def loss(self, rows: Rows, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        if isinstance(rows, Pairs):
            return step_preference(rows, self._beta, self.clip_range, ctx, self.reduction)
        assert isinstance(rows, NoisedPairs)  # the one or the other
        return self._offline(rows, ctx)

    def _offline(self, rows: NoisedPairs, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        now = errors(rows, ctx.policy)
        with ctx.policy.reference():
            before = errors(rows, ctx.policy)
        preference = sigmoid_loss(now, before, self._beta) if self.objective == "sigmoid" else hinge(now, self._beta)
        return (preference + self.prior_weight * now[:, 1]).mean(), metrics(now, before)


def sigmoid_loss(now: Tensor, before: Tensor, beta: float) -> Tensor:
    """Return -log sigmoid(beta ((m_w_ref - m_l_ref) - (m_w - m_l))) of errors m (N, 2), the winner's first, (N,)."""
    return -F.logsigmoid(beta * margin(now, before))


def hinge(now: Tensor, beta: float) -> Tensor:
    """Return max(0, 1 - beta (m_l - m_w)) of errors m (N, 2), the winner's first, (N,)."""
    return (1 - beta * (now[:, 1] - now[:, 0])).clamp(min=0)
