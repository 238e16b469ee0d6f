"""Several rewards as one: their weighted sum, a few images at a time, each held to its contract."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
    """The values that an 8-bit file of `images` would hold: clamped to [0, 1] and rounded to 1/255, float32.

    The rounding counts as the identity in the gradient. Where a value was clamped, only a gradient whose descent leads
    back into the range passes; a plain clamp would leave such a pixel stuck.
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
    """The weighted sum of named rewards, in float32, and rewards that are held out.

    What a reward does wrong is a PluginError that names it, its distribution and the image.
    """

    def __init__(
        self,
        rewards: Sequence[tuple[str, float, Reward]],
        held_out: Sequence[tuple[str, Reward]] = (),
        scoring: Scoring | None = None,
        needed: bool = True,
    ) -> None:
        """`rewards` are (name, weight, reward); `held_out` are (name, reward), which are scored and have no part in the
        sum. Raises ConfigError for a name used twice, and where one is `needed` and there is none."""
        names = [name for name, _, _ in rewards] + [name for name, _ in held_out]
        if needed and not names:
            raise ConfigError("reward: none is given; expected at least one, as --reward attribute_binding")
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
        """Of all that are asked."""
        return [asked.name for asked in self._members]

    @property
    def differentiable(self) -> bool:
        """Whether every member of the sum is."""
        return all(reward.differentiable for _, _, reward in self.rewards)

    def check(self, examples: Iterable[Example]) -> None:
        """Raise ConfigError naming an example that can never be scored, and where it was read if that is known."""
        examples = list(examples)
        for asked in self._members:
            with blaming(asked.name, asked.reward, "in check"):
                try:
                    asked.reward.check(examples)
                except ConfigError as error:
                    place = _refused(asked.reward, examples).place
                    if place:
                        raise ConfigError(f"{place}: {error}") from error
                    raise

    def load(self, device: torch.device) -> None:
        """Load every reward."""
        for asked in self._members:
            asked.load(device)

    def identities(self) -> dict[str, str]:
        """Who answers, by name, of those that tell; they are loaded."""
        told = {asked.name: asked.identity() for asked in self._members}
        return {name: identity for name, identity in told.items() if identity}

    def hold_to(self, identities: Mapping[str, str], when: str) -> None:
        """Raise ConfigError unless those answer who answered before; `when` ends the sentence that says so."""
        found = self.identities()
        for name, expected in identities.items():
            if (answers := found.get(name, "nothing that tells what it is")) != expected:
                raise ConfigError(
                    f"reward {name}: found {answers}, expected {expected}, as when {when}; serve that again, with the "
                    "settings and versions of then"
                )

    def close(self) -> None:
        """End the threads of slow rewards and close the cache of scores; either is opened again when it is needed."""
        for asked in self._members:
            asked.close()

    def trained_only(self) -> WeightedRewards:
        """Those of the sum alone; the same instances, loaded once."""
        other = copy(self)
        other.held_out = []
        other._members = [asked for asked in self._members if asked.name in self._weights]
        return other

    def score(self, images: Tensor, examples: Sequence[Example], chunk: int) -> Scores:
        """`self(images, examples)`, `chunk` images at a time, without gradient; a part that a chunk lacks is NaN."""
        starts = range(0, len(examples), chunk)
        return joined(self.score_each((images[i : i + chunk], examples[i : i + chunk]) for i in starts))

    @torch.no_grad()
    def score_each(self, chunks: Iterable[tuple[Tensor, Sequence[Example]]]) -> list[Scores]:
        """The scores of each chunk, as `self(images, examples)` gives them, without gradient.

        The next chunk is taken while slow rewards still answer for those before; the scores are the same to the bit.
        """
        begun: list[tuple[int, torch.device, list[Future[Scores]]]] = []
        first = 0
        try:
            for images, examples in chunks:
                quantized = quantize(images)
                # Slow ones first, so that they are under way while the others answer.
                order = sorted(range(len(self._members)), key=lambda i: not self._members[i].reward.slow)
                answers = {i: self._members[i].begin(quantized, examples, first) for i in order}
                begun.append((len(examples), images.device, [answers[i] for i in range(len(answers))]))
                first += len(examples)
            return [self._summed([answer.result() for answer in each], count, device) for count, device, each in begun]
        except BaseException:
            for answer in (answer for _, _, each in begun for answer in each):
                answer.cancel()
            raise

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Scores:
        """Scores of images (N, 3, H, W) in [0, 1], with gradient where the rewards have one.

        Parts are every reward's own values, unweighted, under its name, and its parts under "name/part". A row is valid
        if it is so for all rewards of the sum; where it is not, its value is NaN, so that forgetting to look at `valid`
        shows.
        """
        images = quantize(images)
        return self._summed([asked(images, examples) for asked in self._members], len(examples), images.device)

    def _summed(self, answers: Sequence[Scores], count: int, device: torch.device) -> Scores:
        total = torch.zeros(count, device=device)
        valid = torch.ones(count, dtype=torch.bool, device=device)
        parts: dict[str, Tensor] = {}
        reasons: list[str] = []
        for asked, scores in zip(self._members, answers, strict=True):
            if asked.name in self._weights:
                total = total + self._weights[asked.name] * scores.values
                valid = valid & scores.valid
                if scores.reason:
                    told = [f"{asked.name}: {reason}" if reason else "" for reason in scores.reasons]
                    reasons = [old or new for old, new in zip(reasons or told, told, strict=True)]
            parts[asked.name] = scores.values
            parts |= {f"{asked.name}/{part}": values for part, values in scores.parts.items()}
        return Scores(total.masked_fill(~valid, torch.nan), valid, parts, reasons)


def _refused(reward: Reward, examples: Sequence[Example]) -> Example:
    """The first of refused examples that `check` minds; one without a place where it minds something else."""
    fine, refused = -1, len(examples)
    while refused - fine > 1:
        count = (fine + refused) // 2
        try:
            reward.check(examples[:count])
            fine = count
        except ConfigError:
            refused = count
        except Exception:
            # What it says about fewer examples than it was given must not hide what it said about all.
            return Example("")
    return examples[refused - 1] if refused else Example("")


def joined(scores: Sequence[Scores]) -> Scores:
    """Chunks as one; a part that a chunk lacks is NaN there."""
    names = dict.fromkeys(name for s in scores for name in s.parts)
    parts = {n: torch.cat([s.parts.get(n, torch.full_like(s.values, torch.nan)) for s in scores]) for n in names}
    reasons = [reason for s in scores for reason in s.reasons or [""] * len(s.values)]
    values, valid = torch.cat([s.values for s in scores]), torch.cat([s.valid for s in scores])
    return Scores(values, valid, parts, reasons if any(reasons) else ())
