"""The losses against what the authors' code computes, on the same tensors.

That code is written down here a second time, by what it does and with its own order of operations: samples and steps
one by one, probabilities where ours has log-odds, its conventions of sign. Where it differs from its paper or from its
own intention, the difference is shown. LaSRO and GORS-LCM have no published code.
"""

from __future__ import annotations

import math
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from alignkit import diffusion
from alignkit.advantage import PromptTracker
from alignkit.distillation import pseudo_huber
from alignkit.records import Transition
from alignkit_ddpo.algorithm import clipped
from alignkit_preference import d3po, diffusion_dpo, pso
from alignkit_preference.rebel import squares
from alignkit_rg_lcd.preference import margins, preference_loss
from alignkit_sdpo.algorithm import pair_loss
from alignkit_sdpo.dense import by_similarity, discounted_returns, queried_steps

COUNT = 64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# What DDPO, SDPO, REBEL and D3PO share


def test_the_log_probability_of_a_step() -> None:
    """ddpo-pytorch, ddim_with_logprob: the density of a normal distribution, its mean over all but the first axis."""
    x_next, mean, std = normal(COUNT, 4, 8, 8), normal(COUNT, 4, 8, 8, seed=1), normal(COUNT, seed=2).abs() + 0.1
    wide = std.view(-1, 1, 1, 1)
    density = -((x_next - mean) ** 2) / (2 * wide**2) - torch.log(wide) - math.log(math.sqrt(2 * math.pi))
    published = density.mean(dim=tuple(range(1, density.ndim)))
    found = Transition(mean, std, mean).log_prob(x_next, "mean")
    assert torch.allclose(found.double(), published, rtol=1e-5)
    # In the papers it is the density itself, the sum.
    assert torch.allclose(Transition(mean, std, mean).log_prob(x_next, "sum").double(), 256 * published, rtol=1e-5)


def test_the_advantages_of_a_prompt() -> None:
    """ddpo-pytorch, PerPromptStatTracker: the last rewards of each prompt, with those of the round in them."""
    rng, tracker, stats = np.random.default_rng(0), PromptTracker(8, 4), dict[str, deque[float]]()
    ctx: Any = SimpleNamespace(gather=lambda tensor: tensor, log=lambda **_: None)
    for _ in range(12):
        texts = [f"prompt {i}" for i in rng.integers(0, 5, size=10)]
        rewards = rng.normal(size=10)
        published = np.empty_like(rewards)
        for text in set(texts):
            of_text = rewards[np.array(texts) == text]
            buffer = stats.setdefault(text, deque(maxlen=8))
            buffer.extend(of_text)
            known = np.array(buffer) if len(buffer) >= 4 else rewards
            published[np.array(texts) == text] = (of_text - known.mean()) / (known.std() + 1e-6)
        found = tracker.advantages(texts, torch.tensor(rewards), ctx)
        assert found.tolist() == pytest.approx(published.tolist(), rel=1e-4, abs=1e-5)


# The losses


def test_ddpo() -> None:
    advantage, log_prob, old = normal(COUNT), normal(COUNT, seed=1), normal(COUNT, seed=1) + 3e-4 * normal(COUNT)
    losses = []
    for a, now, before in zip(advantage, log_prob, old, strict=True):
        a = a.clip(-5, 5)
        ratio = torch.exp(now - before)
        losses.append(max(-a * ratio, -a * torch.clip(ratio, 1 - 1e-4, 1 + 1e-4)))
    assert torch.allclose(clipped(log_prob - old, advantage.clamp(-5, 5), 1e-4), torch.stack(losses))


def test_sdpo() -> None:
    """Each log-probability is clipped around its old one, and the differences are taken of those."""
    advantage, old, step = normal(COUNT, 2), normal(COUNT, 2, seed=1), torch.arange(COUNT) % 50
    log_prob, decay, eps = old + 2e-4 * normal(COUNT, 2, seed=2), 0.99, 1e-4
    losses = []
    for a, now, before, i in zip(advantage, log_prob, old, step.tolist(), strict=True):
        near = [torch.clip(n, b - eps, b + eps) for n, b in zip(now, before, strict=True)]
        free = decay**i * (now[0] - before[0] - (now[1] - before[1])) - (a[0] - a[1])
        held = decay**i * (near[0] - before[0] - (near[1] - before[1])) - (a[0] - a[1])
        losses.append(max(free**2, held**2))
    found = pair_loss(log_prob - old, advantage, decay ** step.double(), eps)
    assert torch.allclose(found, torch.stack(losses), rtol=1e-9)


def test_the_dense_rewards_of_sdpo() -> None:
    """Its code takes the anchor from all steps; the paper and ours take it from those between the ends."""
    clean, scored = normal(COUNT, 10, 4, 4, 4), normal(COUNT, 10, seed=1)
    step = queried_steps(clean, "three", "adaptive", torch.Generator())
    found = by_similarity(clean, step, scored.gather(1, step).float())
    at_an_end = 0
    for latents, rewards, own, queried in zip(clean.flatten(2), scored, found, step.tolist(), strict=True):
        first, last = (F.cosine_similarity(latents, latents[[end]]) for end in (0, -1))
        anchor = int((first + last).argmin())
        if anchor in (0, 9):
            at_an_end += 1
            continue
        assert queried == [0, anchor, 9]
        middle = F.cosine_similarity(latents, latents[[anchor]])
        # Ours takes a negative likeness for none; there it turns the weight round.
        first, middle, last = (likeness.clamp(min=0) for likeness in (first, middle, last))
        published = (first * rewards[0] + middle * rewards[anchor] + last * rewards[9]) / (first + middle + last)
        published[0], published[-1] = rewards[0], rewards[9]
        published[anchor] = rewards[anchor]
        like_one = (first + middle + last) > 1e-4
        assert torch.allclose(own.double()[like_one], published[like_one], rtol=1e-3, atol=1e-3)
    assert at_an_end < COUNT / 2


def test_the_returns_of_sdpo() -> None:
    rewards = normal(COUNT, 10)
    published = rewards.clone()
    for i in reversed(range(9)):
        published[:, i] = rewards[:, i] + 0.99 * published[:, i + 1]
    assert torch.allclose(discounted_returns(rewards, 0.99), published)


def test_rebel_at_one_pair_and_its_fault_at_several() -> None:
    """rlcm: the ratios of all steps and all pairs of a batch are added up; with one pair that is its own sum."""
    ratios, advantages = 1e-3 * normal(COUNT, 2, 8), normal(COUNT, 2, seed=1)  # pair, trajectory, step

    def published(ratios: Tensor, advantages: Tensor) -> Tensor:
        added = ratios.sum((0, 2))  # where (2, 0) would leave the pairs apart
        return (((added[0] - added[1]) - (advantages[:, 0] - advantages[:, 1])) ** 2).mean()

    found = squares(ratios.sum(2), advantages, 1.0)
    alone = torch.stack([published(ratios[i : i + 1], advantages[i : i + 1]) for i in range(COUNT)])
    assert torch.allclose(found, alone)
    assert not torch.allclose(found.mean(), published(ratios, advantages), rtol=1e-3)


@pytest.mark.parametrize(("beta", "eps"), [(0.1, 0.1), (50, 0.1)])
def test_d3po_and_online_pso(beta: float, eps: float) -> None:
    """The human's choice is a vector of signs, (1, -1) or (-1, 1), and (0, 0) on a tie; PSO has beta 50."""
    now, before, rewards = (
        normal(COUNT, 2),
        normal(COUNT, 2) + 0.05 * normal(COUNT, 2, seed=1),
        normal(COUNT, 2, seed=2),
    )
    rewards[0] = 1.0  # a tie
    losses = []
    for of, to, r in zip(now, before, rewards, strict=True):
        signs = torch.sign(torch.stack([r[0] - r[1], r[1] - r[0]]))
        ratio = torch.clamp(torch.exp(of - to), 1 - eps, 1 + eps)
        losses.append(-torch.log(torch.sigmoid(beta * (torch.log(ratio) * signs).sum())))
    log_ratio = now - before
    winners_first = torch.where((rewards[:, 0] < rewards[:, 1])[:, None], log_ratio.flip(1), log_ratio)
    found = d3po.preference_loss(winners_first, beta, eps)
    assert torch.allclose(found[1:], torch.stack(losses)[1:])
    # A tie counts as ln 2 without a gradient there; here it makes no pair.
    assert float(losses[0]) == pytest.approx(math.log(2))


def test_diffusion_dpo() -> None:
    """The batch holds all winners and then all losers, each with the mean square of its error."""
    output, reference, target = (normal(2 * COUNT, 4, 8, 8, seed=seed) for seed in range(3))
    model_losses = (output - target).pow(2).mean(dim=[1, 2, 3])
    winners, losers = model_losses.chunk(2)
    ref_winners, ref_losers = (reference - target).pow(2).mean(dim=[1, 2, 3]).chunk(2)
    inside = -0.5 * 5000 * ((winners - losers) - (ref_winners - ref_losers))
    now, before = torch.stack([winners, losers], 1), torch.stack([ref_winners, ref_losers], 1)
    found = diffusion_dpo.preference_loss(now, before, 5000)
    assert torch.allclose(found.mean(), -1 * F.logsigmoid(inside).mean())
    # diffusers' script is the same with half the beta and no half in the formula.
    diffusers = -F.logsigmoid(2500 * ((ref_winners - ref_losers) - (winners - losers))).mean()
    assert torch.allclose(found.mean(), diffusers)


def test_offline_pso() -> None:
    """It weighs errors of the clean latent by alpha^2 / sigma^2, which makes them errors of the noise."""
    clean, noise, output, reference = (normal(2 * COUNT, 4, 8, 8, seed=seed) for seed in range(4))
    alpha, sigma = 0.6, 0.8
    x = alpha * clean + sigma * noise

    def weighted(eps: Tensor) -> Tensor:
        return (alpha / sigma) ** 2 * ((x - sigma * eps) / alpha - clean).pow(2).mean((1, 2, 3))

    (winners, losers), (ref_winners, ref_losers) = weighted(output).chunk(2), weighted(reference).chunk(2)
    published = -F.logsigmoid(5 * ((ref_winners - ref_losers) - (winners - losers))) + 0.5 * losers
    error = [(eps - noise).pow(2).mean((1, 2, 3)).view(2, -1).T for eps in (output, reference)]
    assert torch.allclose(pso.sigmoid_loss(error[0], error[1], 5) + 0.5 * error[0][:, 1], published)
    assert torch.allclose(pso.hinge(error[0], 5), F.relu(1 - 5 * (losers - winners)))


def test_rg_lcd() -> None:
    """Prediction, target and real image in this order; kl_div of a softmax for each of the three pairs."""
    proxy, expert, scale, expert_scale = normal(COUNT, 3) / 10, normal(COUNT, 3, seed=1) / 10, 14.3, 100.0
    published, paper = 0.0, 0.0
    for i, j in ((0, 1), (0, 2), (1, 2)):
        p = F.log_softmax(scale * proxy[:, [i, j]], dim=1)
        q = F.softmax(expert_scale * expert[:, [i, j]], dim=1)
        published += float(F.kl_div(p, q, reduction="batchmean"))
        paper += float(F.kl_div(q.log(), p.exp(), reduction="batchmean"))
    # Ours has the real image first.
    ours, expected = (scores[:, [2, 0, 1]] for scores in (scale * proxy, expert_scale * expert))
    for direction, value in (("forward", published), ("reverse", paper)):
        assert float(preference_loss(margins(ours), margins(expected), direction)) == pytest.approx(value)
    # Eq. 12 has the divergence the other way round than the code.
    assert abs(published - paper) > 0.1


def test_latent_consistency_distillation() -> None:
    """The script of LCM: its scalings at the boundary, and its distance."""
    t = torch.tensor([0, 19, 499, 999])
    scaled = t.double() * 10.0
    c_skip, c_out = 0.5**2 / (scaled**2 + 0.5**2), scaled / (scaled**2 + 0.5**2) ** 0.5
    for found, published in zip(diffusion.boundary_scalings(t), (c_skip, c_out), strict=True):
        assert torch.allclose(found.double(), published, rtol=1e-5)
    prediction, target, c = normal(COUNT, 4, 8, 8), normal(COUNT, 4, 8, 8, seed=1), 0.001
    published = torch.mean(torch.sqrt((prediction - target) ** 2 + c**2) - c)
    assert torch.allclose(pseudo_huber(prediction - target, c).mean(), published)
