"""Additions of ours to LaSRO, which are not in the paper; all are off by default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import sqrt
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Lt
from torch import Tensor
from torch.nn import functional as F

from alignkit import Batch, Context, Example, Prompt
from alignkit.diffusion import add_noise
from alignkit.errors import ConfigError
from alignkit.groups import Pairs, Scored
from alignkit.rollout import States, Trajectories, encode_examples, run_sampler, states_of
from alignkit_lasro.lasro import Collected, LaSRO, scored_groups
from alignkit_lasro.memory import Memory, counterparts
from alignkit_lasro.rows import ComparedPairs, PerturbedStates


@dataclass
class ExtendedLaSRO(LaSRO):
    """LaSRO (Jia et al., CVPR 2025, arXiv 2411.15247), with additions of ours.

    A surrogate learns from pairs of samples which of them the true reward prefers (Eq. 10); the policy follows the
    surrogate's gradient at every step of its sampler, normalised and clipped (Eq. 12 and 13), together with a latent
    consistency distillation term (Eq. 11): the regulariser `lcd`, whose weight is lambda.

    Fields marked "Not in the paper" are additions of ours. By default they are off, and this is the paper's method.
    """

    replay: Annotated[int, Ge(1)] = 1
    """Not in the paper. Rounds of scored samples that the surrogate learns from, the last one included. More than 1 pay
    where the reward is the expensive part of a round."""
    pairs: Literal["extremes", "random"] = "extremes"
    """Not in the paper but for "extremes". Pair the best and the worst sample of a group, or any two whose rewards
    differ."""
    label_scale: Annotated[float, Ge(0)] = 0.0
    """Not in the paper. Let the better sample of a pair win with probability sigmoid(label_scale * difference of the
    rewards), so that pairs that hardly differ teach little. 0: with certainty, as in the paper."""
    noise_correlation: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Not in the paper. Correlation of the noises within a group. Samples from similar noises share the layout and
    differ in what a gradient can change."""
    reference_samples: Annotated[int, Ge(0)] = 0
    """Not in the paper. Number of the N_s samples that the model before training generates, from the noises of the
    others. They correct a surrogate that likes a drift common to all samples of the policy."""
    negatives: Annotated[int, Ge(0)] = 0
    """Not in the paper. Samples of other prompts of the batch that the reward also scores under each prompt, and that
    join its group: they lack what the prompt asks for."""
    smoothing: Annotated[float, Ge(0)] = 0.0
    """Not in the paper. Standard deviation of noise on the latents that the surrogate sees, while it learns and while
    the policy follows it. Its gradient is then an average over a neighbourhood."""
    purify: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Not in the paper. Share of the schedule (0 to 1) at whose time the prediction is noised, and from which the
    teacher denoises it, before the surrogate scores it (diffusion purification, Nie et al., ICML 2022). The gradient
    through the teacher damps what merely exploits the surrogate. 0: off."""
    contrast: float = 0.0
    """Not in the paper. Share of a sample's surrogate score under another prompt of the batch that is subtracted from
    that under its own; removes the prompt-independent part, which a policy exploits first."""
    gradient_samples: Annotated[int, Ge(1)] = 1
    """Not in the paper. Noises, of `smoothing` and `purify`, over which the score that the policy follows is averaged.
    """
    unit_gradients: bool = False
    """Not in the paper. Scale the gradient by each prediction to length one, instead of normalising and clipping scores
    (Eq. 12 and 13). Otherwise samples that are far off dominate, where the surrogate is least reliable."""
    restart_every: Annotated[int, Ge(0)] = 0
    """Not in the paper. Updates after which the policy goes back to where it began, while the surrogate and its samples
    stay; 0: never. Trains a surrogate on the ways in which policies exploit it; these are thrown away."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference_samples >= self.samples:
            raise ValueError(
                f"reference_samples: found {self.reference_samples}, expected less than samples, which is "
                f"{self.samples}"
            )
        self._memory = Memory(self.replay, self.own_samples, self.samples)

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | ({"teacher"} if self.purify else set())

    @property
    def own_samples(self) -> int:
        return self.samples - self.reference_samples

    def setup(self, ctx: Context) -> None:
        self._start = {name: p.detach().clone() for name, p in ctx.policy.weights().items() if self.restart_every}

    @torch.no_grad()
    def after_update(self, ctx: Context) -> None:
        if self.restart_every and ctx.update % self.restart_every == 0:
            for name, parameter in ctx.policy.weights().items():
                parameter.copy_(self._start[name])

    # sampling: correlated noises, samples of the model before training, negatives

    def collect(self, batch: Batch, ctx: Context) -> Collected:
        self._check_contrast(batch.captions if self.states_from == "images" else batch.examples)
        collected = super().collect(batch, ctx)
        if self.own_samples < self.samples:
            now, before = counterparts(collected.scored, self.own_samples, self.samples).rewards.unbind(1)
            if not bool((now - before).isnan().all()):
                ctx.log(reward_gain=(now - before).nanmean())
        if self.gradient_of == "surrogate":
            self._memory.add(collected.scored, list(batch.examples))
        return collected

    def _check_contrast(self, examples: Sequence[Example]) -> None:
        texts = [e.text for e in examples]
        if self.contrast and len(set(texts)) < 2:
            alone = len(texts) == 1
            remedy = "raise data.batch_size" if alone else "train on more prompts, or set algorithm.contrast = 0"
            raise ConfigError(
                f"algorithm.contrast: found one text in the batch, {texts[0]!r}, expected two or more to contrast; "
                f"{remedy}"
            )

    def sample(self, batch: Batch, ctx: Context) -> tuple[States, Scored]:
        negatives = self.negatives if self.gradient_of == "surrogate" else 0
        if not (self.noise_correlation or self.reference_samples or negatives):
            return super().sample(batch, ctx)
        trajectories, own = self._trajectories(batch, ctx)
        others = self._negatives(negatives, batch, ctx)
        groups = [self._scored(*step, batch, ctx) for step in zip(trajectories.clean.unbind(1), others, strict=True)]
        return states_of(trajectories.select(own)), scored_groups(groups)

    def _trajectories(self, batch: Batch, ctx: Context) -> tuple[Trajectories, Tensor]:
        """Sample N_s trajectories of each prompt; also return which rows are the policy's own."""
        each, groups = self.samples, len(batch.examples)
        prompt = encode_examples(ctx.policy, [example for example in batch.examples for _ in range(each)])
        noises = torch.stack([self.noise(groups, ctx) for _ in range(ctx.sampler.num_steps + 1)], dim=1)
        # Samples of the model before training have the noises of others: such a pair shows the effect of training.
        row, count = torch.arange(len(prompt)), self.own_samples
        place = row % each
        noises = noises[torch.where(place < count, row, row - place + (place - count) % count)]
        own, reference = (place < count).nonzero()[:, 0], (place >= count).nonzero()[:, 0]
        parts = [run_sampler(ctx.policy, ctx.sampler, prompt.select(own), noises[own])]
        if len(reference):
            with ctx.policy.reference():
                parts.append(run_sampler(ctx.policy, ctx.sampler, prompt.select(reference), noises[reference]))
        order = torch.cat([own, reference]).argsort().to(noises.device)
        columns = [f.name for f in fields(Trajectories) if f.name != "prompt"]
        joined = {name: torch.cat([getattr(part, name) for part in parts])[order] for name in columns}
        return Trajectories(prompt, **joined), own

    def noise(self, groups: int, ctx: Context) -> Tensor:
        """Return unit normal noise for N_s samples of each group, (groups * N_s, *S), correlated within a group."""
        own = ctx.noise(groups * self.samples)
        if not self.noise_correlation:
            return own
        shared = ctx.noise(groups).repeat_interleave(self.samples, dim=0)
        return sqrt(self.noise_correlation) * shared + sqrt(1 - self.noise_correlation) * own

    def _negatives(self, negatives: int, batch: Batch, ctx: Context) -> Tensor:
        """Choose, at each step and for each of B prompts, samples of the next prompts that join its group.

        Returns their rows among the B * N_s samples, (K, B, negatives).
        """
        texts = [e.text for e in batch.examples]
        count = len(texts)
        if negatives >= count:
            raise ConfigError(
                f"algorithm.negatives: found {negatives}, expected less than data.batch_size, which is {count}: each "
                "comes from another prompt"
            )
        following = [[j % count for j in range(i + 1, i + count)] for i in range(count)]
        # Those of its own text last: a short list of prompts may come round twice.
        ordered = [sorted(places, key=lambda j: texts[j] == texts[i]) for i, places in enumerate(following)]
        other = torch.tensor([places[:negatives] for places in ordered], dtype=torch.long).view(count, -1)
        size = (ctx.sampler.num_steps, *other.shape)
        return other * self.samples + torch.randint(self.samples, size, generator=ctx.generator)

    def _scored(self, clean: Tensor, negatives: Tensor, batch: Batch, ctx: Context) -> tuple[Tensor, Tensor]:
        """Score the groups of one step: samples (B * N_s, *S), and `negatives` (B, M - N_s), rows of them.

        Returns the groups (B, M, *S) and their rewards (B, M), each under the group's own prompt.
        """
        own = torch.arange(len(clean)).view(len(batch.examples), self.samples)
        others = [(row, e) for e, rows in zip(batch.examples, negatives.tolist(), strict=True) for row in rows]
        scores = ctx.score(clean, [e for e in batch.examples for _ in range(self.samples)], others=others)
        rewards = scores.values.masked_fill(~scores.valid, torch.nan).float().to(clean.device)
        shapes = zip(rewards.split([own.numel(), negatives.numel()]), (own, negatives), strict=True)
        return clean[torch.cat([own, negatives], dim=1)], torch.cat([part.view(of.shape) for part, of in shapes], dim=1)

    # the surrogate: pairs from a memory of rounds, smoothed

    def pairs_of(self, collected: Collected, ctx: Context) -> Pairs | None:
        winner, loser, gap, examples = self._memory.sample(self.pairs, self.pairs_per_update, ctx.generator)
        if not examples:
            return None
        pairs: Pairs = ComparedPairs(winner, loser, encode_examples(ctx.policy, examples), gap)
        pairs = pairs.to(ctx.policy.device)
        if not self.smoothing:
            return pairs
        winner, loser = (x + self.smoothing * ctx.noise(len(x)) for x in (pairs.winner, pairs.loser))
        return replace(pairs, winner=winner, loser=loser)

    def surrogate_loss(self, rows: Pairs, ctx: Context) -> Tensor:
        if not self.label_scale:
            return super().surrogate_loss(rows, ctx)
        assert ctx.surrogate is not None and isinstance(rows, ComparedPairs)
        twice = rows.prompt.select(torch.arange(len(rows)).repeat(2))
        better, worse = ctx.surrogate.score(torch.cat([rows.winner, rows.loser]), twice).chunk(2)
        return F.binary_cross_entropy_with_logits(better - worse, torch.sigmoid(self.label_scale * rows.gap))

    # the policy: scores that are purified, smoothed and contrasted, and gradients of length one

    def rows_of(self, states: States, ctx: Context) -> States:
        if not (self.smoothing or self.purify or self.contrast):
            return states
        size = len(states), self.gradient_samples
        blur, noise = (ctx.noise(size[0] * size[1]).unflatten(0, size) for _ in range(2))
        other = other_texts(states.prompt, ctx.generator)
        own = {f.name: getattr(states, f.name) for f in fields(States)}
        return PerturbedStates(**own, other=other, blur=self.smoothing * blur, noise=noise)

    def score(self, clean: Tensor, rows: States, ctx: Context) -> Tensor:
        if not isinstance(rows, PerturbedStates):
            return super().score(clean, rows, ctx)
        assert rows.other is not None and rows.blur is not None and rows.noise is not None  # `rows_of` gives them
        scores = []
        for blur, noise in zip(rows.blur.unbind(1), rows.noise.unbind(1), strict=True):
            x = (self._purified(clean, noise, rows.prompt, ctx) if self.purify else clean) + blur
            score = self.score_under(x, rows.prompt, ctx)
            if self.contrast:
                score = score - self.contrast * self.score_under(x, rows.other, ctx)
            scores.append(score)
        return torch.stack(scores).mean(0)

    def _purified(self, clean: Tensor, noise: Tensor, prompt: Prompt, ctx: Context) -> Tensor:
        assert ctx.teacher is not None  # needs "teacher"
        times = ctx.teacher.times()
        t = times[int(self.purify * len(times))].to(clean.device).expand(len(clean))
        return ctx.teacher.denoise(add_noise(clean, noise, *ctx.teacher.schedule(t)), t, prompt)

    def track(self, states: States, ctx: Context) -> None:
        if not self.unit_gradients:
            super().track(states, ctx)

    def pull(self, clean: Tensor, rows: States, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.unit_gradients:
            return super().pull(clean, rows, ctx)
        return (clean * self.direction(clean, rows, ctx)).flatten(1).sum(1), {}

    @torch.enable_grad()
    def direction(self, clean: Tensor, rows: States, ctx: Context) -> Tensor:
        """Return the gradient of the scores at predictions (N, *S), each of length one."""
        clean = clean.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.score(clean, rows, ctx).sum(), clean)
        return F.normalize(gradient.flatten(1), dim=1).view_as(gradient)

    def state_dict(self) -> dict[str, Any]:
        return {"memory": self._memory.state_dict(), **super().state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._memory.load_state_dict(state["memory"])
        super().load_state_dict(state)


def other_texts(prompt: Prompt, generator: torch.Generator) -> Prompt:
    """Choose for each row another text of the prompt at random; where there is only one, keep it.

    Examples that share a text are no contrast to each other. Of those of another text the first is taken.
    """
    texts, device = prompt.text_table, prompt.index.device
    distinct = list(dict.fromkeys(texts))
    number = torch.tensor([distinct.index(text) for text in texts], device=device)
    first = torch.tensor([texts.index(text) for text in distinct], device=device)
    shift = torch.randint(1, max(2, len(distinct)), (len(prompt),), generator=generator).to(device)
    return replace(prompt, index=first[(number[prompt.index] + shift) % len(distinct)])
