"""LaSRO: reward fine-tuning of two-step diffusion models through a learned latent-space surrogate reward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from alignkit.diffusion import add_noise
from alignkit.errors import ConfigError
from alignkit.interfaces import Algorithm, Batch, Context, Prompt, Rows, Sampler
from alignkit.rollout import walk
from alignkit_lasro.memory import Memory
from alignkit_lasro.pairs import Pairs, Scored, counterparts, extremes, rank_correlation
from alignkit_lcd.distillation import Distillation, Noised

MIN_SPREAD = 0.05
"""Scores are log-odds of winning a pair. A spread below this says nothing yet, and must not be scaled up to one."""


@dataclass(frozen=True)
class Collected:
    """One round: samples scored by the true reward, states to improve from, captioned latents."""

    states: States
    scored: Scored
    texts: list[str]
    pictures: Tensor | None
    captions: Prompt | None


@dataclass(frozen=True)
class States(Rows):
    """Where the policy is asked for a clean latent, N rows."""

    x: Tensor
    """(N, *S)."""
    step: Tensor
    """(N,) sampler step."""
    prompt: Prompt
    clean: Tensor
    """(N, *S) what the policy answered when they were collected."""


@dataclass(frozen=True)
class PolicyRows(Rows):
    """One policy update: a state to improve and a captioned latent to keep consistent, N rows of each."""

    states: States
    other: Prompt
    """Another prompt for each state, to contrast its own with."""
    blur: Tensor
    """(N, draws, *S) what is added to the clean latent before the surrogate sees it."""
    noise: Tensor
    """(N, draws, *S) unit normal, for the purification."""
    noised: Noised | None = None


@dataclass
class LaSRO(Algorithm[Collected, PolicyRows]):
    """LaSRO (Jia et al., CVPR 2025, arXiv 2411.15247).

    A surrogate learns from pairs of samples which of them the true reward prefers (Eq. 10); the policy follows the
    surrogate's gradient at every step of its sampler, normalised and clipped (Eq. 12 and 13), beside a latent
    consistency distillation term (Eq. 11). The paper leaves numbers open; each default below says where it comes from.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"surrogate"})
    default_surrogate: ClassVar[str] = "latent_unet"

    samples: int = 8
    """N_s, initial noises a prompt. The coarser the reward, the more it takes to find two samples that differ."""
    step_weights: list[float] = field(default_factory=lambda: [1.0, 1.0])
    """c_1, c_2, ...: the weight of the reward term at each sampler step. All zero is the control run."""
    distillation_weight: float = 1.0
    """lambda of Eq. 11; 0 needs neither teacher nor pictures (models distilled with a discriminator)."""
    policy_steps: int = 1
    """K_1, policy updates a round."""
    surrogate_steps: int = 2
    """K_2, surrogate updates a round."""
    replay: int = 64
    """Rounds of scored samples that are kept for the surrogate. The true reward is the expensive part of a round;
    with 1 the surrogate sees each sample in its own round only."""
    pairs: Literal["extremes", "drawn"] = "drawn"
    """Which two samples of a group make a pair: best and worst, as in the paper, or any two whose rewards differ."""
    pairs_per_update: int = 64
    """Pairs in one surrogate update."""
    noise_correlation: float = 0.0
    """Correlation of the noises within a group, 0 for independent ones. Samples from nearly the same noises show the
    same layout and differ in what a gradient can change; between independent ones the layout hides it."""
    reference_samples: int = 0
    """How many of the N_s samples are drawn by the model as it was before training, from the noises of the others.
    Pairs within one model's samples say nothing about what all of them have in common, so a drift of the policy that
    the surrogate happens to like would never be corrected; beside samples without the drift it is."""
    negatives: int = 0
    """Samples of other prompts of the batch that the reward also scores under each prompt, and that join its group.
    Samples of one prompt are much alike; what the prompt asks for shows where it is missing altogether."""
    smoothing: float = 0.0
    """Standard deviation of noise on the latents that the surrogate sees, while it learns and while the policy follows
    it. Its gradient is then that of an average over a neighbourhood, and points less often where no picture is."""
    purify: int = 0
    """Time of the schedule (1 to 999) to which the policy's prediction is noised, and from which the teacher denoises
    it, before the surrogate scores it for the policy: diffusion purification (Nie et al., ICML 2022). The gradient then
    comes through the teacher, which lets pass what leads to another picture and damps what merely fools the surrogate.
    0 leaves it out."""
    contrast: float = 0.0
    """How much of a sample's surrogate score under another prompt of the batch is taken off that under its own before
    the policy follows it. What scores better under every prompt is how a policy first fools a surrogate, since pairs,
    which share a prompt, say little of it; with 1 it cancels, and what is left is what this prompt asks for."""
    gradient_draws: int = 1
    """Noises, of `smoothing` and `purify`, over which the score that the policy follows is averaged."""
    unit_gradients: bool = False
    """Whether every sample pulls equally: the gradient by each prediction is scaled to length one, instead of the
    scores being normalised and clipped (Eq. 12 and 13). Scores are log-odds, whose gradient is longest where a sample
    is far off, and there it is least to be trusted."""
    restart_every: int = 0
    """Updates after which the policy goes back to where it began, while the surrogate and its samples stay; 0: never.
    For teaching a surrogate: each policy that follows it shows another way in which it is wrong, and the policies are
    thrown away."""
    percentile: float = 0.95
    """The share of surrogate scores below the level at which the reward term stops to pull (Eq. 13)."""
    tracker_decay: float = 0.99
    """Decay of the running mean and percentile of the surrogate's scores."""
    ode_steps: int = 50
    """Solver steps of the distillation term; must be what the model was distilled with."""
    w_min: float = 5.0
    """Smallest guidance of the teacher in the distillation term."""
    w_max: float = 15.0
    """Largest guidance of the teacher in the distillation term."""

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise ValueError(f"samples is {self.samples}, expected at least 2: a pair takes two samples of one prompt")
        if not 0 <= self.reference_samples < self.samples:
            raise ValueError(
                f"reference_samples is {self.reference_samples}, expected 0 to {self.samples - 1}, less than samples"
            )
        if not 0 <= self.noise_correlation < 1:
            raise ValueError(f"noise_correlation is {self.noise_correlation}, expected at least 0 and less than 1")
        if self.smoothing < 0:
            raise ValueError(f"smoothing is {self.smoothing}, expected 0 or more")
        if not 0 <= self.purify <= 999:
            raise ValueError(f"purify is {self.purify}, expected a time of the schedule, 1 to 999, or 0 for none")
        if not 0 < self.percentile <= 1:
            raise ValueError(f"percentile is {self.percentile}, expected more than 0 and at most 1")
        if self.negatives < 0:
            raise ValueError(f"negatives is {self.negatives}, expected 0 or more")
        if self.restart_every < 0:
            raise ValueError(f"restart_every is {self.restart_every}, expected 0 or more")
        for name in ("policy_steps", "pairs_per_update", "replay", "gradient_draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.distillation_weight:
            self.needs = type(self).needs | {"teacher", "pictures"}  # type: ignore[misc]
        elif self.purify:
            self.needs = type(self).needs | {"teacher"}  # type: ignore[misc]
        self._distillation = Distillation(self.ode_steps, self.w_min, self.w_max)
        self._memory = Memory(self.replay, self.samples - self.reference_samples, self.samples)
        self._mean: list[float | None] = [None] * len(self.step_weights)
        self._level: list[float | None] = [None] * len(self.step_weights)
        self._agreement: float | None = None

    def check(self, sampler: Sampler) -> None:
        if sampler.num_steps != len(self.step_weights):
            raise ConfigError(
                f"algorithm.step_weights: found {len(self.step_weights)} weights for sampler.num_steps = "
                f"{sampler.num_steps}; give one a step"
            )
        if self.distillation_weight:
            self._distillation.check(sampler)

    def setup(self, ctx: Context) -> None:
        if self.restart_every:
            self._beginning = {name: p.detach().clone() for name, p in ctx.policy.weights().items()}

    @torch.no_grad()
    def after_update(self, ctx: Context) -> None:
        if self.restart_every and ctx.update % self.restart_every == 0:
            for name, parameter in ctx.policy.weights().items():
                parameter.copy_(self._beginning[name])

    # collect: sample and score

    def collect(self, batch: Batch, ctx: Context) -> Collected:
        texts, each, num_steps = [e.text for e in batch.examples], self.samples, ctx.sampler.num_steps
        if self.contrast and len(set(texts)) < 2:
            raise ConfigError(
                f"algorithm.contrast: found one text in the batch, {texts[0]!r}, expected two or more to contrast; "
                "raise data.batch_size"
            )
        prompt = ctx.policy.encode([text for text in texts for _ in range(each)])
        count = len(prompt)
        noises = torch.stack([self._noise(len(texts), ctx) for _ in range(num_steps + 1)], dim=1)
        # The samples of the model before training have the noises of others: what such a pair shows is the training.
        place = torch.arange(count) % each
        own = each - self.reference_samples
        current = place < own
        noises = noises[torch.where(current, torch.arange(count), torch.arange(count) - place + (place - own) % own)]
        x, clean = torch.empty(2, num_steps, *noises[:, 0].shape, device=noises.device)
        for chosen, weights in ((current, nullcontext()), (~current, ctx.policy.reference())):
            rows = chosen.nonzero()[:, 0]
            if len(rows):
                with weights:
                    rollout = walk(ctx.policy, ctx.sampler, prompt.select(rows), noises[rows])
                x[:, rows], clean[:, rows] = rollout.states.transpose(0, 1), rollout.clean.transpose(0, 1)
        repeated = [e for e in batch.examples for _ in range(each)]
        scores = [ctx.score(latents, repeated) for latents in clean]
        rewards = torch.stack([s.values.masked_fill(~s.valid, torch.nan) for s in scores]).float()
        # Groups share prompt and step: across steps the pairs would teach that more steps look better.
        groups = num_steps * len(texts)
        scored = Scored(
            latents=clean.view(groups, each, *ctx.policy.latent_shape),
            rewards=rewards.reshape(groups, each).to(clean.device),
            text=torch.arange(len(texts)).repeat(num_steps),
            step=torch.arange(num_steps).repeat_interleave(len(texts)),
        )
        step = torch.arange(num_steps, device=x.device).repeat_interleave(count)
        each_step = prompt.select(torch.arange(count).repeat(num_steps))
        states = States(x.flatten(0, 1), step, each_step, clean.flatten(0, 1))
        states = states.select(current.repeat(num_steps).nonzero()[:, 0])
        if self.negatives:
            scored = self._with_negatives(scored, batch, ctx)
        self._measure(scored, ctx.policy.encode(texts), ctx)
        self._memory.add(scored, texts)
        pictures = captions = None
        if self.distillation_weight and batch.pictures is not None:
            pictures = ctx.policy.encode_images(batch.pictures)
            captions = ctx.policy.encode(batch.captions)
        return Collected(states, scored, texts, pictures, captions)

    def _with_negatives(self, scored: Scored, batch: Batch, ctx: Context) -> Scored:
        """Each group with samples of the texts that follow its own in the batch, scored under its own text."""
        count = len(batch.examples)
        if self.negatives >= count:
            raise ConfigError(
                f"algorithm.negatives: found {self.negatives}, expected less than data.batch_size, which is {count}: "
                "each comes from another prompt"
            )
        other = (scored.text[:, None] + torch.arange(1, self.negatives + 1)) % count
        member = torch.randint(self.samples, other.shape, generator=ctx.generator)
        latents = scored.latents[scored.step[:, None] * count + other, member]
        examples = [batch.examples[i] for i in scored.text.tolist() for _ in range(self.negatives)]
        found = ctx.score(latents.flatten(0, 1), examples, log=False)
        rewards = found.values.masked_fill(~found.valid, torch.nan).float().view_as(other).to(latents.device)
        return replace(
            scored,
            latents=torch.cat([scored.latents, latents], dim=1),
            rewards=torch.cat([scored.rewards, rewards], dim=1),
        )

    def _noise(self, groups: int, ctx: Context) -> Tensor:
        """Unit normal noise for N_s samples of each group, (groups * N_s, *S), correlated within a group."""
        own = ctx.noise(groups * self.samples)
        if not self.noise_correlation:
            return own
        shared = ctx.noise(groups).repeat_interleave(self.samples, dim=0)
        return sqrt(self.noise_correlation) * shared + sqrt(1 - self.noise_correlation) * own

    def _measure(self, scored: Scored, texts: Prompt, ctx: Context) -> None:
        """How the surrogate ranks samples that it has not learned from yet; `texts` are what `scored.text` counts."""
        assert ctx.surrogate is not None
        prompt = texts.select(scored.text.repeat_interleave(scored.rewards.shape[1]))
        scores = ctx.surrogate.score(scored.latents.flatten(0, 1), prompt).view_as(scored.rewards)
        best, worst, labelled = extremes(scored.rewards.cpu())
        rows = torch.arange(len(scored))
        margin = scores[rows, best] - scores[rows, worst]
        own = self.samples - self.reference_samples
        ctx.log(surrogate_score=scores[:, :own].mean(), labelled_groups=labelled.float().mean())
        if self.reference_samples:
            now, before = counterparts(scored, own, self.samples).rewards.unbind(1)
            if not bool((now - before).isnan().all()):
                ctx.log(reward_gain=(now - before).nanmean())
        for k in range(ctx.sampler.num_steps):
            at = scored.step == k
            found = scored.rewards[at, :own]
            if not bool(found.isnan().all()):
                ctx.log(**{f"reward/step{k + 1}": found.nanmean()})
            if bool(labelled[at].any()):
                ctx.log(**{f"pair_accuracy/step{k + 1}": (margin[at & labelled] > 0).float().mean()})
        if not bool(labelled.any()):
            return
        correlation = float(rank_correlation(scores, scored.rewards))
        if correlation == correlation:
            ctx.log(pair_accuracy=(margin[labelled] > 0).float().mean(), rank_correlation=correlation)
            self._agreement = correlation if self._agreement is None else 0.9 * self._agreement + 0.1 * correlation
            if ctx.update >= 20 and self._agreement < 0.1:
                # One text for the whole run, so that it is told once; the numbers are in the metrics.
                ctx.warn(
                    "the surrogate does not rank fresh samples as the reward does (running rank correlation below "
                    "0.1); raise algorithm.surrogate_steps or surrogate.warmup, or lower train.learning_rate"
                )

    # the surrogate

    def surrogate_updates(self, collected: Collected, ctx: Context) -> Iterator[Pairs]:
        """K_2 updates; the last round is always among the pairs, the rest come from rounds before it."""
        for _ in range(self.surrogate_steps):
            winner, loser, texts = self._memory.draw(self.pairs, self.pairs_per_update, ctx.generator)
            if texts:
                pairs = Pairs(winner, loser, ctx.policy.encode(texts)).to(ctx.policy.device)
                yield replace(
                    pairs,
                    winner=pairs.winner + self.smoothing * ctx.noise(len(pairs)),
                    loser=pairs.loser + self.smoothing * ctx.noise(len(pairs)),
                )

    def surrogate_loss(self, rows: Pairs, ctx: Context) -> Tensor:
        assert ctx.surrogate is not None
        return ctx.surrogate.loss(rows.winner, rows.loser, rows.prompt)

    # the policy

    def updates(self, collected: Collected, ctx: Context) -> Iterator[PolicyRows]:
        """K_1 updates, each on states drawn from the round and on the round's captioned latents, noised anew."""
        if any(self.step_weights) and not self.unit_gradients:
            self._track(self._rows(collected.states, ctx), ctx)
        size = ctx.rows_per_update
        for _ in range(self.policy_steps):
            states = collected.states.shuffled(ctx.generator)
            rows = self._rows(states.select(torch.arange(size) % len(states)), ctx)
            if collected.pictures is not None and collected.captions is not None:
                index = torch.arange(size) % len(collected.pictures)
                noised = self._distillation.draw(collected.pictures[index], collected.captions.select(index), ctx)
                rows = replace(rows, noised=noised)
            yield rows

    def _rows(self, states: States, ctx: Context) -> PolicyRows:
        """States with all that chance decides about their scores."""
        size, draws, prompt = len(states), self.gradient_draws, states.prompt
        blur, noise = (ctx.noise(size * draws).unflatten(0, (size, draws)) for _ in range(2))
        shift = torch.randint(1, max(2, len(prompt.table)), (size,), generator=ctx.generator).to(prompt.index.device)
        other = replace(prompt, index=(prompt.index + shift) % len(prompt.table))
        return PolicyRows(states, other, self.smoothing * blur, noise)

    def _scores(self, clean: Tensor, rows: PolicyRows, ctx: Context) -> Tensor:
        """What the surrogate makes of predictions (N, *S), purified, smoothed and contrasted, (N,)."""
        assert ctx.surrogate is not None
        prompt, scores = rows.states.prompt, []
        for blur, noise in zip(rows.blur.unbind(1), rows.noise.unbind(1), strict=True):
            x = clean
            if self.purify:
                assert ctx.teacher is not None
                t = torch.full((len(x),), self.purify, device=x.device)
                x = ctx.teacher.denoise(add_noise(x, noise, *ctx.teacher.schedule(t)), t, prompt)
            score = ctx.surrogate.score(x + blur, prompt)
            if self.contrast:
                score = score - self.contrast * ctx.surrogate.score(x + blur, rows.other)
            scores.append(score)
        return torch.stack(scores).mean(0)

    @torch.enable_grad()
    def _direction(self, clean: Tensor, rows: PolicyRows, ctx: Context) -> Tensor:
        """The gradient of the scores at predictions (N, *S), each of length one."""
        clean = clean.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(self._scores(clean, rows, ctx).sum(), clean)
        return torch.nn.functional.normalize(gradient.flatten(1), dim=1).view_as(gradient)

    @torch.no_grad()
    def _track(self, rows: PolicyRows, ctx: Context) -> None:
        """Running mean and percentile of the surrogate's scores at each step, before they are used (Eq. 12)."""
        scores = self._scores(rows.states.clean, rows, ctx)
        for k in range(len(self.step_weights)):
            at = ctx.gather(scores[rows.states.step == k])
            mean, level = float(at.mean()), float(at.quantile(self.percentile))
            before, top = self._mean[k], self._level[k]
            decay = self.tracker_decay
            self._mean[k] = mean if before is None else decay * before + (1 - decay) * mean
            self._level[k] = level if top is None else decay * top + (1 - decay) * level

    def normalised(self, scores: Tensor, step: Tensor) -> Tensor:
        """(R - mean) / (percentile - mean), clipped at 1 from above and not from below (Eq. 12 and 13), (N,)."""
        mean = scores.new_tensor([m or 0.0 for m in self._mean])[step]
        level = scores.new_tensor([m or 0.0 for m in self._level])[step]
        return ((scores - mean) / (level - mean).clamp(min=MIN_SPREAD)).clamp(max=1)

    def loss(self, rows: PolicyRows, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        states = rows.states
        # With every term switched off it is still a loss: its gradient is zero.
        loss = states.x.new_zeros((), requires_grad=True)
        metrics: dict[str, Tensor] = {}
        if any(self.step_weights):
            clean = ctx.sampler.transition(ctx.policy, states.x, states.step, states.prompt).clean
            if self.unit_gradients:
                scores = (clean * self._direction(clean, rows, ctx)).flatten(1).sum(1)
            else:
                scores = self.normalised(self._scores(clean, rows, ctx), states.step)
            # The mean over rows of all steps, times K, is the sum over steps of the mean at each.
            weights = scores.new_tensor(self.step_weights)[states.step] * len(self.step_weights)
            loss = loss - (weights * scores).mean()
            metrics["reward_loss"] = loss
        if rows.noised is not None:
            assert ctx.teacher is not None
            distillation = self._distillation.loss(ctx.policy, ctx.teacher, rows.noised).mean()
            metrics["distillation_loss"] = distillation
            loss = loss + self.distillation_weight * distillation
        return loss, metrics

    # what a resumed run needs

    def state_dict(self) -> dict[str, Any]:
        return {
            "memory": self._memory.state_dict(),
            "mean": list(self._mean),
            "level": list(self._level),
            "agreement": self._agreement,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._memory.load_state_dict(state["memory"])
        self._mean, self._level = list(state["mean"]), list(state["level"])
        self._agreement = state["agreement"]
