"""Score images with several rewards, a few at a time, and return the weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from copy import copy
from typing import Any

import torch
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.interfaces import Reward
from alignkit.records import Example, Scores
from alignkit.rewards.checked import CheckedReward, Scoring, blaming


def quantize(images: Tensor) -> Tensor:
    """Round images to the values of an 8-bit file: clamped to [0, 1], multiples of 1/255, float32.

    The gradient treats rounding as the identity. At a clamped value it passes only if descent leads back into the
    range; the gradient of a plain clamp is 0 there, so the pixel could never return.
    """
    return _Quantize.apply(images.float())  # type: ignore[no-any-return,no-untyped-call]


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        ctx.save_for_backward(images)
        return (images.clamp(0, 1) * 255).round() / 255

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (images,), (grad,) = ctx.saved_tensors, grads
        outward = ((images < 0) & (grad > 0)) | ((images > 1) & (grad < 0))
        return grad.masked_fill(outward, 0)


class WeightedRewards:
    """The weighted sum of named rewards in float32, and held-out rewards that are scored along with them.

    An error of a reward raises a PluginError that names it, its distribution and the image.
    """

    def __init__(
        self,
        rewards: Sequence[tuple[str, float, Reward]],
        held_out: Sequence[tuple[str, Reward]] = (),
        scoring: Scoring | None = None,
        needed: bool = True,
    ) -> None:
        """Wrap `rewards`, (name, weight, reward), and `held_out`, (name, reward), which do not enter the sum.

        Raises ConfigError for a name that occurs twice, and if rewards are `needed` but none are given.
        """
        names = [name for name, _, _ in rewards] + [name for name, _ in held_out]
        if needed and not names:
            raise ConfigError("reward: none is given; expected at least one, for example --reward attribute_binding")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ConfigError(f"reward: {twice!r} is listed {names.count(twice)} times, expected once; add the weights")
        self.rewards = list(rewards)
        self.held_out = [name for name, _ in held_out]
        self._weights = {name: weight for name, weight, _ in rewards}
        members = [*((name, reward) for name, _, reward in rewards), *held_out]
        self._members = [CheckedReward(name, reward, scoring or Scoring()) for name, reward in members]

    @property
    def names(self) -> list[str]:
        """The names of all rewards, including held-out ones."""
        return [member.name for member in self._members]

    @property
    def differentiable(self) -> bool:
        """Whether every reward of the sum is differentiable."""
        return all(reward.differentiable for _, _, reward in self.rewards)

    def check(self, examples: Iterable[Example], servers: bool = True) -> None:
        """Raise ConfigError that names an example that can never be scored, with its location if it is known.

        Without `servers` nothing is sent to those that score."""
        examples = list(examples)
        for member in self._members:
            checks = [member.reward.check, member.reward.check_server] if servers else [member.reward.check]
            for check in checks:
                with blaming(member.name, member.reward, "in check"):
                    try:
                        check(examples)
                    except ConfigError as error:
                        place = _refused(check, examples).place
                        if place:
                            raise ConfigError(f"{place}: {error}") from error
                        raise

    def load(self, device: torch.device) -> None:
        """Load every reward."""
        for member in self._members:
            member.load(device)

    def identities(self) -> dict[str, str]:
        """Return the backend of each reward that reports one (see `Reward.identity`), by name. Call `load` first."""
        found = {member.name: member.identity() for member in self._members}
        return {name: identity for name, identity in found.items() if identity}

    def check_identities(self, identities: Mapping[str, str], when: str) -> None:
        """Raise ConfigError unless every backend is the one in `identities`. `when` completes "as when ..."."""
        found = self.identities()
        for name, expected in identities.items():
            if (backend := found.get(name, "a backend without identity")) != expected:
                raise ConfigError(
                    f"reward {name}: found {backend}, expected {expected}, as when {when}; serve that one, with the "
                    "same settings and versions"
                )

    def close(self) -> None:
        """End the threads of slow rewards and close the score cache. Both are reopened when needed."""
        for member in self._members:
            member.close()

    def trained_only(self) -> WeightedRewards:
        """Return the same rewards, not loaded again, without the held-out ones."""
        other = copy(self)
        other.held_out = []
        other._members = [member for member in self._members if member.name in self._weights]
        return other

    def score(self, images: Tensor, examples: Sequence[Example], chunk: int) -> Scores:
        """Score `chunk` images at a time, without gradient. A part that a chunk lacks is NaN there."""
        starts = range(0, len(examples), chunk)
        return joined(self.score_each((images[i : i + chunk], examples[i : i + chunk]) for i in starts))

    @torch.no_grad()
    def score_each(self, chunks: Iterable[tuple[Tensor, Sequence[Example]]]) -> list[Scores]:
        """Score each chunk as `self(images, examples)` does, without gradient.

        The next chunk is prepared while slow rewards still score earlier ones. The scores are the same to the bit.
        """
        pending: list[tuple[int, torch.device, list[Future[Scores]]]] = []
        first = 0
        try:
            for images, examples in chunks:
                quantized = quantize(images)
                # Slow rewards first, so that they run while the others score.
                order = sorted(range(len(self._members)), key=lambda i: not self._members[i].reward.slow)
                futures = {i: self._members[i].begin(quantized, examples, first) for i in order}
                pending.append((len(examples), images.device, [futures[i] for i in range(len(futures))]))
                first += len(examples)
            return [self._summed([f.result() for f in futures], count, device) for count, device, futures in pending]
        except BaseException:
            for future in (future for _, _, futures in pending for future in futures):
                future.cancel()
            raise

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Scores:
        """Score images (N, 3, H, W) in [0, 1], with gradient if the rewards have one.

        The parts are the unweighted values of every reward under its name, and its own parts under "name/part". A row
        is valid if all rewards of the sum scored it; otherwise its value is NaN, so that code that ignores `valid` is
        noticed.
        """
        images = quantize(images)
        return self._summed([member(images, examples) for member in self._members], len(examples), images.device)

    def _summed(self, each: Sequence[Scores], count: int, device: torch.device) -> Scores:
        total = torch.zeros(count, device=device)
        valid = torch.ones(count, dtype=torch.bool, device=device)
        parts: dict[str, Tensor] = {}
        reasons: list[str] = []
        for member, scores in zip(self._members, each, strict=True):
            if member.name in self._weights:
                total = total + self._weights[member.name] * scores.values
                valid = valid & scores.valid
                if scores.reason:
                    named = [f"{member.name}: {reason}" if reason else "" for reason in scores.reasons]
                    reasons = [old or new for old, new in zip(reasons or named, named, strict=True)]
            parts[member.name] = scores.values
            parts |= {f"{member.name}/{part}": values for part, values in scores.parts.items()}
        return Scores(total.masked_fill(~valid, torch.nan), valid, parts, reasons)


def _refused(check: Callable[[Sequence[Example]], None], examples: Sequence[Example]) -> Example:
    """Find the first example that `check` refuses, by bisection; Example("") if the cause is not an example."""
    fine, refused = -1, len(examples)
    while refused - fine > 1:
        count = (fine + refused) // 2
        try:
            check(examples[:count])
            fine = count
        except ConfigError:
            refused = count
        except Exception:
            # An exception for a subset must not hide the error for all examples.
            return Example("")
    return examples[refused - 1] if refused else Example("")


def joined(scores: Sequence[Scores]) -> Scores:
    """Concatenate the scores of chunks. A part that a chunk lacks is NaN there."""
    names = dict.fromkeys(name for s in scores for name in s.parts)
    parts = {n: torch.cat([s.parts.get(n, torch.full_like(s.values, torch.nan)) for s in scores]) for n in names}
    reasons = [reason for s in scores for reason in s.reasons or [""] * len(s.values)]
    values, valid = torch.cat([s.values for s in scores]), torch.cat([s.valid for s in scores])
    return Scores(values, valid, parts, reasons if any(reasons) else ())
