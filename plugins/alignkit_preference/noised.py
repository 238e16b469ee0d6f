"""Pairs of latents under the same noise, and the errors of the network in predicting it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from alignkit import Context, Policy, Prompt, Rows, diffusion
from alignkit.records import PreferencePairs

Space = Literal["noise", "velocity", "clean"]


@dataclass(frozen=True)
class LatentPairs(Rows):
    """Pairs of latents of one text each, N rows."""

    winner: Tensor
    """(N, *S) the preferred one."""
    loser: Tensor
    """(N, *S)"""
    prompt: Prompt


@dataclass(frozen=True)
class NoisedPairs(Rows):
    """Pairs with the noise and the time of one update, the same for both members."""

    pairs: LatentPairs
    noise: Tensor
    """(N, *S) unit normal."""
    t: Tensor
    """(N,) times as the network takes them."""


def encode_pairs(
    pairs: Iterable[PreferencePairs], ctx: Context, flip: bool = False, empty_prompts: float = 0.0
) -> LatentPairs:
    """Encode pairs of images. With `flip` each image is mirrored with probability 1/2.

    A share `empty_prompts` of the texts is replaced by the empty one.
    """
    winners: list[Tensor] = []
    losers: list[Tensor] = []
    texts: list[str] = []
    for some in pairs:
        for images, latents in ((some.winners, winners), (some.losers, losers)):
            mirror = torch.rand(len(images), generator=ctx.generator) < 0.5 * flip
            images = torch.where(diffusion.columns(mirror, images), images.flip(3), images)
            latents.append(ctx.policy.encode_images(images))
        dropped = (torch.rand(len(some.captions), generator=ctx.generator) < empty_prompts).tolist()
        texts += ["" if drop else text for text, drop in zip(some.captions, dropped, strict=True)]
    return LatentPairs(torch.cat(winners), torch.cat(losers), ctx.policy.encode(texts))


def noised(pairs: LatentPairs, times: Tensor, ctx: Context) -> NoisedPairs:
    """Choose one of `times` (K,) and one noise for each pair; both members share them, so only the images differ."""
    chosen = torch.randint(len(times), (len(pairs),), generator=ctx.generator)
    return NoisedPairs(pairs, ctx.noise(len(pairs)), times[chosen].to(pairs.winner.device))


def errors(rows: NoisedPairs, policy: Policy, space: Space = "noise", zero_terminal_snr: bool = False) -> Tensor:
    """Return the policy's mean squared errors on the noised pairs, over latent dimensions, (N, 2), the winner's first.

    In the space of noise it is the error of the noise that the prediction implies, and so the same for every prediction
    type: (alpha / sigma)^2 times that of the clean latent. The error of the velocity is 1 / sigma^2 times that.
    """
    count = len(rows)
    clean, noise, t = torch.cat([rows.pairs.winner, rows.pairs.loser]), rows.noise.repeat(2, 1, 1, 1), rows.t.repeat(2)
    prompt = rows.pairs.prompt.select(torch.arange(count).repeat(2))
    alpha, sigma = policy.schedule(t)  # the schedule by which the output is converted
    x = diffusion.add_noise(clean, noise, *(rescaled(policy, t) if zero_terminal_snr else (alpha, sigma)))
    # The conditional prediction, or that at the one guidance scale for which the network was distilled.
    predicted = policy.denoise(x, t, prompt, None if policy.guidance_embedded else torch.ones_like(alpha))
    if space == "noise":
        difference = diffusion.to_noise(predicted, x, alpha, sigma) - noise
    else:
        difference = predicted - clean
        difference = difference / diffusion.columns(sigma, difference) if space == "velocity" else difference
    return difference.square().flatten(1).mean(1).view(2, count).T


def rescaled(policy: Policy, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma (N,) at times t (N,) of the schedule rescaled so that its last time is pure noise.

    Algorithm 1 of Lin et al. 2024 (arXiv 2305.08891), for schedules with alpha^2 + sigma^2 = 1.
    """
    first, last = policy.schedule(policy.times()[[0, -1]].to(t.device))[0]
    alpha = (policy.schedule(t)[0] - last) * first / (first - last)
    return alpha, (1 - alpha**2).sqrt()


def margin(now: Tensor, before: Tensor) -> Tensor:
    """Return how much more the winner's error fell than the loser's, (N,), of errors (N, 2) now and before."""
    gained = before - now
    return gained[:, 0] - gained[:, 1]


def metrics(now: Tensor, before: Tensor) -> dict[str, Tensor]:
    """Return the metrics of both methods: errors, their change by training, and how often the winner gained more."""
    gain = margin(now, before)
    return {
        "margin": gain.mean(),
        # Equal gains, as before the first update, prefer neither side.
        "implicit_accuracy": ((gain > 0).float() + 0.5 * (gain == 0)).mean(),
        "winner_error": now[:, 0].mean(),
        "loser_error": now[:, 1].mean(),
        "winner_error_change": (now - before)[:, 0].mean(),
        "loser_error_change": (now - before)[:, 1].mean(),
    }
