"""DRaFT: ascent along the gradient of a differentiable reward, through the decoder and the last sampler steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn import functional as F

from alignkit import Algorithm, Batch, Context, PolicyFacts, Prompt, Rows, Sampler, Scores, check_ranges
from alignkit.diffusion import add_noise
from alignkit.errors import ConfigError
from alignkit.rollout import encode_examples


@dataclass(frozen=True)
class Starts(Rows):
    """States at which the steps with gradient begin, N rows."""

    x: Tensor
    """(N, *S) without a gradient of its own."""
    step: Tensor
    """(N,) the first of these sampler steps."""
    noise: Tensor
    """(N, k, *S) unit normal, of each of the k steps."""
    prompt: Prompt


@dataclass
class DRaFT(Algorithm[Starts, Starts]):
    """DRaFT (Clark et al., ICLR 2024, arXiv 2309.17400).

    The loss is minus the reward of the decoded image. Its gradient flows through reward, decoder and the last
    `last_steps` sampler steps; the steps before them are sampled without gradient. It takes a differentiable reward.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"differentiable_reward"})

    last_steps: Annotated[int, Ge(1)] = 1
    """K of DRaFT-K: the last sampler steps that the gradient flows through. Memory grows with it."""
    low_variance: Annotated[int, Ge(0)] = 0
    """n of DRaFT-LV, 2 in the paper: noise each clean result n times to the level of the last step, and average the
    gradients of the n last steps. They share the cost of the steps before. 0: off. For last_steps = 1."""
    every_step: bool = False
    """Not in the paper. Train the clean latent that each sampler step predicts, each from a state without gradient,
    instead of the final image alone: images of fewer steps gain as well. For last_steps = 1."""
    unit_gradients: bool = False
    """Not in the paper. Let every row pull equally: the gradient of the reward by each clean latent is scaled to length
    one. A few images at which the reward is steep, often those that it likes for a wrong reason, then do not drown the
    others, and the weight of a regulariser means the same for every reward."""
    samples: Annotated[int, Ge(1)] = 1
    """Trajectories of each prompt in a round."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.last_steps > 1 and (self.low_variance or self.every_step):
            name = "low_variance" if self.low_variance else "every_step"
            raise ValueError(f"last_steps: found {self.last_steps}, expected 1 with {name}")
        if self.low_variance and self.every_step:
            raise ValueError("low_variance: found with every_step, expected 0: it is for the last step alone")

    def check(self, sampler: Sampler, facts: PolicyFacts) -> None:
        if self.last_steps > sampler.num_steps:
            raise ConfigError(
                f"algorithm.last_steps: found {self.last_steps}, expected at most sampler.num_steps, which is "
                f"{sampler.num_steps}"
            )
        if self.low_variance and sampler.num_steps == 1:
            raise ConfigError(
                f"algorithm.low_variance: found {self.low_variance} with sampler.num_steps = 1, expected 0: the only "
                "step begins at pure noise, so new samples cost no more; raise data.batch_size instead"
            )

    def collect(self, batch: Batch, ctx: Context) -> Starts:
        """Sample up to the first step with gradient; the steps from there on and the scores are left to `loss`."""
        prompt = encode_examples(ctx.policy, [example for example in batch.examples for _ in range(self.samples)])
        x = ctx.noise(len(prompt)) * ctx.sampler.initial_scale(ctx.policy)
        earlier, first = [], ctx.sampler.num_steps - self.last_steps
        for k in range(first):
            earlier.append(x)
            x = advance(x, k, prompt, ctx)
        if self.low_variance:
            x, prompt = self._noised(advance(x, first, prompt, ctx), prompt, ctx)
        return self._starts([*earlier, x] if self.every_step else [x], first, prompt, ctx)

    def _noised(self, clean: Tensor, prompt: Prompt, ctx: Context) -> tuple[Tensor, Prompt]:
        """Noise each clean latent n times to the level of the last step's input (DRaFT-LV)."""
        row = torch.arange(len(clean)).repeat_interleave(self.low_variance)
        level = ctx.policy.schedule(ctx.sampler.grid(ctx.policy).to(clean.device)[-1:].expand(len(row)))
        return add_noise(clean[row], ctx.noise(len(row)), *level), prompt.select(row)

    def _starts(self, states: Sequence[Tensor], last: int, prompt: Prompt, ctx: Context) -> Starts:
        """Join the states (N, *S) before consecutive steps, of which `last` is the last."""
        x, count = torch.cat(list(states)), len(prompt)
        step = torch.arange(last + 1 - len(states), last + 1, device=x.device).repeat_interleave(count)
        noise = torch.stack([ctx.noise(len(x)) for _ in range(self.last_steps)], dim=1)
        return Starts(x, step, noise, prompt.select(torch.arange(count).repeat(len(states))))

    def updates(self, collected: Starts, ctx: Context) -> Iterator[Starts]:
        """Yield the rows in random order, in parts of nearly `ctx.rows_per_update`."""
        yield from collected.shuffled(ctx.generator).even_split(ctx.rows_per_update)

    def loss(self, rows: Starts, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Return L = -E r(D(x_K), c). An image that cannot be scored counts as 0 and has no gradient."""
        final = self.predict(rows, ctx)
        scored = final.detach().requires_grad_() if self.unit_gradients else final
        scores = ctx.differentiable_score(scored, rows.prompt.examples, log=True)
        if self.every_step:
            log_steps(scores, rows.step, ctx)
        loss = -scores.values.masked_fill(~scores.valid, 0).mean()
        if not self.unit_gradients:
            return loss, {"reward_loss": loss}
        (slope,) = torch.autograd.grad(-loss, scored)
        pull = (final * F.normalize(slope.flatten(1), dim=1).view_as(slope)).flatten(1).sum(1).mean()
        loss = loss.detach()
        return loss - (pull - pull.detach()), {"reward_loss": loss}  # the value of L, and the gradient of -pull

    def predict(self, rows: Starts, ctx: Context) -> Tensor:
        """Return x_K (N, *S) with gradient through the steps of each row, or its step's clean latent (`every_step`)."""
        x, k = rows.x, rows.step
        for noise in rows.noise.unbind(1):
            step = ctx.sampler.transition(ctx.policy, x, k, rows.prompt)
            x, k = step.sample(noise), k + 1
        return step.clean if self.every_step else x


def advance(x: Tensor, k: int, prompt: Prompt, ctx: Context) -> Tensor:
    """Sample the latents (N, *S) after step k from those before it."""
    step = ctx.sampler.transition(ctx.policy, x, torch.full((len(x),), k, device=x.device), prompt)
    return step.sample(ctx.noise(len(x)))


def log_steps(scores: Scores, step: Tensor, ctx: Context) -> None:
    """Log the mean reward of the rows (N,) of each sampler step."""
    for k in step.unique().tolist():
        known = scores.values[(step == k) & scores.valid]
        if len(known):
            ctx.log(**{f"reward/step{k + 1}": known.detach().mean()})
