"""What is told of a round: the true reward, and how the surrogate ranks what it has not learned from yet."""

from __future__ import annotations

import torch

from alignkit.interfaces import Context
from alignkit.records import Prompt
from alignkit_lasro.pairs import Scored, counterparts, extremes, rank_correlation


def measure_rewards(scored: Scored, own: int, samples: int, ctx: Context) -> None:
    """Log the true reward by step, and what the policy gained over the model before training from the same noises.

    Of each group's `samples` the first `own` are the policy's.
    """
    if own < samples:
        now, before = counterparts(scored, own, samples).rewards.unbind(1)
        if not bool((now - before).isnan().all()):
            ctx.log(reward_gain=(now - before).nanmean())
    for k in range(ctx.sampler.num_steps):
        found = scored.rewards[scored.step == k, :own]
        if not bool(found.isnan().all()):
            ctx.log(**{f"reward/step{k + 1}": found.nanmean()})


def measure_surrogate(scored: Scored, texts: Prompt, own: int, ctx: Context) -> tuple[bool, float | None]:
    """Log how the surrogate ranks the samples; `texts` are what `scored.text` counts.

    Returns whether it tells any two samples apart, and its rank correlation with the reward, None where there is none.
    """
    assert ctx.surrogate is not None
    prompt = texts.select(scored.text.repeat_interleave(scored.rewards.shape[1]))
    scores = ctx.surrogate.score(scored.latents.flatten(0, 1), prompt).view_as(scored.rewards)
    opinionated = bool((scores != scores[0, 0]).any())
    best, worst, labelled = extremes(scored.rewards.cpu())
    rows = torch.arange(len(scored))
    margin = scores[rows, best] - scores[rows, worst]
    ctx.log(surrogate_score=scores[:, :own].mean(), labelled_groups=labelled.float().mean())
    for k in range(ctx.sampler.num_steps):
        at = scored.step == k
        if bool(labelled[at].any()):
            ctx.log(**{f"pair_accuracy/step{k + 1}": (margin[at & labelled] > 0).float().mean()})
    if not bool(labelled.any()):
        return opinionated, None
    correlation = float(rank_correlation(scores, scored.rewards))
    if correlation != correlation:
        return opinionated, None
    ctx.log(pair_accuracy=(margin[labelled] > 0).float().mean(), rank_correlation=correlation)
    return opinionated, correlation
