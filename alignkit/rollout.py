"""The walk from noise to a clean latent, once for training, evaluation and sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignkit.interfaces import Policy, Sampler
from alignkit.records import Prompt


@dataclass(frozen=True)
class Rollout:
    """K steps of N walks; all float32."""

    states: Tensor
    """(N, K, *S) the latent before each step."""
    next_states: Tensor
    """(N, K, *S) the latent after it; the last is the sample."""
    clean: Tensor
    """(N, K, *S) the clean latent predicted at each step."""
    std: Tensor
    """(N, K) 0 where the step was deterministic."""


def run_sampler(policy: Policy, sampler: Sampler, prompt: Prompt, noises: Tensor) -> Rollout:
    """Walk with given noise (N, K + 1, *S), all unit normal: first the initial latent's, then that of each step."""
    num_steps = sampler.num_steps
    if noises.shape[1] != num_steps + 1:
        raise ValueError(f"walk: {num_steps} steps need {num_steps + 1} noises, found {noises.shape[1]}")
    x = noises[:, 0].float() * sampler.initial_scale(policy)
    columns: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for k in range(num_steps):
        step = sampler.transition(policy, x, torch.full((len(x),), k, device=x.device), prompt)
        x_next = step.draw(noises[:, k + 1].float())
        columns.append((x, x_next, step.clean, step.std))
        x = x_next
    states, next_states, clean, std = (torch.stack(c, dim=1) for c in zip(*columns, strict=True))
    return Rollout(states, next_states, clean, std)


@torch.no_grad()
def sample(policy: Policy, sampler: Sampler, prompt: Prompt, noises: Tensor) -> Tensor:
    """The final clean latents (N, *S) of a walk."""
    return run_sampler(policy, sampler, prompt, noises).next_states[:, -1]


def seeded_noises(latent_shape: tuple[int, int, int], num_steps: int, seeds: Sequence[tuple[int, int]]) -> Tensor:
    """Noise (N, num_steps + 1, *S) for `walk`, one (seed, index) a row, on the CPU.

    A row depends on its own pair alone: not on the batch, the model or the other rows. Walks of fewer steps share the
    beginning, so 1- and 2-step images of one seed start from the same latent.
    """
    rows = []
    for seed, index in seeds:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
        rows.append(torch.randn((num_steps + 1, *latent_shape), generator=generator))
    return torch.stack(rows)


@torch.no_grad()
def sample_images(policy: Policy, sampler: Sampler, texts: Sequence[str], seeds: Sequence[tuple[int, int]]) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] of N texts, each from the noise of its own (seed, index)."""
    noises = seeded_noises(policy.latent_shape, sampler.num_steps, seeds).to(policy.device)
    return policy.decode(sample(policy, sampler, policy.encode(texts), noises))
