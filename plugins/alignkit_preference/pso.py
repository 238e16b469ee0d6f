"""Pairwise sample optimisation of models that were distilled to few steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from alignkit.distillation import Distillation, Noised
from alignkit.interfaces import Algorithm, Context, Sampler
from alignkit.records import Batch, Prompt, Rows
from alignkit_baselines.d3po import step_preference, winners_first
from alignkit_baselines.pairs import Pairs, collect_pairs
from alignkit_preference.noised import LatentPairs, NoisedPairs, encode_pairs, errors, margin, metrics, noised


@dataclass(frozen=True)
class Collected:
    """One round: pairs of the one kind or the other, and captioned latents where the distillation is switched on."""

    walks: Pairs | None
    """Pairs of single steps, the better walk first (online)."""
    given: LatentPairs | None
    """Pairs of latents, the preferred one first (offline)."""
    images: Tensor | None = None
    captions: Prompt | None = None


@dataclass(frozen=True)
class PairRows(Rows):
    """One update, N rows of each that is there."""

    walks: Pairs | None
    given: NoisedPairs | None
    noised: Noised | None = None
    """Captioned latents to stay consistent on."""


@dataclass
class PSO(Algorithm[Collected, PairRows]):
    """Pairwise sample optimisation (Miao et al. 2024, arXiv 2410.03190, ICLR 2025).

    Preferences of distilled models, at the few steps that they are drawn with. Online, two walks of a text are drawn
    and compared by the reward, and the better is made more likely at every stochastic step. Offline, pairs of images
    are given, and of both the model tells the noise at the times of its steps: the winner is what it should learn to
    draw, the loser best an image that it drew itself.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"stochastic_steps"})

    mode: Literal["online", "offline"] = "online"
    """Pairs are drawn and compared by the reward, or given as [data] pairs."""
    beta: float | None = None
    """What the preference is multiplied with; left out: 50 online, 5 offline (the authors' code)."""
    pairs: int = 1
    """Online: pairs of walks of each text in a round."""
    clip_range: float = 0.1
    """Online: how far a ratio of likelihoods may leave 1 (the code)."""
    reduction: Literal["mean", "sum"] = "mean"
    """Online: the log-probability over latent dimensions; the code takes the mean."""
    shared_noise: bool = False
    """Online: whether both walks of a pair start from the same noise. In the code they do not, whatever it says."""
    inner_epochs: int = 1
    """Times that a round is learned from."""
    objective: Literal["sigmoid", "hinge"] = "sigmoid"
    """Offline: the preference beside the model before training, or a margin of 1 / beta between the errors, without
    it (the code's second loss)."""
    prior_weight: float = 0.5
    """Offline: weight of the loser's error, which keeps what the model draws by itself (the code)."""
    distillation_weight: float = 0.0
    """Weight of latent consistency distillation beside it (LaSRO's baseline has it); needs a teacher and images. 0
    leaves it out."""
    ode_steps: int = 50
    """Solver steps of the distillation term; must be what the model was distilled with."""
    guidance_scale_min: float = 6.0
    """Smallest guidance scale of the teacher in the distillation term."""
    guidance_scale_max: float = 16.0
    """Largest guidance scale of the teacher in the distillation term."""

    def __post_init__(self) -> None:
        for name in ("pairs", "inner_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.beta is not None and self.beta <= 0:
            raise ValueError(f"beta is {self.beta}, expected more than 0")
        if not 0 < self.clip_range < 1:
            raise ValueError(f"clip_range is {self.clip_range}, expected more than 0 and less than 1")
        for name in ("prior_weight", "distillation_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more")
        needs = {"stochastic_steps"} if self.mode == "online" else {"pairs"}
        if self.distillation_weight:
            needs |= {"teacher", "images"}
        self.needs = frozenset(needs)  # type: ignore[misc]
        self.uses_rewards = self.mode == "online"  # type: ignore[misc]
        self._beta = self.beta if self.beta is not None else {"online": 50.0, "offline": 5.0}[self.mode]
        self._distillation = Distillation(self.ode_steps, self.guidance_scale_min, self.guidance_scale_max)

    def check(self, sampler: Sampler) -> None:
        if self.distillation_weight:
            self._distillation.check(sampler)

    # collect: pairs that are drawn, or given

    def collect(self, batch: Batch, ctx: Context) -> Collected:
        walks = given = None
        if self.mode == "online":
            walks = winners_first(collect_pairs(batch, self.pairs, self.shared_noise, ctx), ctx).by_step()
        else:
            given = encode_pairs(batch.pairs, ctx)
        if not self.distillation_weight or batch.images is None:
            return Collected(walks, given)
        return Collected(walks, given, ctx.policy.encode_images(batch.images), ctx.policy.encode(batch.captions))

    # the updates

    def updates(self, collected: Collected, ctx: Context) -> Iterator[PairRows]:
        """Inner epochs over steps in random order, or over the given pairs with noise drawn anew."""
        for _ in range(self.inner_epochs):
            if collected.walks is not None:
                for part in collected.walks.shuffled(ctx.generator).even_split(ctx.rows_per_update):
                    yield self._with_images(PairRows(part, None), collected, ctx)
            if collected.given is not None:
                rows = PairRows(None, noised(collected.given, ctx.sampler.grid(ctx.policy), ctx))
                yield self._with_images(rows, collected, ctx)

    def _with_images(self, rows: PairRows, collected: Collected, ctx: Context) -> PairRows:
        """As many captioned latents as there are rows, where the distillation term is switched on."""
        if collected.images is None or collected.captions is None:
            return rows
        index = torch.arange(len(rows)) % len(collected.images)
        latents = collected.images[index.to(collected.images.device)]
        return replace(rows, noised=self._distillation.draw(latents, collected.captions.select(index), ctx))

    def loss(self, rows: PairRows, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        if rows.walks is not None:
            loss, found = step_preference(rows.walks, self._beta, self.clip_range, ctx, self.reduction)
        else:
            assert rows.given is not None  # the one or the other
            loss, found = self._offline(rows.given, ctx)
        if rows.noised is not None:
            assert ctx.teacher is not None  # needs "teacher"
            distillation = self._distillation.loss(ctx.policy, ctx.teacher, rows.noised).mean()
            loss, found["distillation_loss"] = loss + self.distillation_weight * distillation, distillation
        return loss, found

    def _offline(self, rows: NoisedPairs, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        now = errors(rows, ctx.policy)
        with ctx.policy.reference():
            before = errors(rows, ctx.policy)
        preference = sigmoid_loss(now, before, self._beta) if self.objective == "sigmoid" else hinge(now, self._beta)
        return (preference + self.prior_weight * now[:, 1]).mean(), metrics(now, before)


def sigmoid_loss(now: Tensor, before: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta ((m_w_ref - m_l_ref) - (m_w - m_l))) of errors m (N, 2), the winner's first, (N,)."""
    return -F.logsigmoid(beta * margin(now, before))


def hinge(now: Tensor, beta: float) -> Tensor:
    """max(0, 1 - beta (m_l - m_w)) of errors m (N, 2), the winner's first, (N,)."""
    return (1 - beta * (now[:, 1] - now[:, 0])).clamp(min=0)
