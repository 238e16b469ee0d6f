"""Rewards as advantages: how far a sample lies above others, in units of their standard deviation."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from alignkit.interfaces import Context
from alignkit.records import Example, Scores


def standardised(rewards: Tensor, others: Tensor, eps: float) -> Tensor:
    """Return (rewards - mean) / (standard deviation + eps) with the statistics of `others`; (N,) float32.

    Computed in float64 whatever the input: rewards of 0 and 1 are not cut to integers. A sample that could not be
    scored is NaN; it enters no statistics and stays NaN.
    """
    known = others.cpu().double()
    known = known[~known.isnan()]
    spread = known.std(correction=0) if len(known) else torch.nan
    return ((rewards.cpu().double() - known.mean()) / (spread + eps)).float().to(rewards.device)


def over_batch(rewards: Tensor, ctx: Context) -> Tensor:
    """Normalise rewards (N,), NaN where a sample could not be scored, by those of all processes."""
    return standardised(rewards, ctx.gather(rewards), eps=1e-8)


def of_terms(scores: Scores, ctx: Context, relative: Callable[[Tensor, str], Tensor]) -> Tensor:
    """Combine `relative(rewards (N,), name)`, advantages of any shape, over each of `ctx.terms(scores)`.

    A single term is returned as it is. Of several, the weighted sum of their advantages is normalised once more over
    the batch, so that its size does not depend on their number (GDPO, Liu et al. 2026, arXiv 2601.05242). A reward that
    few samples get thus counts as much as one that distinguishes all of them.
    """
    found = [(weight, relative(rewards, name)) for name, (weight, rewards) in ctx.terms(scores).items()]
    if len(found) == 1:
        return found[0][1]
    total = torch.stack([weight * advantages for weight, advantages in found]).sum(0)
    return over_batch(total.flatten(), ctx).view_as(total)


GROUP_EPS = 1e-4
"""Added to the standard deviation of a group, as in Flow-GRPO."""


def group_statistics(rewards: Tensor, examples: Sequence[str | Example], ctx: Context) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the rewards in each sample's group, (N,) both, float64, on the CPU.

    A group is the samples of one example in a round, of all processes. Rewards (N,) are NaN where a sample could not be
    scored; these enter no statistics. The standard deviation is exactly 0 where all others are equal, or none.
    """
    keys = torch.tensor([_key(Example.of(example)) for example in examples], device=rewards.device)
    everyone, everywhere = ctx.gather(keys).cpu(), ctx.gather(rewards).cpu().double()
    mean, spread = (torch.full((len(rewards),), value, dtype=torch.float64) for value in (torch.nan, 0.0))
    for key in set(keys.tolist()):
        at, group = (keys == key).cpu(), everywhere[everyone == key]
        group = group[~group.isnan()]
        if len(group):
            mean[at] = group.mean()
            spread[at] = group.std(correction=0) * (group.amax() > group.amin())
    return mean, spread


class PromptTracker:
    """Advantages relative to earlier rewards of the same prompt: the mean and standard deviation of its last `size`.

    A prompt is an example: two that share a text and differ in metadata are kept apart. A prompt with fewer than
    `min_count` rewards is normalised by the batch.
    """

    def __init__(self, size: int, min_count: int) -> None:
        self.size, self.min_count = size, min_count
        self._seen: dict[int, deque[float]] = {}

    def advantages(self, examples: Sequence[str | Example], rewards: Tensor, ctx: Context, name: str = "") -> Tensor:
        """Remember the rewards (N,) of N examples, or texts, NaN where one could not be scored, then normalise them.

        Those of one `name` are kept apart from others, so that several rewards can share a tracker.
        Logs `own_statistics`, the share of samples that were normalised by their own prompt.
        """
        keys = torch.tensor([_key(Example.of(example), name) for example in examples], device=rewards.device)
        batch = ctx.gather(rewards)
        for key, reward in zip(ctx.gather(keys).tolist(), batch.tolist(), strict=True):
            if reward == reward:
                self._seen.setdefault(key, deque(maxlen=self.size)).append(reward)
        found, own = standardised(rewards, batch, eps=1e-6), torch.zeros(len(rewards), dtype=torch.bool)
        for key in set(keys.tolist()):
            seen = self._seen.get(key, ())
            if len(seen) >= self.min_count:
                at = keys == key
                found[at] = standardised(rewards[at], torch.tensor(seen, dtype=torch.float64), eps=1e-6)
                own |= at.cpu()
        ctx.log(own_statistics=own.float().mean())
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {
            "size": self.size,
            "min_count": self.min_count,
            "seen": {key: list(rewards) for key, rewards in self._seen.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.size, self.min_count = state["size"], state["min_count"]
        self._seen = {key: deque(rewards, maxlen=self.size) for key, rewards in state["seen"].items()}


class Baseline:
    """The advantages of a policy-gradient method: rewards, or returns of steps, relative to a baseline.

    `kind` is "prompt" (earlier rewards of the same prompt), "step_prompt" (of the same prompt and step), "batch" (those
    of the round) or "group" (those of the same prompt in the round). For "prompt" and "step_prompt", a prompt keeps its
    last `buffer_size` rewards and needs `min_count` of them to be normalised by its own; until then it is by the
    round's. The advantages of several rewards are combined as in `of_terms`.
    """

    def __init__(
        self, kind: Literal["prompt", "step_prompt", "batch", "group"], buffer_size: int = 32, min_count: int = 16
    ) -> None:
        if buffer_size < min_count:
            raise ValueError(
                f"buffer_size: found {buffer_size}, expected at least min_count, which is {min_count}: a prompt would "
                "never be normalised by its own rewards"
            )
        self.kind, self.buffer_size, self.min_count = kind, buffer_size, min_count
        self._trackers: list[PromptTracker] = []

    def advantages(
        self,
        scores: Scores,
        examples: Sequence[str | Example],
        ctx: Context,
        returns: Callable[[Tensor], Tensor] = lambda rewards: rewards,
    ) -> Tensor:
        """Return the advantages of N samples, NaN where one could not be scored.

        `returns` maps the rewards of one term to returns (N,), or (N, K) of K steps; advantages have that shape.

        With "group" returns are the rewards themselves, and the advantages are NaN as well in a group whose rewards are
        all equal: it has nothing to learn from. Logs `tied_groups`, the share of samples in such groups.
        """
        if self.kind == "group":
            scores = _distinguished(scores, examples, ctx)

        def relative(rewards: Tensor, name: str) -> Tensor:
            values = returns(rewards)
            if self.kind == "group":
                mean, spread = group_statistics(values, examples, ctx)
                return ((values.cpu().double() - mean) / (spread + GROUP_EPS)).float().to(values.device)
            steps = 1 if values.dim() == 1 else values.shape[1]
            if self.kind == "batch":
                return over_batch(values.flatten(), ctx).view_as(values)
            if self.kind == "prompt":  # one tracker sees the returns of all steps
                (tracker,) = self._tracked(1, scale=steps)
                each = [example for example in examples for _ in range(steps)]
                return tracker.advantages(each, values.flatten(), ctx, name).view_as(values)
            trackers = self._tracked(steps)
            columns = values.view(len(values), steps).unbind(1)
            found = [t.advantages(examples, c, ctx, name) for t, c in zip(trackers, columns, strict=True)]
            return torch.stack(found, dim=1).view_as(values)

        return of_terms(scores, ctx, relative)

    def _tracked(self, count: int, scale: int = 1) -> list[PromptTracker]:
        """Return the trackers, made at their first use, when the number of steps is known."""
        size, least = self.buffer_size * scale, self.min_count * scale
        self._trackers = self._trackers or [PromptTracker(size, least) for _ in range(count)]
        return self._trackers

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"trackers": [tracker.state_dict() for tracker in self._trackers]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._trackers = [PromptTracker(self.buffer_size, self.min_count) for _ in state["trackers"]]
        for tracker, saved in zip(self._trackers, state["trackers"], strict=True):
            tracker.load_state_dict(saved)


def clipped(log_ratio: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """Return PPO's pessimistic objective as a loss: max(-A r, -A clamp(r, 1 - eps, 1 + eps)) elementwise."""
    ratio = log_ratio.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))


def _distinguished(scores: Scores, examples: Sequence[str | Example], ctx: Context) -> Scores:
    """Mark as invalid the samples of groups in which no reward distinguishes any two."""
    spreads = [group_statistics(rewards, examples, ctx)[1] for _, rewards in ctx.terms(scores).values()]
    tied = (torch.stack(spreads).amax(0) == 0).to(scores.valid.device)
    ctx.log(tied_groups=tied.float().mean())
    return replace(scores, valid=scores.valid & ~tied)


def _key(example: Example, name: str = "") -> int:
    """Hash an example to a number that is the same in every process and every run."""
    text = f"{name}\0{example.text}" if name else example.text
    if example.metadata:
        text += f"\0\0{_written(example.metadata)}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def _written(value: Any) -> str:
    """Write metadata as a text that is equal for equal values. Of an object that is no plain data, its type alone."""
    if isinstance(value, Mapping):
        return "{" + ",".join(sorted(f"{_written(key)}:{_written(item)}" for key, item in value.items())) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_written, value)) + "]"
    if hasattr(value, "tolist"):  # an array or a tensor
        return _written(value.tolist())
    return repr(value) if value is None or isinstance(value, bool | int | float | str) else type(value).__name__
