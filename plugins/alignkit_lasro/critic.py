"""What the policy follows: scores of its predictions, from the surrogate or the true reward, and their scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from alignkit.diffusion import add_noise
from alignkit.distillation import Noised
from alignkit.interfaces import Context
from alignkit.records import Example, Prompt, Rows
from alignkit_lasro.sampling import States

GradientOf = Literal["surrogate", "reward"]

MIN_SPREAD: dict[GradientOf, float] = {"surrogate": 0.05, "reward": 1e-6}
"""A spread below this is not scaled up to one. A surrogate's scores are log-odds of winning a pair, and where these are
so close they say nothing yet; a reward has whatever scale it has."""


@dataclass(frozen=True)
class PolicyRows(Rows):
    """One policy update: a state to improve and a captioned latent to keep consistent, N rows of each."""

    states: States
    other: Prompt
    """Another prompt for each state, to contrast its own with."""
    blur: Tensor
    """(N, draws, *S) what is added to the clean latent before it is scored."""
    noise: Tensor
    """(N, draws, *S) unit normal, for the purification."""
    noised: Noised | None = None


@dataclass
class Critic:
    """Scores of predictions, and their normalisation (Eq. 12 and 13). The fields are those of `LaSRO`."""

    gradient_of: GradientOf
    smoothing: float
    purify: int
    contrast: float
    gradient_samples: int
    percentile: float
    tracker_decay: float
    num_steps: int
    """Steps whose scores have a scale of their own."""
    mean: list[float | None] = field(init=False)
    level: list[float | None] = field(init=False)

    def __post_init__(self) -> None:
        self.mean: list[float | None] = [None] * self.num_steps
        self.level: list[float | None] = [None] * self.num_steps
        self._examples: dict[str, Example] = {}

    def read(self, examples: Sequence[Example]) -> None:
        """Keep what belongs to the texts of a round, for rewards that look at more than the text."""
        self._examples = {example.text: example for example in examples}

    def rows(self, states: States, ctx: Context) -> PolicyRows:
        """States with all that chance decides about their scores."""
        size, draws, prompt = len(states), self.gradient_samples, states.prompt
        blur, noise = (ctx.noise(size * draws).unflatten(0, (size, draws)) for _ in range(2))
        shift = torch.randint(1, max(2, len(prompt.table)), (size,), generator=ctx.generator).to(prompt.index.device)
        other = replace(prompt, index=(prompt.index + shift) % len(prompt.table))
        return PolicyRows(states, other, self.smoothing * blur, noise)

    def scores(self, clean: Tensor, rows: PolicyRows, ctx: Context) -> Tensor:
        """What surrogate or reward makes of predictions (N, *S), purified, smoothed and contrasted, (N,).

        NaN, without a gradient, where the reward cannot score an image.
        """
        prompt, scores = rows.states.prompt, []
        for blur, noise in zip(rows.blur.unbind(1), rows.noise.unbind(1), strict=True):
            x = clean
            if self.purify:
                assert ctx.teacher is not None
                t = torch.full((len(x),), self.purify, device=x.device)
                x = ctx.teacher.denoise(add_noise(x, noise, *ctx.teacher.schedule(t)), t, prompt)
            score = self._score(x + blur, prompt, ctx)
            if self.contrast:
                score = score - self.contrast * self._score(x + blur, rows.other, ctx)
            scores.append(score)
        return torch.stack(scores).mean(0)

    def _score(self, latents: Tensor, prompt: Prompt, ctx: Context) -> Tensor:
        if self.gradient_of == "surrogate":
            assert ctx.surrogate is not None
            return ctx.surrogate.score(latents, prompt)
        examples = [self._examples.get(text, Example(text)) for text in prompt.texts]
        # Without gradient the images are decoded a few at a time.
        score = ctx.differentiable_score if torch.is_grad_enabled() else ctx.score
        found = score(latents, examples, log=False)
        return found.values.masked_fill(~found.valid, torch.nan)

    @torch.enable_grad()
    def direction(self, clean: Tensor, rows: PolicyRows, ctx: Context) -> Tensor:
        """The gradient of the scores at predictions (N, *S), each of length one."""
        clean = clean.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.scores(clean, rows, ctx).sum(), clean)
        return torch.nn.functional.normalize(gradient.flatten(1), dim=1).view_as(gradient)

    @torch.no_grad()
    def track(self, rows: PolicyRows, ctx: Context) -> None:
        """Running mean and percentile of the scores at each step, before they are used (Eq. 12)."""
        scores = self.scores(rows.states.clean, rows, ctx)
        for k in range(self.num_steps):
            at = ctx.gather(scores[rows.states.step == k])
            if self.gradient_of == "reward":
                at = at[~at.isnan()]
                if not len(at):
                    continue
            mean, level = float(at.mean()), float(at.quantile(self.percentile))
            before, top = self.mean[k], self.level[k]
            decay = self.tracker_decay
            self.mean[k] = mean if before is None else decay * before + (1 - decay) * mean
            self.level[k] = level if top is None else decay * top + (1 - decay) * level

    def normalised(self, scores: Tensor, step: Tensor) -> Tensor:
        """(R - mean) / (percentile - mean), clipped at 1 from above and not from below (Eq. 12 and 13), (N,)."""
        mean = scores.new_tensor([m or 0.0 for m in self.mean])[step]
        level = scores.new_tensor([m or 0.0 for m in self.level])[step]
        return ((scores - mean) / (level - mean).clamp(min=MIN_SPREAD[self.gradient_of])).clamp(max=1)

    def pull(self, clean: Tensor, rows: PolicyRows, ctx: Context, unit: bool) -> Tensor:
        """What the policy raises, (N,): normalised scores, or with `unit` the way along their gradient, each of length
        one. 0 where the reward cannot score an image."""
        if unit:
            return (clean * self.direction(clean, rows, ctx)).flatten(1).sum(1)
        pull = self.normalised(self.scores(clean, rows, ctx), rows.states.step)
        return pull.masked_fill(pull.isnan(), 0) if self.gradient_of == "reward" else pull

    def state_dict(self) -> dict[str, Any]:
        return {"mean": list(self.mean), "level": list(self.level)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mean, self.level = list(state["mean"]), list(state["level"])
