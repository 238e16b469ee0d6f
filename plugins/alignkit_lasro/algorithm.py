"""LaSRO: reward fine-tuning of two-step diffusion models through a learned latent-space surrogate reward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from alignkit.distillation import Distillation
from alignkit.errors import ConfigError
from alignkit.interfaces import Algorithm, Context, Sampler
from alignkit.records import Batch, Prompt
from alignkit_lasro.critic import Critic, GradientOf, PolicyRows
from alignkit_lasro.measure import measure_rewards, measure_surrogate
from alignkit_lasro.memory import Memory
from alignkit_lasro.pairs import Pairs, Scored
from alignkit_lasro.sampling import Sampling, States


@dataclass(frozen=True)
class Collected:
    """One round: samples scored by the true reward, states to improve from, captioned latents."""

    states: States
    scored: Scored
    texts: list[str]
    images: Tensor | None
    captions: Prompt | None


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
    """lambda of Eq. 11; 0 needs neither teacher nor images (models distilled with a discriminator)."""
    reference_weight: float = 0.0
    """Weight of the mean squared distance between the predictions and those of the model before training. The
    gradient of few samples is mostly noise; this pulls back moves that later rounds do not repeat, so that larger
    learning rates become possible. Also for models without a distillation loss."""
    gradient_of: GradientOf = "surrogate"
    """Whose gradient the policy follows: the surrogate's, or that of the reward itself, through the decoder, which
    takes a differentiable reward and no surrogate."""
    states_from: Literal["rollout", "images"] = "rollout"
    """Where the policy is asked for what the reward term improves: at the steps of its own walks from noise, or, as
    most methods do, at captioned images noised to a random time of the distillation."""
    policy_steps: int = 1
    """K_1, policy updates a round."""
    surrogate_steps: int = 2
    """K_2, surrogate updates a round. With 0 it is not adapted online: it stays what surrogate.init or the warm-up,
    with one update a round, made of it."""
    replay: int = 1
    """Rounds of scored samples that are kept for the surrogate. With 1, as in the paper, it sees each sample in its own
    round only; where the true reward is the expensive part of a round, more make more of it."""
    pairs: Literal["extremes", "random"] = "extremes"
    """Which two samples of a group make a pair: best and worst, as in the paper, or any two whose rewards differ."""
    pairs_per_update: int = 64
    """Pairs in one surrogate update, at the most."""
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
    it. Its gradient is then that of an average over a neighbourhood, and points less often where no image is."""
    purify: int = 0
    """Time of the schedule (1 to 999) to which the policy's prediction is noised, and from which the teacher denoises
    it, before the surrogate scores it for the policy: diffusion purification (Nie et al., ICML 2022). The gradient then
    comes through the teacher, which lets pass what leads to another image and damps what merely fools the surrogate.
    0 leaves it out."""
    contrast: float = 0.0
    """How much of a sample's surrogate score under another prompt of the batch is taken off that under its own before
    the policy follows it. What scores better under every prompt is how a policy first fools a surrogate, since pairs,
    which share a prompt, say little of it; with 1 it cancels, and what is left is what this prompt asks for."""
    gradient_samples: int = 1
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
    guidance_scale_min: float = 6.0
    """Smallest guidance scale of the teacher in the distillation term."""
    guidance_scale_max: float = 16.0
    """Largest guidance scale of the teacher in the distillation term."""

    def __post_init__(self) -> None:
        if self.samples < 2 and self.gradient_of == "surrogate":
            raise ValueError(f"samples is {self.samples}, expected at least 2: a pair takes two samples of one prompt")
        for name in ("samples", "policy_steps", "pairs_per_update", "replay", "gradient_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 <= self.reference_samples < self.samples:
            raise ValueError(
                f"reference_samples is {self.reference_samples}, expected 0 to {self.samples - 1}, less than samples"
            )
        if not 0 <= self.noise_correlation < 1:
            raise ValueError(f"noise_correlation is {self.noise_correlation}, expected at least 0 and less than 1")
        if not 0 <= self.purify <= 999:
            raise ValueError(f"purify is {self.purify}, expected a time of the schedule, 1 to 999, or 0 for none")
        if not 0 < self.percentile <= 1:
            raise ValueError(f"percentile is {self.percentile}, expected more than 0 and at most 1")
        for name in ("smoothing", "negatives", "restart_every", "surrogate_steps", "reference_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more")
        needed = {
            "surrogate": self.gradient_of == "surrogate",
            "differentiable_reward": self.gradient_of == "reward",
            "teacher": self.distillation_weight or self.purify,
            "images": self.distillation_weight or self.states_from == "images",
        }
        self.needs = frozenset(name for name, wanted in needed.items() if wanted)  # type: ignore[misc]
        self._distillation = Distillation(self.ode_steps, self.guidance_scale_min, self.guidance_scale_max)
        # Negatives are for the surrogate alone.
        negatives = self.negatives if self.gradient_of == "surrogate" else 0
        self._sampling = Sampling(self.samples, self.reference_samples, self.noise_correlation, negatives)
        self._memory = Memory(self.replay, self._sampling.own, self.samples)
        # Noised images belong to no step: each has the mean of the weights, and all share a scale.
        steps, walks = len(self.step_weights), self.states_from == "rollout"
        self._weights = self.step_weights if walks else [sum(self.step_weights) / steps]
        self._critic = Critic(
            self.gradient_of, self.smoothing, self.purify, self.contrast, self.gradient_samples,
            self.percentile, self.tracker_decay, num_steps=steps if walks else 1,
        )  # fmt: skip
        self._agreement: float | None = None

    def check(self, sampler: Sampler) -> None:
        if self.distillation_weight:
            self._distillation.check(sampler)
        if sampler.num_steps != len(self.step_weights):
            weights = ",".join(["1.0"] * sampler.num_steps)
            raise ConfigError(
                f"algorithm.step_weights: found {len(self.step_weights)} weights for sampler.num_steps = "
                f"{sampler.num_steps}; give one a step, as --set algorithm.step_weights=[{weights}]"
            )

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
        texts, images, captions = [e.text for e in batch.examples], None, None
        self._contrastable(batch.captions if self.states_from == "images" else texts)
        self._critic.read(batch.examples)
        states, scored = self._sampling.draw(batch, ctx)
        measure_rewards(scored, self._sampling.own, self.samples, ctx)
        if self.gradient_of == "surrogate":
            self._measure(scored, ctx.policy.encode(texts), ctx)
            self._memory.add(scored, texts)
        if batch.images is not None:
            images, captions = ctx.policy.encode_images(batch.images), ctx.policy.encode(batch.captions)
            if self.states_from == "images":
                states = self._noised(images, captions, ctx)
        return Collected(states, scored, texts, images, captions)

    def _contrastable(self, texts: Sequence[str]) -> None:
        if self.contrast and len(set(texts)) < 2:
            alone = len(texts) == 1
            remedy = "raise data.batch_size" if alone else "train on more prompts, or set algorithm.contrast = 0"
            raise ConfigError(
                f"algorithm.contrast: found one text in the batch, {texts[0]!r}, expected two or more to contrast; "
                f"{remedy}"
            )

    def _noised(self, images: Tensor, captions: Prompt, ctx: Context) -> States:
        """Captioned latents, noised to random times of the distillation's solver."""
        x, time = self._distillation.noised(ctx.policy, self._distillation.draw(images, captions, ctx))
        return States(x, torch.zeros_like(time), captions, ctx.policy.denoise(x, time, captions), time)

    def _measure(self, scored: Scored, texts: Prompt, ctx: Context) -> None:
        """How the surrogate ranks samples that it has not learned from yet; `texts` are what `scored.text` counts."""
        opinionated, correlation = measure_surrogate(scored, texts, self._sampling.own, ctx)
        if not opinionated and not self.surrogate_steps and not ctx.warming_up:
            ctx.warn(
                "the surrogate gives all samples the same score, so there is nothing to follow, and with "
                "algorithm.surrogate_steps = 0 it never learns; set surrogate.init or surrogate.warmup"
            )
        if correlation is not None:
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
        if self.gradient_of == "reward":
            return
        for _ in range(self.surrogate_steps or int(ctx.warming_up)):
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
            self._critic.track(self._critic.rows(collected.states, ctx), ctx)
        size = ctx.rows_per_update
        for _ in range(self.policy_steps):
            states = collected.states.shuffled(ctx.generator)
            rows = self._critic.rows(states.select(torch.arange(size) % len(states)), ctx)
            if self.distillation_weight and collected.images is not None and collected.captions is not None:
                index = torch.arange(size) % len(collected.images)
                noised = self._distillation.draw(collected.images[index], collected.captions.select(index), ctx)
                rows = replace(rows, noised=noised)
            yield rows

    def loss(self, rows: PolicyRows, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 11, and the pull to the model before training where it is asked for."""
        states = rows.states
        # With every term switched off it is still a loss: its gradient is zero.
        loss = states.x.new_zeros((), requires_grad=True)
        metrics: dict[str, Tensor] = {}
        if any(self.step_weights) or self.reference_weight:
            clean = states.predict(ctx)
        if any(self.step_weights):
            pull = self._critic.pull(clean, rows, ctx, self.unit_gradients)
            # The mean over rows of all steps, times K, is the sum over steps of the mean at each.
            weights = pull.new_tensor(self._weights)[states.step] * len(self.step_weights)
            loss = loss - (weights * pull).mean()
            metrics["reward_loss"] = loss
        if self.reference_weight:
            with ctx.policy.reference():
                before = states.predict(ctx)
            metrics["reference_loss"] = (clean - before).pow(2).mean()
            loss = loss + self.reference_weight * metrics["reference_loss"]
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
            **self._critic.state_dict(),
            "agreement": self._agreement,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._memory.load_state_dict(state["memory"])
        self._critic.load_state_dict(state)
        self._agreement = state["agreement"]
