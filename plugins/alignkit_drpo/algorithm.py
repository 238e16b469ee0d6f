"""DrPO: samples drift, in the features of a frozen network, towards the preferred ones and away from the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Ge, Gt, MinLen
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d

from alignkit import Algorithm, Batch, Context, Prompt, Rows, check_ranges
from alignkit.errors import ConfigError
from alignkit.rollout import sample_trajectories

SMALLEST_SCALE, SMALLEST_AFFINITY, SMALLEST_FIELD = 1e-3, 1e-6, 1e-4
"""Lower bounds of s and s_d, of the product of two softmaxes, and of the length of a field (the authors' code)."""
OWN_COPY = 100.0
"""Distance, in units of s, that is added between a sample and its own copy among the targets (the authors' code)."""


@dataclass(frozen=True)
class Drift(Rows):
    """Goals of the features of N samples, those of all L layers after each other."""

    goal: Tensor
    """(N, D) u / s_d + F, where u are the features that the samples had."""
    scale: Tensor
    """(N, L) s_d, the same for all samples of a group."""


@dataclass(frozen=True)
class Samples(Rows):
    """Predictions of a clean latent, of which the features should drift, N rows."""

    x: Tensor
    """(N, *S) the latent before the step."""
    step: Tensor
    """(N,) the step's number in the sampler."""
    prompt: Prompt
    noise: Tensor
    """(N, *S) unit noise that is added to the prediction before its features are computed."""
    preference: Drift
    reference: Drift


@dataclass
class DrPO(Algorithm[Samples, Samples]):
    """Drifting preference optimisation (arXiv 2606.02521).

    Samples of a prompt are ranked by the reward. A field, computed without gradient in the features of the network
    before training, points from each sample towards the best of them and away from the worst; a second one points to
    the samples of the model before training. The loss is the squared distance to where the fields lead. The defaults
    are those of the authors' code for SDXL-Turbo.

    Not in the paper, which trains one step: on samplers of several, the prediction of every step is trained, and ranked
    among those of the same step.
    """

    samples: Annotated[int, Ge(2)] = 16
    """N, samples of each prompt in a round."""
    positives: Annotated[int, Ge(1)] = 8
    """N_p, the best samples of a prompt, which attract."""
    negatives: Annotated[int, Ge(1)] = 8
    """N_n, the worst samples of a prompt, which repel."""
    positive_weight: Annotated[float, Gt(0)] = 3000.0
    """w_p, weight of a positive sample in the field; that of a plain sample is 1."""
    negative_weight: Annotated[float, Gt(0)] = 2000.0
    """w_n, weight of a negative sample in the field."""
    reference_weight: Annotated[float, Ge(0)] = 0.25
    """lambda, weight of the loss that pulls to the model before training."""
    reference_positive_weight: Annotated[float, Gt(0)] = 3500.0
    """w_r, weight in that loss's field of a sample of the model before training, which attracts."""
    reference_negative_weight: Annotated[float, Gt(0)] = 5000.0
    """w_rn, weight in that loss's field of a sample of the model as it is, which repels."""
    radii: Annotated[list[Annotated[float, Gt(0)]], MinLen(1)] = field(default_factory=lambda: [0.02, 0.05, 0.2])
    """rho, distances over which samples act on each other, in units of s; their fields are added."""
    layers: Annotated[list[str], MinLen(1)] = field(
        default_factory=lambda: ["down_blocks.2", "mid_block", "up_blocks.0"]
    )
    """Layers of the network before training whose outputs are the features."""
    feature_time: Annotated[int, Ge(0)] = 100
    """Time at which the network computes features, as a place in the model's table of times."""
    feature_noise: Annotated[float, Ge(0)] = 0.1
    """Standard deviation of the noise that is added to a latent before its features are computed."""
    pool: Annotated[int, Ge(1)] = 4
    """Edge of the squares over which features are averaged; a map that is smaller is averaged as a whole."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.positives + self.negatives > self.samples:
            raise ValueError(
                f"samples: found {self.samples}, expected at least positives + negatives, which is "
                f"{self.positives + self.negatives}: no sample is both"
            )

    def setup(self, ctx: Context) -> None:
        """Compute features once, so that a layer that the network does not have is refused before any evaluation."""
        if self.feature_time >= (count := len(ctx.policy.times())):
            raise ConfigError(f"algorithm.feature_time: found {self.feature_time}, expected less than {count}")
        latents = torch.zeros(1, *ctx.policy.latent_shape, device=ctx.policy.device)
        with ctx.policy.reference():
            self.features(latents, latents, ctx.policy.encode([""]), ctx)

    # collect: sample, rank, and compute both fields

    def collect(self, batch: Batch, ctx: Context) -> Samples:
        trajectories = sample_trajectories(batch.examples, ctx, self.samples)
        prompt, count, steps = trajectories.prompt, len(trajectories), ctx.sampler.num_steps
        rewards = []
        for clean in trajectories.clean.unbind(1):
            scores = ctx.score(clean, prompt.examples)
            rewards.append(scores.values.masked_fill(~scores.valid, torch.nan).float().cpu())
        # All steps after each other; a group is N samples of one prompt at one step.
        x, clean = (column.transpose(0, 1).flatten(0, 1) for column in (trajectories.states, trajectories.clean))
        step = torch.arange(steps, device=x.device).repeat_interleave(count)
        prompt = prompt.select(torch.arange(count).repeat(steps))
        with ctx.policy.reference():
            before = ctx.sampler.transition(ctx.policy, x, step, prompt).clean
            # Each set of features has noise of its own. Positives and negatives share no sample, and so one set.
            noise = ctx.noise(len(x))
            own = self.features(clean, noise, prompt, ctx)
            again = self.features(clean, ctx.noise(len(x)), prompt, ctx)
            reference = self.features(before, ctx.noise(len(x)), prompt, ctx)
        order, decided = ranking(torch.cat(rewards).view(-1, self.samples), ctx.generator)
        own, reference = self._groups(own), self._groups(reference)
        positives = self._groups(again, order[:, : self.positives])
        negatives = self._groups(again, order[:, -self.negatives :])
        for name, targets in (("positives", positives), ("negatives", negatives), ("reference", reference)):
            ctx.log(**{f"distance/{name}": mean_distance(own, targets)})
        ctx.log(skipped_prompts=(~decided).float().mean())
        samples = Samples(
            x,
            step,
            prompt,
            noise,
            self._drift(own, negatives, positives, self.negative_weight, self.positive_weight),
            self._drift(own, own, reference, self.reference_negative_weight, self.reference_positive_weight),
        )
        return samples.select(decided.repeat_interleave(self.samples).nonzero()[:, 0])

    def _groups(self, features: Sequence[Tensor], places: Tensor | None = None) -> list[Tensor]:
        """Return features (M, D) of each layer as groups (M / N, N, D), or only the places (M / N, n) of each group."""
        groups = [each.unflatten(0, (-1, self.samples)) for each in features]
        if places is None:
            return groups
        rows = torch.arange(len(places))[:, None]
        return [each[rows, places.to(each.device)] for each in groups]

    def _drift(
        self,
        own: Sequence[Tensor],
        negatives: Sequence[Tensor],
        positives: Sequence[Tensor],
        negative_weight: float,
        positive_weight: float,
    ) -> Drift:
        """Compute the field in the features (B, N, D) of each layer."""
        goals, scales = [], []
        for u, worse, better in zip(own, negatives, positives, strict=True):
            force, s_d = drifting_field(u, worse, better, negative_weight, positive_weight, self.radii)
            goals.append((u / s_d + force).flatten(0, 1))
            scales.append(s_d.expand(*u.shape[:2], 1).flatten())
        return Drift(torch.cat(goals, 1), torch.stack(scales, 1))

    def features(self, latents: Tensor, noise: Tensor, prompt: Prompt, ctx: Context) -> list[Tensor]:
        """Return phi of latents (M, *S), (M, D) for each layer; called within `ctx.policy.reference()`."""
        t = ctx.policy.times()[self.feature_time].to(latents.device).expand(len(latents))
        maps = ctx.policy.feature_maps(latents + self.feature_noise * noise, t, prompt, self.layers)
        return [pooled(each, self.pool).flatten(1) for each in maps]

    # the loss: regress the features to the goals

    def updates(self, collected: Samples, ctx: Context) -> Iterator[Samples]:
        """Yield the samples in random order, in parts of nearly `ctx.rows_per_update`, once each."""
        if len(collected):
            yield from collected.shuffled(ctx.generator).even_split(ctx.rows_per_update)

    def loss(self, rows: Samples, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        clean = ctx.sampler.transition(ctx.policy, rows.x, rows.step, rows.prompt).clean
        # Within this block alone the network is that before training, also for activations that are computed twice.
        with ctx.policy.reference(), torch.enable_grad():
            latents = clean.detach().requires_grad_()
            features = self.features(latents, rows.noise, rows.prompt, ctx)
            each = error(features, rows.preference) + self.reference_weight * error(features, rows.reference)
            (gradient,) = torch.autograd.grad(each.sum(), latents)
        # The value is that of `each`, and so is the gradient to the policy, by the chain rule.
        return (each.detach() + ((clean - clean.detach()) * gradient).flatten(1).sum(1)).mean(), {}


def ranking(rewards: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the places (B, N) of B groups of rewards (B, N), the best first, and which groups are decided (B,).

    Not in the paper: the order of equal rewards is random. A group is undecided if all of its rewards are equal, or if
    one is NaN.
    """
    random = torch.rand(rewards.shape, generator=generator).argsort(1)
    best_first = rewards.nan_to_num(nan=-torch.inf).gather(1, random).argsort(dim=1, descending=True, stable=True)
    return random.gather(1, best_first), rewards.amax(1) > rewards.amin(1)


def drifting_field(
    own: Tensor,
    negatives: Tensor,
    positives: Tensor,
    negative_weight: float,
    positive_weight: float,
    radii: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Return F (B, N, D) at the features `own` (B, N, D) of B groups, in units of s_d, and s_d (B, 1, 1).

    F is the sum over radii of fields of unit length, between plain samples, which are `own` again, negatives
    (B, N_n, D) and positives (B, N_p, D). Where negatives are `own` itself they hold a copy of each sample too. In
    float64, also under mixed precision: F is a small difference of large numbers.
    """
    u, targets = own.double(), torch.cat([own, negatives, positives], dim=1).double()
    count, size, others = own.shape[1], own.shape[2], own.shape[1] + negatives.shape[1]
    weight = torch.ones_like(targets[0, :, 0])
    weight[count:others], weight[others:] = negative_weight, positive_weight
    copies = u.new_zeros(count, targets.shape[1])
    copies[:, :count].fill_diagonal_(1)
    if negatives is own:
        copies[:, count:others].fill_diagonal_(1)

    distance = torch.cdist(u, targets)
    s = ((distance * weight).sum((1, 2)) / (count * weight.sum())).clamp(min=SMALLEST_SCALE).view(-1, 1, 1)
    s_d = (s / size**0.5).clamp(min=SMALLEST_SCALE)
    # The coefficients of t sum to 0, so its origin is free; this one keeps F exact where all features are alike.
    t, total = (targets - targets.mean(1, keepdim=True)) / s_d, torch.zeros_like(u)
    for radius in radii:
        logits = -(distance / s + OWN_COPY * copies) / radius
        affinity = weight * (logits.softmax(2) * logits.softmax(1)).clamp(min=SMALLEST_AFFINITY).sqrt()
        push, pull = affinity[..., :others], affinity[..., others:]
        towards, away = pull @ t[:, others:], push @ t[:, :others]
        force = push.sum(2, keepdim=True) * towards - pull.sum(2, keepdim=True) * away
        total += force / force.square().mean((1, 2), keepdim=True).sqrt().clamp(min=SMALLEST_FIELD)
    return total.to(own.dtype), s_d.to(own.dtype)


def error(features: Sequence[Tensor], towards: Drift) -> Tensor:
    """Return the mean over layers and dimensions of (phi / s_d - goal)^2, (N,), of features (N, D) of each layer."""
    goals = towards.goal.split([each.shape[1] for each in features], dim=1)
    layers = zip(features, towards.scale.unbind(1), goals, strict=True)
    return torch.stack([(phi / s_d[:, None] - goal).square().mean(1) for phi, s_d, goal in layers]).mean(0)


def mean_distance(own: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """Return the mean distance of samples from others of their group, over layers, in units of one dimension."""
    layers = zip(own, others, strict=True)
    return torch.stack([torch.cdist(u, t).mean() / u.shape[2] ** 0.5 for u, t in layers]).mean()


def pooled(maps: Tensor, edge: int) -> Tensor:
    """Average maps (N, c, h, w) over squares of this edge; as a whole if they are smaller."""
    return avg_pool2d(maps, edge) if min(maps.shape[2:]) >= edge else adaptive_avg_pool2d(maps, 1)
