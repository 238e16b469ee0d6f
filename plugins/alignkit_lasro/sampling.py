"""The rounds of LaSRO: samples of the policy at every step, scored by the true reward."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.interfaces import Context
from alignkit.records import Batch, Prompt, Rows
from alignkit.rollout import run_sampler
from alignkit_lasro.pairs import Scored


@dataclass(frozen=True)
class States(Rows):
    """Where the policy is asked for a clean latent, N rows."""

    x: Tensor
    """(N, *S)."""
    step: Tensor
    """(N,) sampler step; 0 for noised images."""
    prompt: Prompt
    clean: Tensor
    """(N, *S) what the policy answered when they were collected."""
    time: Tensor | None = None
    """(N,) of the schedule, for noised images, which no step of the sampler leads to."""

    def predict(self, ctx: Context) -> Tensor:
        """What the policy answers now, (N, *S)."""
        if self.time is not None:
            return ctx.policy.denoise(self.x, self.time, self.prompt)
        return ctx.sampler.transition(ctx.policy, self.x, self.step, self.prompt).clean


@dataclass(frozen=True)
class Sampling:
    """How the samples of a round are drawn; the fields are those of `LaSRO`."""

    samples: int
    reference_samples: int
    noise_correlation: float
    negatives: int

    @property
    def own(self) -> int:
        """Samples of each group that are the policy's own."""
        return self.samples - self.reference_samples

    def draw(self, batch: Batch, ctx: Context) -> tuple[States, Scored]:
        """The policy's own states at every step, and the clean latents of all samples with their rewards."""
        texts, each, num_steps = [e.text for e in batch.examples], self.samples, ctx.sampler.num_steps
        prompt = ctx.policy.encode([text for text in texts for _ in range(each)])
        count = len(prompt)
        noises = torch.stack([self.noise(len(texts), ctx) for _ in range(num_steps + 1)], dim=1)
        # The samples of the model before training have the noises of others: what such a pair shows is the training.
        place = torch.arange(count) % each
        current = place < self.own
        source = torch.where(current, torch.arange(count), torch.arange(count) - place + (place - self.own) % self.own)
        noises = noises[source]
        x, clean = torch.empty(2, num_steps, *noises[:, 0].shape, device=noises.device)
        for chosen, weights in ((current, nullcontext()), (~current, ctx.policy.reference())):
            rows = chosen.nonzero()[:, 0]
            if len(rows):
                with weights:
                    rollout = run_sampler(ctx.policy, ctx.sampler, prompt.select(rows), noises[rows])
                x[:, rows], clean[:, rows] = rollout.states.transpose(0, 1), rollout.clean.transpose(0, 1)
        negatives = self._negatives(num_steps, batch, ctx)
        found = [self._scored(*at, batch, ctx) for at in zip(clean, negatives, strict=True)]
        latents, rewards = (torch.cat(column) for column in zip(*found, strict=True))
        # Groups share prompt and step: across steps the pairs would teach that more steps look better.
        text = torch.arange(len(texts)).repeat(num_steps)
        scored = Scored(latents, rewards, text, torch.arange(num_steps).repeat_interleave(len(texts)))
        step = torch.arange(num_steps, device=x.device).repeat_interleave(count)
        each_step = prompt.select(torch.arange(count).repeat(num_steps))
        states = States(x.flatten(0, 1), step, each_step, clean.flatten(0, 1))
        return states.select(current.repeat(num_steps).nonzero()[:, 0]), scored

    def _negatives(self, num_steps: int, batch: Batch, ctx: Context) -> Tensor:
        """At each step, for each of B texts, which samples (K, B, negatives) of the texts behind it join its group."""
        texts = [e.text for e in batch.examples]
        count = len(texts)
        if self.negatives >= count:
            raise ConfigError(
                f"algorithm.negatives: found {self.negatives}, expected less than data.batch_size, which is {count}: "
                "each comes from another prompt"
            )
        behind = [[j % count for j in range(i + 1, i + count)] for i in range(count)]
        # Those of its own text last: a short list of prompts may come round twice.
        ordered = [sorted(places, key=lambda j: texts[j] == texts[i]) for i, places in enumerate(behind)]
        other = torch.tensor([places[: self.negatives] for places in ordered], dtype=torch.long).view(count, -1)
        return other * self.samples + torch.randint(self.samples, (num_steps, *other.shape), generator=ctx.generator)

    def _scored(self, clean: Tensor, negatives: Tensor, batch: Batch, ctx: Context) -> tuple[Tensor, Tensor]:
        """The groups (B, M, *S) of one step, made of samples (B * N_s, *S) and of `negatives` (B, M - N_s), which are
        rows of them, with the rewards (B, M) under each group's own text."""
        groups = len(batch.examples)
        own = torch.arange(len(clean)).view(groups, self.samples)
        others = [(row, e) for e, rows in zip(batch.examples, negatives.tolist(), strict=True) for row in rows]
        scores = ctx.score(clean, [e for e in batch.examples for _ in range(self.samples)], others=others)
        rewards = scores.values.masked_fill(~scores.valid, torch.nan).float().to(clean.device)
        shapes = zip(rewards.split([own.numel(), negatives.numel()]), (own, negatives), strict=True)
        return clean[torch.cat([own, negatives], dim=1)], torch.cat([part.view(of.shape) for part, of in shapes], dim=1)

    def noise(self, groups: int, ctx: Context) -> Tensor:
        """Unit normal noise for N_s samples of each group, (groups * N_s, *S), correlated within a group."""
        own = ctx.noise(groups * self.samples)
        if not self.noise_correlation:
            return own
        shared = ctx.noise(groups).repeat_interleave(self.samples, dim=0)
        return sqrt(self.noise_correlation) * shared + sqrt(1 - self.noise_correlation) * own
