"""DDPO: clipped policy gradient over the stochastic steps of a sampler; on consistency models it is RLCM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from alignkit import Algorithm, Batch, Context, PolicyFacts, Prompt, Rows, Sampler, Transition, check_ranges, diffusion
from alignkit.advantage import Baseline, clipped
from alignkit.errors import ConfigError
from alignkit.rollout import Trajectories, choose_steps, sample_trajectories


@dataclass(frozen=True)
class Steps(Rows):
    """Stochastic steps of scored trajectories, N rows."""

    x: Tensor
    """(N, *S) the latent before the step."""
    x_next: Tensor
    """(N, *S) the latent that was sampled."""
    k: Tensor
    """(N,) the step's number in the sampler."""
    prompt: Prompt
    advantage: Tensor
    """(N,) of the image at the end of the trajectory, the same for all its steps."""
    old_log_prob: Tensor | None = None
    """(N,) of `x_next` under the policy that sampled it."""


@dataclass
class DDPO(Algorithm[Steps, Steps]):
    """DDPO with importance sampling (Black et al. 2023, arXiv 2305.13301).

    Each stochastic step of a trajectory is an action, sampled from a normal distribution; the image's advantage weights
    each step's likelihood ratio, clipped as in PPO. With the `lcm` sampler this is RLCM (Oertell et al. 2024, arXiv
    2404.03673). A deterministic step has no likelihood and is left out.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"stochastic_steps"})
    takes_advantages: ClassVar[bool] = True

    samples: Annotated[int, Ge(1)] = 4
    """Trajectories of each prompt in a round. For baseline = "group" 8 or more are meant."""
    baseline: Literal["prompt", "batch", "group"] = "prompt"
    """Normalise a reward by the last rewards of the same prompt (RLCM), by those of the round, or by those of the same
    prompt in the round (Flow-GRPO, arXiv 2505.05470); then prompts whose images all got one score are left out."""
    buffer_size: int = 32
    """Rewards of a prompt that are kept, as in RLCM."""
    min_count: Annotated[int, Ge(1)] = 16
    """Rewards that a prompt needs to be normalised by its own; until then it is by those of the round."""
    advantage_clip: Annotated[float, Gt(0)] = 5.0
    """Clamp advantages to this size; RLCM takes 10."""
    clip_range: Annotated[float, Gt(0)] = 1e-4
    """Distance from 1 at which the likelihood ratio is clipped. It belongs to `reduction` and to the latents' size."""
    reduction: Literal["mean", "sum"] = "mean"
    """The log-probability over latent dimensions. The papers write the sum, their code takes the mean."""
    inner_epochs: Annotated[int, Ge(1)] = 1
    """Passes over the steps of a round."""
    step_fraction: Annotated[float, Gt(0), Le(1)] = 1.0
    """Share of stochastic steps to learn from, chosen anew for each trajectory."""
    final_step: Literal["drop", "renoise"] = "drop"
    """A deterministic last step: left out, or noised again to its own level as one more action (RLCM's code), which no
    image depends on."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.baseline == "group" and self.samples < 2:
            raise ValueError(f'samples: found {self.samples}, expected 2 or more with baseline = "group"; 8 are meant')
        self._baseline = Baseline(self.baseline, self.buffer_size, self.min_count)

    def check(self, sampler: Sampler, facts: PolicyFacts) -> None:
        if self.final_step == "renoise" and sampler.stochastic_steps() != sampler.num_steps - 1:
            raise ConfigError(
                f'algorithm.final_step: found "renoise" for a sampler with {sampler.stochastic_steps()} stochastic '
                f"of {sampler.num_steps} steps, expected one whose last step alone is deterministic, as lcm's is; "
                'set it to "drop"'
            )

    def collect(self, batch: Batch, ctx: Context) -> Steps:
        """Sample trajectories, score their images, and take every stochastic step as a row."""
        trajectories = sample_trajectories(batch.examples, ctx, self.samples)
        scores = ctx.score(trajectories.samples, trajectories.prompt.examples)
        advantage = self._baseline.advantages(scores, trajectories.prompt.examples, ctx)
        x_next, stochastic = self._actions(trajectories, ctx)
        k = choose_steps(stochastic, len(trajectories), self.step_fraction, ctx.generator)
        row, k = torch.arange(len(k), device=k.device).repeat_interleave(k.shape[1]), k.flatten()
        steps = Steps(trajectories.states[row, k], x_next[row, k], k, trajectories.prompt.select(row), advantage[row])
        return steps.select((~steps.advantage.isnan()).nonzero()[:, 0])

    def updates(self, collected: Steps, ctx: Context) -> Iterator[Steps]:
        """Yield the steps in random order, in parts of nearly `ctx.rows_per_update`, once each inner epoch."""
        steps, size = collected.shuffled(ctx.generator), ctx.rows_per_update
        if not len(steps):
            return
        # Computed again instead of kept from the trajectory: at the first update the ratio is then 1 exactly.
        with torch.no_grad():
            old = torch.cat([self.log_prob(part, ctx) for part in steps.even_split(size)])
        steps = replace(steps, old_log_prob=old)
        for epoch in range(self.inner_epochs):
            yield from (steps.shuffled(ctx.generator) if epoch else steps).even_split(size)

    def loss(self, rows: Steps, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        assert rows.old_log_prob is not None
        log_ratio = self.log_prob(rows, ctx) - rows.old_log_prob
        advantage = rows.advantage.clamp(-self.advantage_clip, self.advantage_clip)
        loss = clipped(log_ratio, advantage, self.clip_range).mean()
        return loss, {
            "policy_loss": loss,
            "clip_fraction": ((log_ratio.exp() - 1).abs() > self.clip_range).float().mean(),
            "log_ratio": log_ratio.mean(),
            "log_ratio_size": log_ratio.abs().mean(),
        }

    def log_prob(self, steps: Steps, ctx: Context) -> Tensor:
        """Return the log-probability (N,) of the latents that were sampled, under the policy as it is."""
        return self.transition(steps, ctx).log_prob(steps.x_next, self.reduction)

    def transition(self, steps: Steps, ctx: Context) -> Transition:
        """Return the distribution of the next latents under the policy as it is."""
        step = ctx.sampler.transition(ctx.policy, steps.x, steps.k, steps.prompt)
        if self.final_step == "drop":
            return step
        alpha, sigma = self._level(steps.k, ctx)
        last = step.std == 0
        again = diffusion.columns(alpha, step.clean) * step.clean
        mean = torch.where(diffusion.columns(last, again), again, step.mean)
        return Transition(mean, torch.where(last, sigma, step.std), step.clean)

    def _actions(self, trajectories: Trajectories, ctx: Context) -> tuple[Tensor, Tensor]:
        """Return the latents sampled at every step (N, K, *S), and the steps that have a likelihood (M,)."""
        x_next, stochastic = trajectories.next_states, trajectories.stochastic_steps(ctx.sampler)
        if self.final_step == "drop":
            return x_next, stochastic
        every = torch.arange(ctx.sampler.num_steps, device=x_next.device)
        level = self._level(every[-1].expand(len(x_next)), ctx)
        again = diffusion.add_noise(trajectories.clean[:, -1], ctx.noise(len(x_next)), *level)
        return torch.cat([x_next[:, :-1], again[:, None]], dim=1), every

    def _level(self, k: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma of the latent before step k (N,)."""
        return ctx.policy.schedule(ctx.sampler.grid(ctx.policy).to(k.device)[k])

    def state_dict(self) -> dict[str, Any]:
        return self._baseline.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._baseline.load_state_dict(state)
