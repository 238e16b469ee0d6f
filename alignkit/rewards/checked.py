"""One reward as it is asked: held to its contract, asked again when it fails for a while, its scores kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from threading import Event
from time import monotonic

import torch
from torch import Tensor

from alignkit.errors import AlignkitError, PluginError, TransientError
from alignkit.interfaces import Reward
from alignkit.records import Example, Scores
from alignkit.registry import default_registry, source_line
from alignkit.rewards.cache import ScoreCache, keys_of
from alignkit.rewards.worker import Worker


@dataclass(frozen=True)
class Scoring:
    """How all rewards of a run are asked; the fields are those of `[scoring]`."""

    on_error: str = "raise"
    retries: int = 4
    retry_seconds: float = 1.0
    retry_limit: float = 300.0
    overlap: bool = True
    cache: ScoreCache | None = None
    warn: Callable[[str], None] | None = None
    """Told, once each, what a user should know."""


class CheckedReward:
    """A reward under its name. Whatever it does wrong is a PluginError that names it, its distribution and the image;
    `first` is what messages call the first image."""

    def __init__(self, name: str, reward: Reward, scoring: Scoring) -> None:
        self.name, self.reward, self.scoring = name, reward, scoring
        self._fingerprint = ""
        self._thread: Worker | None = None

    def load(self, device: torch.device) -> None:
        with blaming(self.name, self.reward, "while loading"):
            self.reward.load(device)
            kept = self.scoring.cache is not None and self.reward.deterministic and not self.reward.differentiable
            self._fingerprint = self.reward.fingerprint() if kept else ""

    def identity(self) -> str:
        with blaming(self.name, self.reward, "in identity"):
            return self.reward.identity()

    def __call__(
        self, images: Tensor, examples: Sequence[Example], first: int = 0, closed: Event | None = None
    ) -> Scores:
        """Scores of images (N, 3, H, W) in [0, 1], float32, NaN where invalid. Once `closed` is set nothing is tried
        again."""
        cache, device = self.scoring.cache, images.device
        if self.reward.differentiable and images.requires_grad and torch.is_grad_enabled():
            return self._followed(images, examples, first)
        if cache is None or not self._fingerprint:
            return self._checked(self._ask(images, examples, first, closed), examples, device, first)
        keys = keys_of(f"{self.name} {self._fingerprint}", images, examples)
        scores = cache.get(keys, device)
        if scores is None:
            scores = self._checked(self._ask(images, examples, first, closed), examples, device, first)
            cache.put(keys, scores)
        return scores

    def _followed(self, images: Tensor, examples: Sequence[Example], first: int) -> Scores:
        """With gradient, which an image that is not scored has none of: masking its score alone would leave NaN."""
        lost = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        seen = images.clone()
        seen.register_hook(lambda gradient: gradient.masked_fill(lost.view(-1, 1, 1, 1), 0))
        scores = self._checked(self._ask(seen, examples, first), examples, images.device, first)
        lost |= ~scores.valid
        return scores

    def begin(self, images: Tensor, examples: Sequence[Example], first: int = 0) -> Future[Scores]:
        """Ask without gradient; the answer may still be on its way. A slow reward is asked in its own thread, one call
        after another and in order, so that it gives what it would give without one."""
        if self.reward.slow and self.scoring.overlap:
            if self._thread is None:
                self._thread = Worker(f"reward {self.name}")
            return self._thread.submit(self._elsewhere, images, examples, first, self._thread.closed)
        answer: Future[Scores] = Future()
        answer.set_result(self(images, examples, first))
        return answer

    def close(self) -> None:
        """Ask no more; a call under way is not waited for."""
        if self._thread is not None:
            self._thread.close()
            self._thread = None
        if self.scoring.cache is not None:
            self.scoring.cache.close()

    def _elsewhere(self, images: Tensor, examples: Sequence[Example], first: int, closed: Event) -> Scores:
        # What torch keeps for each thread: gradient mode, autocast (off in a new one) and the device.
        cuda = torch.cuda.device(images.device) if images.device.type == "cuda" else nullcontext()
        with torch.no_grad(), cuda:
            return self(images, examples, first, closed)

    def _ask(self, images: Tensor, examples: Sequence[Example], first: int, closed: Event | None = None) -> object:
        """The reward's answer. What may pass is tried again; at last it is a TransientError that names the reward."""
        begun = monotonic()
        for attempt in range(self.scoring.retries + 1):
            try:
                # In the precision that it was loaded in: a reward that is followed scores as when it is measured.
                with torch.autocast(images.device.type, enabled=False):
                    return self._answer(images, examples, first)
            except TransientError as error:
                pause, passed = self.scoring.retry_seconds * 2**attempt, monotonic() - begun
                if attempt == self.scoring.retries or passed + pause > self.scoring.retry_limit:
                    seconds = "1 second" if round(passed) == 1 else f"{passed:.0f} seconds"
                    times = f"{attempt + 1} times in {seconds}" if attempt else "once"
                    raise TransientError(
                        f"{_origin(self.name, self.reward)} did not answer, asked {times}: {error}"
                    ) from error
                if wait(closed or Event(), pause):
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _answer(self, images: Tensor, examples: Sequence[Example], first: int) -> object:
        """The reward's answer. Raises PluginError with the image that it fails on, which is looked for one by one."""
        try:
            # Its own of both: what it writes into them must reach neither other rewards, nor a second try, nor a key.
            return self.reward(images.clone(), own(examples))
        except AlignkitError:
            raise
        except Exception as error:
            which = f"{len(examples)} images together, each of which it scores alone"
            for i, example in enumerate(examples):
                try:
                    with torch.no_grad():
                        self.reward(images[i : i + 1].clone(), own([example]))
                except Exception:
                    which = f"image {first + i}, {example.text!r}"
                    break
            raise _failed(self.name, self.reward, f"while scoring {which}", error) from error

    def _checked(self, answer: object, examples: Sequence[Example], device: torch.device, first: int) -> Scores:
        """The answer as float32 Scores on `device`, NaN where invalid. Raises PluginError if it breaks the contract."""
        who, count = _origin(self.name, self.reward), len(examples)
        scores = Scores(answer, torch.ones(count, dtype=torch.bool)) if isinstance(answer, Tensor) else answer
        if not isinstance(scores, Scores):
            raise PluginError(f"{who} returned {type(answer).__name__}, expected a tensor ({count},) or Scores")
        columns = {"values": scores.values, "valid": scores.valid} | {f"part {k!r}": v for k, v in scores.parts.items()}
        for label, column in columns.items():
            found = f"shape {tuple(column.shape)}" if isinstance(column, Tensor) else type(column).__name__
            if found != f"shape ({count},)":
                raise PluginError(f"{who} returned {label} of {found}, expected shape ({count},): one an image")
        if len(scores.reasons) not in (0, count):
            raise PluginError(f"{who} returned {len(scores.reasons)} reasons for {count} images, expected one each")
        reasons, valid = scores.reasons, scores.valid.to(device=device, dtype=torch.bool)
        values = scores.values.to(device).float()
        wrong = (valid & ~values.isfinite()).nonzero().flatten().tolist()
        if wrong:
            found = f"{values[wrong[0]].item()} for image {first + wrong[0]}, {examples[wrong[0]].text!r}"
            if self.scoring.on_error == "raise":
                raise PluginError(
                    f"{who} returned {found}, expected a finite number, or Scores that mark it invalid (--set "
                    "scoring.on_error=skip, with --resume as well, counts such an image as not scored)"
                )
            if self.scoring.warn is not None:
                self.scoring.warn(f"{who} returned numbers that are not finite; such images are not scored")
            valid = valid & values.isfinite()
            told = dict.fromkeys(wrong, "its score is not finite")
            reasons = [told.get(i, reason) for i, reason in enumerate(reasons or [""] * count)]
        values = values.masked_fill(~valid, torch.nan)
        parts = {k: v.to(device).float().masked_fill(~valid, torch.nan) for k, v in scores.parts.items()}
        return Scores(values, valid, parts, reasons)


def wait(closed: Event, seconds: float) -> bool:
    """Whether the reward was closed before the time was up."""
    return closed.wait(seconds)


def own(examples: Sequence[Example]) -> list[Example]:
    """Copies, whose metadata may be written into."""
    return [replace(e, metadata=deepcopy(dict(e.metadata))) for e in examples]


@contextmanager
def blaming(name: str, reward: Reward, when: str) -> Iterator[None]:
    """Any exception that is not meant for the user becomes a PluginError naming the reward."""
    try:
        yield
    except AlignkitError:
        raise
    except Exception as error:
        raise _failed(name, reward, when, error) from error


def _failed(name: str, reward: Reward, when: str, error: Exception) -> PluginError:
    reason = next(iter(str(error).splitlines()), "")
    return PluginError(f"{_origin(name, reward)} failed {when}: {type(error).__name__}: {reason} ({source_line(error)})")


def _origin(name: str, reward: Reward) -> str:
    """The reward, and whose code it is: as it says, or the distribution that it comes from where that is known."""
    rows = [row for row in default_registry().named(name) if row.kind == "reward"]
    origin = reward.origin or (rows[0].origin if rows else "")
    return f"reward {name!r} ({origin})" if origin else f"reward {name!r}"
