"""Diffusion-DPO: direct preference optimisation on pairs of images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Le
from torch import Tensor
from torch.nn import functional as F

from alignkit import Algorithm, Batch, Context, PolicyFacts, Sampler, check_ranges
from alignkit.errors import ConfigError
from alignkit_preference.noised import (
    LatentPairs,
    NoisedPairs,
    Space,
    encode_pairs,
    errors,
    margin,
    metrics,
    noised,
    rescaled,
)


@dataclass
class DiffusionDPO(Algorithm[LatentPairs, NoisedPairs]):
    """Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908, Eq. 14), as in its authors' code.

    Of two images of a text one is preferred. Both get the same noise, and the model learns to predict it better in the
    preferred one and worse in the other, each relative to the model before training. It learns from given pairs: no
    image is generated and no reward is computed, except to measure the result.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs"})
    uses_rewards: ClassVar[bool] = False

    beta: Annotated[float, Gt(0)] = 5000.0
    """Factor of half the difference of errors (the authors' code; diffusers' script has no half, and 2500). It includes
    the paper's factors beta, T and omega and the number of latent dimensions."""
    grid_steps: Annotated[int, Ge(0)] = 0
    """Learn at the times at which the run's sampler takes this many steps: 4 for turbo models. 0: at all times that the
    model was made for, those of its distillation if the sampler is lcm, else the whole schedule."""
    zero_terminal_snr: bool = False
    """Noise the images by a schedule rescaled to end in pure noise, where turbo models begin (as the code does for
    them)."""
    empty_prompts: Annotated[float, Ge(0), Le(1)] | None = None
    """Share of texts that are replaced by the empty one. Left out: 0.2 (the code) where guidance takes a pass without
    text, else 0."""
    flip: bool = True
    """Mirror each image, those of a pair independently, every second time (the code). Wrong where texts say left
    and right."""
    space: Space = "noise"
    """Space of the errors: that of the noise (paper), whatever the network predicts, of the velocity or of the clean
    latent. diffusers' script takes the velocity for models that predict it."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.zero_terminal_snr and self.space != "noise":
            raise ValueError(
                f'space: found "{self.space}", expected "noise" with zero_terminal_snr: images are then noised '
                "by another schedule than the network's, under which only its prediction of the noise is valid"
            )

    def check(self, sampler: Sampler, facts: PolicyFacts) -> None:
        try:
            self._on_grid(sampler)
        except ValueError as error:
            raise ConfigError(f"algorithm.grid_steps: the sampler has no grid of so many steps: {error}") from error

    def _on_grid(self, sampler: Sampler) -> Sampler | None:
        """Return the sampler with the times to learn at; None for the whole schedule."""
        if self.grid_steps:
            return replace(sampler, num_steps=self.grid_steps)
        return replace(sampler, num_steps=steps) if (steps := sampler.distilled_steps()) else None

    def times(self, ctx: Context) -> Tensor:
        """Return the times to learn at, (K,)."""
        sampler = self._on_grid(ctx.sampler)
        return ctx.policy.times() if sampler is None else sampler.grid(ctx.policy)

    def setup(self, ctx: Context) -> None:
        times = self.times(ctx).to(ctx.policy.device)
        if not self.grid_steps or self.space != "noise":
            return
        alpha = (rescaled(ctx.policy, times) if self.zero_terminal_snr else ctx.policy.schedule(times))[0]
        if bool((alpha == 0).all()):
            raise ConfigError(
                f"algorithm.grid_steps: found {self.grid_steps}, expected more: at the only time to learn at, "
                "both images are the same noise"
            )
        if not self.zero_terminal_snr and bool((alpha == 0).any()):
            ctx.warn(
                "at the first of algorithm.grid_steps the input is pure noise, which leaves nothing to learn; set "
                'algorithm.space = "velocity" to learn there too'
            )

    def collect(self, batch: Batch, ctx: Context) -> LatentPairs:
        guided = ctx.policy.guidance_scale > 1 and not ctx.policy.guidance_embedded
        share = self.empty_prompts if self.empty_prompts is not None else 0.2 * guided
        return encode_pairs(batch.pairs, ctx, self.flip, share)

    def updates(self, collected: LatentPairs, ctx: Context) -> Iterator[NoisedPairs]:
        """Yield one update on all pairs of the round."""
        yield noised(collected, self.times(ctx), ctx)

    def loss(self, rows: NoisedPairs, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        now = errors(rows, ctx.policy, self.space, self.zero_terminal_snr)
        with ctx.policy.reference():
            before = errors(rows, ctx.policy, self.space, self.zero_terminal_snr)
        return preference_loss(now, before, self.beta).mean(), metrics(now, before)


def preference_loss(now: Tensor, before: Tensor, beta: float) -> Tensor:
    """Return -log sigmoid(-beta/2 ((m_w - m_l) - (m_w_ref - m_l_ref))) of errors m (N, 2), the winner's first, (N,)."""
    return -F.logsigmoid(beta / 2 * margin(now, before))
