"""RG-LCD: latent consistency distillation that raises the reward of the student's one-step prediction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from alignkit import Algorithm, Batch, Context, PolicyFacts, Prompt, Rows, Sampler, check_ranges
from alignkit.distillation import Average, Distance, Distillation, Noised
from alignkit.errors import ConfigError
from alignkit.rollout import encode_examples
from alignkit_rg_lcd.preference import Direction, RealImages, margins, preference_loss, with_real_images
from alignkit_rg_lcd.surrogate import LRM


@dataclass(frozen=True)
class Contrast(Rows):
    """Batches of captioned latents, contrasted with each other within a batch. N batches of M."""

    latents: Tensor
    """(N, M, *S)."""
    prompt: Prompt
    """With an index (N, M)."""


@dataclass(frozen=True)
class Compared(Rows):
    """Three latents of each caption with the rewards of the expert, N rows."""

    latents: Tensor
    """(N, 3, *S) of the real image, the student's prediction and the target (z_0, z_1, z_2)."""
    expert: Tensor
    """(N, 3) rewards; NaN where an image could not be scored."""
    prompt: Prompt


@dataclass(frozen=True)
class Collected:
    """One round: rows for the policy and rows for the proxy, None for the one that does not learn from it."""

    noised: Noised | None
    lesson: Contrast | Compared | None


@dataclass
class RGLCD(Algorithm[Collected, Noised]):
    """RG-LCD (Li et al. 2024, arXiv 2403.11027).

    The distillation loss minus beta times the reward of the prediction that it makes anyway (Eq. 11). The gradient is
    the reward's, through the decoder, or, with `proxy`, that of a latent reward model (LRM) which learns in every round
    to prefer what the reward prefers (Eq. 12); the reward may then be any black box.
    """

    samples_images: ClassVar[bool] = False
    default_surrogate: ClassVar[str] = "lrm"
    surrogate_type: ClassVar[type] = LRM

    beta: Annotated[float, Ge(0)] = 1.0
    """Weight of the reward. The paper has 5 for CLIPScore and PickScore, 1 for ImageReward and HPSv2.1; 0 is plain
    distillation, the control run."""
    proxy: bool = False
    """Follow the latent proxy (surrogate lrm) instead of the reward itself. Rounds of surrogate.warmup are its
    pre-training, with CLIP's loss on captioned images."""
    pretraining: Annotated[int, Ge(0)] | None = None
    """Rounds of surrogate.warmup that are the pre-training; in the others the proxy learns from the expert while the
    policy waits. Left out: all of them, and both learn from the first round on, as in the paper."""
    reward_cap: float | None = None
    """Without the proxy: rewards above this have no gradient. The released code has 2 for ImageReward."""
    kl: Direction = "forward"
    """forward: KL(expert || proxy), as the released code; reverse: KL(proxy || expert), as the paper prints."""
    expert_temperature: Annotated[float, Gt(0)] = 0.01
    """tau_E: two rewards that differ by it have odds of e to 1. 0.01 suits cosines (CLIP, HPS); take a small one for a
    reward that only ranks two images."""
    real_images: RealImages = "judged"
    """Preference of the expert between a real image and a predicted one. "judged": by their rewards; "never_worse": the
    same, but at least even; "always_best": the real image is better."""
    proxy_rows: Annotated[int, Ge(1)] = 16
    """Rows that the expert scores in a round (three images each) for the proxy to learn from; at most those of the
    update."""
    target_decay: Annotated[float, Ge(0), Lt(1)] = 0.95
    """mu, decay of the average of the student that gives the target of the distillation; 0: the student itself, as for
    LCM-LoRA."""
    ode_steps: Annotated[int, Ge(1)] = 50
    """Solver steps; must be what the student's sampler counts as original steps."""
    guidance_scale_min: float = 6.0
    """Smallest guidance scale of the teacher (w + 1 of the LCM paper)."""
    guidance_scale_max: float = 16.0
    """Largest guidance scale of the teacher."""
    huber_c: Annotated[float, Gt(0)] = 1e-3
    """Difference at which the pseudo-Huber distance turns from quadratic to linear."""
    distance: Distance = "huber"
    """Distance between prediction and target: pseudo-Huber, as in the LCM paper, or l2, the square, the default of
    diffusers' script."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.pretraining is not None and not self.proxy:
            raise ValueError("pretraining: found without proxy; leave it out, or set proxy = true")
        self._distillation = Distillation(
            self.ode_steps, self.guidance_scale_min, self.guidance_scale_max, self.huber_c, self.distance
        )
        self._target = Average(self.target_decay)
        self._pretrained = 0

    @property
    def needs(self) -> frozenset[str]:
        followed = {"surrogate"} if self.proxy else {"differentiable_reward"} if self.beta else set()
        return frozenset({"teacher", "images"} | followed)

    @property
    def uses_rewards(self) -> bool:
        return self.proxy or self.beta > 0

    def check(self, sampler: Sampler, facts: PolicyFacts) -> None:
        self._distillation.check(sampler, facts)

    def setup(self, ctx: Context) -> None:
        self._target.start(ctx.policy)

    # collect: captioned latents, noised; with the proxy, rewards of some of them

    def collect(self, batch: Batch, ctx: Context) -> Collected:
        assert batch.images is not None  # needs "images"
        latents, prompt = ctx.policy.encode_images(batch.images), encode_examples(ctx.policy, batch.captions)
        if ctx.warming_up and (self.pretraining is None or self._pretrained < self.pretraining):
            self._pretrained += 1
            return Collected(None, Contrast(latents[None], replace(prompt, index=prompt.index[None])))
        if self._pretrained < (self.pretraining or 0):
            raise ConfigError(
                f"algorithm.pretraining: found {self.pretraining}, expected at most surrogate.warmup, which is "
                f"{self._pretrained}"
            )
        noised = self._distillation.sample(latents, prompt, ctx)
        return Collected(None if ctx.warming_up else noised, self._compare(noised, ctx) if self.proxy else None)

    def _compare(self, noised: Noised, ctx: Context) -> Compared:
        rows = noised.select(torch.randperm(len(noised), generator=ctx.generator)[: self.proxy_rows])
        prediction, target = self._predict(rows, ctx)
        examples = rows.prompt.examples
        student = ctx.score(prediction, examples)  # the reward that the run reports
        real, average = (ctx.score(z, examples, log=False) for z in (rows.latents, target))
        compared = Compared(
            torch.stack([rows.latents, prediction, target], dim=1),
            torch.stack([s.values.masked_fill(~s.valid, torch.nan) for s in (real, student, average)], dim=1),
            rows.prompt,
        )
        self._measure(compared, ctx)
        return compared

    def _measure(self, rows: Compared, ctx: Context) -> None:
        """Log how the proxy ranks latents that it has not learned from."""
        assert isinstance(ctx.surrogate, LRM)
        proxy = ctx.surrogate.score(rows.latents.flatten(0, 1), _thrice(rows.prompt)).view_as(rows.expert)
        found, expected = margins(proxy), margins(rows.expert)
        decided = expected.isfinite() & (expected != 0)
        ctx.log(proxy_score=proxy[:, 1].mean(), decided_pairs=decided.float().mean())
        if bool(decided.any()):
            ctx.log(pair_accuracy=(found.sign() == expected.sign())[decided].float().mean())
        for name, values in (("real", rows.expert[:, 0]), ("target", rows.expert[:, 2])):
            if bool(values.isfinite().any()):
                ctx.log(**{f"reward/{name}": values.nanmean()})

    # the proxy

    def surrogate_updates(self, collected: Collected, ctx: Context) -> Iterator[Contrast | Compared]:
        """Yield one update: of CLIP's loss in the pre-training, towards the expert (Eq. 12) after it."""
        if collected.lesson is not None:
            yield collected.lesson

    def surrogate_loss(self, rows: Contrast | Compared, ctx: Context) -> Tensor:
        lrm = ctx.surrogate
        assert isinstance(lrm, LRM)
        if isinstance(rows, Contrast):
            # A batch is one row: a caption is contrasted with all others of it, however rows are split for memory.
            losses = [
                lrm.contrastive_loss(latents, replace(rows.prompt, index=index))
                for latents, index in zip(rows.latents, rows.prompt.index, strict=True)
            ]
            return torch.stack(losses).mean()
        scores = lrm.finetuning_score(rows.latents.flatten(0, 1), _thrice(rows.prompt)).view_as(rows.expert)
        expert = with_real_images(margins(rows.expert) / self.expert_temperature, self.real_images)
        return preference_loss(lrm.scale() * margins(scores), expert, self.kl)

    # the policy

    def updates(self, collected: Collected, ctx: Context) -> Iterator[Noised]:
        if collected.noised is not None:
            yield from collected.noised.split(ctx.rows_per_update)

    def _predict(self, rows: Noised, ctx: Context) -> tuple[Tensor, Tensor]:
        """Return the prediction of the student and that of its target, (N, *S) both."""
        assert ctx.teacher is not None  # needs "teacher"
        return self._distillation.predictions(ctx.policy, ctx.teacher, rows, self._target.weights)

    def loss(self, rows: Noised, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        prediction, target = self._predict(rows, ctx)
        distillation = self._distillation.distances(prediction, target).mean()
        if not self.beta:
            return distillation, {"distillation_loss": distillation}
        reward_loss = -self.beta * self._reward(prediction, rows.prompt, ctx)
        return distillation + reward_loss, {"distillation_loss": distillation, "reward_loss": reward_loss}

    def _reward(self, prediction: Tensor, prompt: Prompt, ctx: Context) -> Tensor:
        """Return J of Eq. 10, the mean over rows; an image that cannot be scored counts as 0 and has no gradient."""
        if self.proxy:
            assert ctx.surrogate is not None
            return ctx.surrogate.score(prediction, prompt).mean()
        scores = ctx.differentiable_score(prediction, prompt.examples, log=True)
        values = scores.values.masked_fill(~scores.valid, 0)
        if self.reward_cap is not None:
            values = values.clamp(max=self.reward_cap)
        return values.mean()

    def after_update(self, ctx: Context) -> None:
        self._target.follow(ctx.policy)

    # what a resumed run needs

    def state_dict(self) -> dict[str, Any]:
        return {**self._target.state_dict(), "pretrained": self._pretrained}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._target.load_state_dict(state)
        self._pretrained = state["pretrained"]


def _thrice(prompt: Prompt) -> Prompt:
    """Repeat each row three times, one after the other."""
    return prompt.select(torch.arange(len(prompt)).repeat_interleave(3))
