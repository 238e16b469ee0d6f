"""Trajectories from noise to a clean latent, once for training, evaluation and sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignkit.errors import PluginError
from alignkit.interfaces import Context, Policy, Sampler
from alignkit.records import Example, Prompt, Rows


@dataclass(frozen=True)
class Trajectories(Rows):
    """N trajectories of K sampler steps; all float32."""

    prompt: Prompt
    states: Tensor
    """(N, K, *S) the latent before each step."""
    next_states: Tensor
    """(N, K, *S) the latent after it."""
    clean: Tensor
    """(N, K, *S) the clean latent predicted at each step."""
    std: Tensor
    """(N, K) 0 where the step was deterministic."""

    @property
    def samples(self) -> Tensor:
        """(N, *S) the clean latents at the end."""
        return self.next_states[:, -1]

    def stochastic_steps(self, sampler: Sampler) -> Tensor:
        """Return the steps (M,) that have a likelihood. Raises PluginError if none has, whatever `sampler` promised."""
        steps = (self.std[0] > 0).nonzero()[:, 0]
        if not len(steps):
            raise PluginError(
                f"sampler {type(sampler).__name__}: every step had std 0, expected {sampler.stochastic_steps()} above 0"
            )
        return steps


@dataclass(frozen=True)
class States(Rows):
    """Inputs at which the policy predicts a clean latent, N rows."""

    x: Tensor
    """(N, *S)."""
    step: Tensor
    """(N,) sampler step; 0 for noised images."""
    prompt: Prompt
    clean: Tensor
    """(N, *S) the policy's prediction when they were collected."""
    time: Tensor | None = None
    """(N,) time of noised images, which no step of the sampler leads to."""

    def predict(self, ctx: Context) -> Tensor:
        """Return the policy's prediction as it is now, (N, *S): x_k = f_theta(z_k, c, tau_k)."""
        if self.time is not None:
            return ctx.policy.denoise(self.x, self.time, self.prompt)
        return ctx.sampler.transition(ctx.policy, self.x, self.step, self.prompt).clean


def encode_examples(policy: Policy, examples: Sequence[str | Example]) -> Prompt:
    """Encode N examples, or texts, and keep the examples with the rows.

    Equal examples share a place in the tables. Two with the same text and different metadata have one each.
    """
    distinct: list[Example] = []
    places: dict[str, list[int]] = {}
    index = []
    for example in map(Example.of, examples):
        known = places.setdefault(example.text, [])
        place = next((i for i in known if _equal(distinct[i], example)), len(distinct))
        if place == len(distinct):
            distinct.append(example)
            known.append(place)
        index.append(place)
    encoded = policy.encode([example.text for example in distinct])
    tables = replace(encoded, table=encoded.features, pooled_table=encoded.pooled, text_table=tuple(encoded.texts))
    return replace(tables, index=torch.tensor(index, device=encoded.index.device), example_table=tuple(distinct))


def _equal(one: Example, other: Example) -> bool:
    """Compare two examples; different objects whose metadata cannot be compared (arrays) are unequal."""
    try:
        return one is other or bool(one == other)
    except ValueError:
        return False


def run_sampler(policy: Policy, sampler: Sampler, prompt: Prompt, noises: Tensor) -> Trajectories:
    """Sample trajectories from given noise (N, K + 1, *S), unit normal: the initial latent's, then each step's."""
    num_steps = sampler.num_steps
    if noises.shape[1] != num_steps + 1:
        raise ValueError(f"run_sampler: {num_steps} steps need {num_steps + 1} noises, found {noises.shape[1]}")
    x = noises[:, 0].float() * sampler.initial_scale(policy)
    columns: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for k in range(num_steps):
        step = sampler.transition(policy, x, torch.full((len(x),), k, device=x.device), prompt)
        x_next = step.sample(noises[:, k + 1].float())
        columns.append((x, x_next, step.clean, step.std))
        x = x_next
    states, next_states, clean, std = (torch.stack(c, dim=1) for c in zip(*columns, strict=True))
    return Trajectories(prompt, states, next_states, clean, std)


def sample_trajectories(
    examples: Sequence[str | Example], ctx: Context, per_prompt: int = 1, sharing: int = 1
) -> Trajectories:
    """Sample `per_prompt` trajectories of each example with the policy as it is; those of one example are consecutive.

    `sharing` consecutive trajectories start from the same initial noise. Noise comes from `ctx.generator`.
    """
    prompt = encode_examples(ctx.policy, [example for example in examples for _ in range(per_prompt)])
    first = ctx.noise(len(prompt) // sharing).repeat_interleave(sharing, dim=0)
    later = [ctx.noise(len(prompt)) for _ in range(ctx.sampler.num_steps)]
    return run_sampler(ctx.policy, ctx.sampler, prompt, torch.stack([first, *later], dim=1))


def states_of(trajectories: Trajectories) -> States:
    """Return the states of all steps, those of the first step first."""
    count, steps = trajectories.std.shape
    x, clean = (column.transpose(0, 1).flatten(0, 1) for column in (trajectories.states, trajectories.clean))
    step = torch.arange(steps, device=x.device).repeat_interleave(count)
    return States(x, step, trajectories.prompt.select(torch.arange(count).repeat(steps)), clean)


def choose_steps(steps: Tensor, count: int, fraction: float, generator: torch.Generator) -> Tensor:
    """Choose a random share of `steps` (M,), at least one, for each of `count` trajectories: (count, kept)."""
    kept = max(1, int(len(steps) * fraction))
    order = torch.rand(count, len(steps), generator=generator).argsort(1)[:, :kept]
    return steps[order.to(steps.device)]


@torch.no_grad()
def sample(policy: Policy, sampler: Sampler, prompt: Prompt, noises: Tensor) -> Tensor:
    """Sample clean latents (N, *S) from given noise, as for `run_sampler`."""
    return run_sampler(policy, sampler, prompt, noises).samples


def seeded_noises(latent_shape: tuple[int, int, int], num_steps: int, seeds: Sequence[tuple[int, int]]) -> Tensor:
    """Noise (N, num_steps + 1, *S) for `run_sampler`, one (seed, index) a row, on the CPU.

    A row depends on its own pair alone: not on the batch, the model or the other rows. Trajectories of fewer steps
    share the beginning, so 1- and 2-step images of one seed start from the same latent.
    """
    rows = []
    for seed, index in seeds:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
        rows.append(torch.randn((num_steps + 1, *latent_shape), generator=generator))
    return torch.stack(rows)


@torch.no_grad()
def sample_images(policy: Policy, sampler: Sampler, texts: Sequence[str], seeds: Sequence[tuple[int, int]]) -> Tensor:
    """Sample images (N, 3, H, W) in [0, 1] of N texts, each from the noise of its own (seed, index)."""
    noises = seeded_noises(policy.latent_shape, sampler.num_steps, seeds).to(policy.device)
    return policy.decode(sample(policy, sampler, policy.encode(texts), noises))
