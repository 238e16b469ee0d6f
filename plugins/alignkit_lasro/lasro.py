"""LaSRO as its paper has it: reward fine-tuning of two-step models through a learned latent-space surrogate reward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt, MinLen
from torch import Tensor

from alignkit import Algorithm, Batch, Context, PolicyFacts, Prompt, Sampler, check_ranges
from alignkit.distillation import Distillation
from alignkit.errors import ConfigError
from alignkit.groups import Pairs, Scored, best_and_worst, log_agreement, log_rewards
from alignkit.rollout import States, encode_examples, sample_trajectories, states_of

MIN_SPREAD = 1e-6
"""Smallest distance of percentile and mean that scores are divided by: a guard against 0 alone."""


@dataclass
class Tracker:
    """Running mean of a score and of its upper percentile (Eq. 12), corrected for its start as Adam's averages are.

    Without the correction the first round would weigh as much as all later ones together for a long time.
    """

    mean: float = 0.0
    level: float = 0.0
    weight: float = 0.0
    """Sum of the weights of all rounds so far; 0 before the first."""

    def see(self, mean: float, level: float, decay: float) -> None:
        """Add the mean and the percentile of a round."""
        self.mean = decay * self.mean + (1 - decay) * mean
        self.level = decay * self.level + (1 - decay) * level
        self.weight = decay * self.weight + (1 - decay)

    @property
    def bounds(self) -> tuple[float, float]:
        """Mean and percentile; (0, 1) before the first round."""
        return (self.mean / self.weight, self.level / self.weight) if self.weight else (0.0, 1.0)


@dataclass(frozen=True)
class Collected:
    """One round: states to improve from, and samples scored by the true reward under the batch's prompts."""

    states: States
    scored: Scored
    prompt: Prompt


@dataclass
class LaSRO(Algorithm[Collected, States]):
    """LaSRO (Jia et al., CVPR 2025, arXiv 2411.15247).

    A surrogate learns from pairs of samples which of them the true reward prefers (Eq. 10); the policy follows the
    surrogate's gradient at every step of its sampler, normalised and clipped (Eq. 12 and 13), together with a latent
    consistency distillation term (Eq. 11): the regulariser `lcd`, whose weight is lambda. "Not known" marks a number
    that the paper does not print; the default is then ours.
    """

    default_surrogate: ClassVar[str] = "latent_unet"
    default_regularisers: ClassVar[Mapping[str, float]] = {"lcd": 1.0}

    samples: Annotated[int, Ge(1)] = 4
    """N_s, initial noises of each prompt; not known. A pair takes two samples whose rewards differ: 6 or more for
    coarse rewards, such as a share of yes/no answers."""
    step_weights: Annotated[list[float], MinLen(1)] = field(default_factory=lambda: [1.0, 1.0])
    """c_1, c_2, ...: the weight of the reward term at each sampler step; not known. All zero is the control run."""
    policy_steps: Annotated[int, Ge(1)] = 1
    """K_1, policy updates of each round; not known."""
    fresh_samples: bool = False
    """Sample new trajectories for each of the K_1 updates, as Algorithm 2 does, instead of following those that were
    scored."""
    surrogate_steps: Annotated[int, Ge(0)] = 1
    """K_2, surrogate updates of each round; not known; more for coarse rewards. 0: it stays as surrogate.init or the
    warm-up, with one update a round, left it."""
    pairs_per_update: Annotated[int, Ge(1)] = 64
    """Largest number of pairs in one surrogate update; not known."""
    percentile: Annotated[float, Gt(0), Le(1)] = 0.95
    """Share of surrogate scores below the level above which a score has no gradient (Eq. 13); not known."""
    tracker_decay: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Decay of the running mean and percentile of the surrogate's scores (Eq. 12), corrected for their start; not
    known. A longer memory follows rising scores too slowly: most are cut off."""
    gradient_of: Literal["surrogate", "reward"] = "surrogate"
    """Ablation (e): follow the gradient of the surrogate, or without a surrogate that of a differentiable reward,
    through the decoder."""
    states_from: Literal["rollout", "images"] = "rollout"
    """Ablation (b): apply the reward term to the steps of the policy's own trajectories, or to captioned images noised
    to a random time of the distillation's solver."""
    ode_steps: Annotated[int, Ge(1)] = 50
    """Solver steps of the distillation, for states_from = "images"; must be what the model was distilled with."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.samples < 2 and self.gradient_of == "surrogate":
            raise ValueError(f"samples: found {self.samples}, expected 2 or more: a pair takes two of one prompt")
        self._distillation = Distillation(self.ode_steps)
        # Noised images belong to no step: each has the mean of the weights, and all share a scale.
        steps, rollout = len(self.step_weights), self.states_from == "rollout"
        self._weights = self.step_weights if rollout else [sum(self.step_weights) / steps]
        self._trackers = [Tracker() for _ in self._weights]
        self._agreement: float | None = None

    @property
    def needs(self) -> frozenset[str]:
        needed = {"surrogate" if self.gradient_of == "surrogate" else "differentiable_reward"}
        return frozenset(needed | ({"images"} if self.states_from == "images" else set()))

    def check(self, sampler: Sampler, facts: PolicyFacts) -> None:
        if self.states_from == "images" and facts.num_times is not None:
            self._distillation.check_steps(facts.num_times, "algorithm.ode_steps")
        if sampler.num_steps != len(self.step_weights):
            weights = ",".join(["1.0"] * sampler.num_steps)
            raise ConfigError(
                f"algorithm.step_weights: found {len(self.step_weights)} weights for sampler.num_steps = "
                f"{sampler.num_steps}; give one a step, as --set algorithm.step_weights=[{weights}]"
            )

    @property
    def own_samples(self) -> int:
        """The first samples of each group, which are the policy's own; here all."""
        return self.samples

    # Algorithm 2: sample and score

    def collect(self, batch: Batch, ctx: Context) -> Collected:
        prompt = encode_examples(ctx.policy, batch.examples)
        states, scored = self.sample(batch, ctx)
        log_rewards(scored, self.own_samples, ctx)
        if self.gradient_of == "surrogate":
            self._warn_of_ranking(*log_agreement(scored, prompt, self.own_samples, ctx), ctx)
        states = states if self.states_from == "rollout" else self._noised(batch, ctx)
        if ctx.warming_up:
            self.track(states, ctx)
        return Collected(states, scored, prompt)

    def sample(self, batch: Batch, ctx: Context) -> tuple[States, Scored]:
        """Sample N_s trajectories of each prompt and score the predicted clean latent of every step."""
        trajectories = sample_trajectories(batch.examples, ctx, self.samples)
        groups = []
        for clean in trajectories.clean.unbind(1):
            scores = ctx.score(clean, trajectories.prompt.examples)
            rewards = scores.values.masked_fill(~scores.valid, torch.nan).float().to(clean.device)
            groups.append((clean.unflatten(0, (-1, self.samples)), rewards.view(-1, self.samples)))
        return states_of(trajectories), scored_groups(groups)

    def _noised(self, batch: Batch, ctx: Context) -> States:
        """Noise captioned latents to random times of the distillation's solver."""
        assert batch.images is not None  # needs "images"
        captions = encode_examples(ctx.policy, batch.captions)
        noised = self._distillation.sample(ctx.policy.encode_images(batch.images), captions, ctx)
        x, time = self._distillation.noised(ctx.policy, noised)
        return States(x, torch.zeros_like(time), captions, ctx.policy.denoise(x, time, captions), time)

    def _warn_of_ranking(self, opinionated: bool, correlation: float | None, ctx: Context) -> None:
        """Warn if the surrogate scores all samples alike, or ranks new samples unlike the reward."""
        if not opinionated and not self.surrogate_steps and not ctx.warming_up:
            ctx.warn(
                "the surrogate gives all samples the same score, so there is nothing to follow, and with "
                "algorithm.surrogate_steps = 0 it never learns; set surrogate.init or surrogate.warmup"
            )
        if correlation is not None:
            self._agreement = correlation if self._agreement is None else 0.9 * self._agreement + 0.1 * correlation
            if ctx.update >= 20 and self._agreement < 0.1:
                # One text for the whole run, so that it is shown once; the numbers are in the metrics.
                ctx.warn(
                    "the surrogate does not rank fresh samples as the reward does (running rank correlation below "
                    "0.1); raise algorithm.surrogate_steps or surrogate.warmup, or lower train.learning_rate"
                )

    # Eq. 10: the surrogate learns from the best and the worst sample of each group

    def surrogate_updates(self, collected: Collected, ctx: Context) -> Iterator[Pairs]:
        """Yield the pairs of each of K_2 updates."""
        for _ in range(self.surrogate_steps or int(ctx.warming_up)) if self.gradient_of == "surrogate" else ():
            pairs = self.pairs_of(collected, ctx)
            if pairs is not None:
                yield pairs

    def pairs_of(self, collected: Collected, ctx: Context) -> Pairs | None:
        """Pair the best with the worst of each group; at most `pairs_per_update` groups, chosen at random.

        None where no group carries a label.
        """
        return best_and_worst(collected.scored, collected.prompt, self.pairs_per_update, ctx.generator)

    def surrogate_loss(self, rows: Pairs, ctx: Context) -> Tensor:
        assert ctx.surrogate is not None
        return ctx.surrogate.loss(rows.winner, rows.loser, rows.prompt)

    # Eq. 11 to 13: the policy follows the surrogate

    def updates(self, collected: Collected, ctx: Context) -> Iterator[States]:
        """Yield the states of each of K_1 updates, in random order; the trackers see states before an update does."""
        states, fresh = collected.states, self.fresh_samples and self.states_from == "rollout"
        for number in range(self.policy_steps):
            if fresh:
                states = self._fresh(collected.prompt, ctx)
            if any(self.step_weights) and (fresh or number == 0):
                self.track(states, ctx)
            chosen = states.shuffled(ctx.generator).select(torch.arange(ctx.rows_per_update) % len(states))
            yield self.rows_of(chosen, ctx)

    @torch.no_grad()
    def _fresh(self, prompt: Prompt, ctx: Context) -> States:
        """Sample as many new trajectories as an update has rows for."""
        wanted = -(-ctx.rows_per_update // ctx.sampler.num_steps)
        examples = list(prompt.examples)
        return states_of(sample_trajectories((examples * -(-wanted // len(examples)))[:wanted], ctx))

    def rows_of(self, states: States, ctx: Context) -> States:
        """Return the rows of an update; additions attach their random numbers here."""
        return states

    def loss(self, rows: States, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the reward terms of Eq. 11, sum over k of c_k E S(R(x_k, c)); the trainer adds lambda L_lcd."""
        clean = rows.predict(ctx)
        if not any(self.step_weights):  # regularisers may use the prediction; on its own it has no gradient
            return clean.new_zeros((), requires_grad=True), {}
        # The mean over rows of all steps, times K, is the sum over steps of the mean at each.
        weights = clean.new_tensor(self._weights)[rows.step] * len(self.step_weights)
        pull, metrics = self.pull(clean, rows, ctx)
        loss = -(weights * pull).mean()
        return loss, {"reward_loss": loss, **metrics}

    def pull(self, clean: Tensor, rows: States, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Return -S(R) of predictions (N, *S), (N,) (Eq. 13), and metrics; 0 where the reward cannot score an image."""
        pull = self.normalised(self.score(clean, rows, ctx), rows.step)
        pull = pull.masked_fill(pull.isnan(), 0) if self.gradient_of == "reward" else pull
        return pull, {"clipped": (pull >= 1).float().mean()}

    def score(self, clean: Tensor, rows: States, ctx: Context) -> Tensor:
        """Score predictions (N, *S) by the surrogate, or by the reward (ablation (e)), (N,).

        NaN, without a gradient, where the reward cannot score an image.
        """
        return self.score_under(clean, rows.prompt, ctx)

    def score_under(self, clean: Tensor, prompt: Prompt, ctx: Context) -> Tensor:
        """Score latents (N, *S) under prompts, (N,)."""
        if self.gradient_of == "surrogate":
            assert ctx.surrogate is not None
            return ctx.surrogate.score(clean, prompt)
        # Without gradient the images are decoded a few at a time.
        score = ctx.differentiable_score if torch.is_grad_enabled() else ctx.score
        found = score(clean, prompt.examples, log=False)
        return found.values.masked_fill(~found.valid, torch.nan)

    @torch.no_grad()
    def track(self, states: States, ctx: Context) -> None:
        """Update the running mean and percentile of the scores at each step, before they are used (Eq. 12)."""
        rows = self.rows_of(states, ctx)
        scores = self.score(rows.clean, rows, ctx)
        for k in range(len(self._weights)):
            at = ctx.gather(scores[rows.step == k])
            at = at[~at.isnan()]
            if not len(at):
                continue
            self._trackers[k].see(float(at.mean()), float(at.quantile(self.percentile)), self.tracker_decay)

    def normalised(self, scores: Tensor, step: Tensor) -> Tensor:
        """Return (R - mean) / (percentile - mean), clipped at 1 from above and not from below (Eq. 12 and 13), (N,)."""
        mean, level = scores.new_tensor([tracker.bounds for tracker in self._trackers])[step].unbind(1)
        return ((scores - mean) / (level - mean).clamp(min=MIN_SPREAD)).clamp(max=1)

    def state_dict(self) -> dict[str, Any]:
        return {"trackers": [asdict(tracker) for tracker in self._trackers], "agreement": self._agreement}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._trackers, self._agreement = [Tracker(**saved) for saved in state["trackers"]], state["agreement"]


def scored_groups(steps: list[tuple[Tensor, Tensor]]) -> Scored:
    """Join (latents (B, M, *S), rewards (B, M)) of every step.

    Groups share prompt and step: across steps the pairs would teach that more steps look better.
    """
    latents, rewards = (torch.cat(column) for column in zip(*steps, strict=True))
    prompts = len(steps[0][1])
    text = torch.arange(prompts).repeat(len(steps))
    return Scored(latents, rewards, text, torch.arange(len(steps)).repeat_interleave(prompts))
