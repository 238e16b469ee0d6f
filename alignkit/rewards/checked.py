"""Wrap one reward: validate its output, retry transient failures, cache scores."""

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
    """Settings for scoring that all rewards of a run share; the fields are those of `[scoring]`."""

    on_error: str = "raise"
    retries: int = 4
    retry_seconds: float = 1.0
    retry_limit: float = 300.0
    overlap: bool = True
    cache: ScoreCache | None = None
    warn: Callable[[str], None] | None = None
    """Called with each message for the user."""


class CheckedReward:
    """One named reward with validated output.

    Any exception and any invalid output of the reward becomes a PluginError that names the reward, its distribution and
    the image. `first` is the number of the first image in such messages.
    """

    def __init__(self, name: str, reward: Reward, scoring: Scoring) -> None:
        self.name, self.reward, self.scoring = name, reward, scoring
        self._fingerprint = ""
        self._thread: Worker | None = None

    def load(self, device: torch.device) -> None:
        with blaming(self.name, self.reward, "while loading"):
            self.reward.load(device)
            cached = self.scoring.cache is not None and self.reward.deterministic and not self.reward.differentiable
            self._fingerprint = self.reward.fingerprint() if cached else ""

    def identity(self) -> str:
        with blaming(self.name, self.reward, "in identity"):
            return self.reward.identity()

    def __call__(
        self, images: Tensor, examples: Sequence[Example], first: int = 0, closed: Event | None = None
    ) -> Scores:
        """Return the scores of images (N, 3, H, W) in [0, 1], float32, NaN where invalid.

        Failures are not retried once `closed` is set.
        """
        cache, device = self.scoring.cache, images.device
        if self.reward.differentiable and images.requires_grad and torch.is_grad_enabled():
            return self._with_gradient(images, examples, first)
        if cache is None or not self._fingerprint:
            return self._validated(self._score(images, examples, first, closed), examples, device, first)
        keys = keys_of(f"{self.name} {self._fingerprint}", images, examples)
        scores = cache.get(keys, device)
        if scores is None:
            scores = self._validated(self._score(images, examples, first, closed), examples, device, first)
            cache.put(keys, scores)
        return scores

    def _with_gradient(self, images: Tensor, examples: Sequence[Example], first: int) -> Scores:
        """Score with gradient, and zero the gradient of invalid images: masking their scores would leave NaN in it."""
        unscored = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        followed = images.clone()
        followed.register_hook(lambda gradient: gradient.masked_fill(unscored.view(-1, 1, 1, 1), 0))
        scores = self._validated(self._score(followed, examples, first), examples, images.device, first)
        unscored |= ~scores.valid
        return scores

    def begin(self, images: Tensor, examples: Sequence[Example], first: int = 0) -> Future[Scores]:
        """Start scoring without gradient, and return a future.

        A slow reward runs in its own thread, one call at a time and in order, so its scores are those that it would
        give in this thread.
        """
        if self.reward.slow and self.scoring.overlap:
            if self._thread is None:
                self._thread = Worker(f"reward {self.name}")
            return self._thread.submit(self._in_thread, images, examples, first, self._thread.closed)
        scores: Future[Scores] = Future()
        scores.set_result(self(images, examples, first))
        return scores

    def close(self) -> None:
        """Cancel the calls in the queue, without waiting for one that is running, and close the cache."""
        if self._thread is not None:
            self._thread.close()
            self._thread = None
        if self.scoring.cache is not None:
            self.scoring.cache.close()

    def _in_thread(self, images: Tensor, examples: Sequence[Example], first: int, closed: Event) -> Scores:
        # torch keeps gradient mode, autocast (off in a new thread) and the current device per thread.
        cuda = torch.cuda.device(images.device) if images.device.type == "cuda" else nullcontext()
        with torch.no_grad(), cuda:
            return self(images, examples, first, closed)

    def _score(self, images: Tensor, examples: Sequence[Example], first: int, closed: Event | None = None) -> object:
        """Call the reward and retry transient failures. Raises TransientError after the last attempt."""
        begun = monotonic()
        for attempt in range(self.scoring.retries + 1):
            try:
                # In the precision it was loaded in, so that training and evaluation give the same scores.
                with torch.autocast(images.device.type, enabled=False):
                    return self._score_once(images, examples, first)
            except TransientError as error:
                pause, passed = self.scoring.retry_seconds * 2**attempt, monotonic() - begun
                if attempt == self.scoring.retries or passed + pause > self.scoring.retry_limit:
                    seconds = "1 second" if round(passed) == 1 else f"{passed:.0f} seconds"
                    tries = f"{attempt + 1} attempts in {seconds}" if attempt else "1 attempt"
                    raise TransientError(f"{_origin(self.name, self.reward)} failed after {tries}: {error}") from error
                if wait(closed or Event(), pause):
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _score_once(self, images: Tensor, examples: Sequence[Example], first: int) -> object:
        """Call the reward. If it fails, find the image that it fails on and raise a PluginError that names it."""
        try:
            # Copies, so that in-place changes reach neither other rewards nor a retry nor the cache key.
            return self.reward(images.clone(), copies(examples))
        except AlignkitError:
            raise
        except Exception as error:
            which = f"{len(examples)} images in one batch (each alone succeeds)"
            for i, example in enumerate(examples):
                try:
                    with torch.no_grad():
                        self.reward(images[i : i + 1].clone(), copies([example]))
                except Exception:
                    which = f"image {first + i}, {example.text!r}"
                    break
            raise _failed(self.name, self.reward, f"while scoring {which}", error) from error

    def _validated(self, output: object, examples: Sequence[Example], device: torch.device, first: int) -> Scores:
        """Convert a reward's output to float32 Scores on `device`, NaN where invalid; PluginError for bad output."""
        who, count = _origin(self.name, self.reward), len(examples)
        scores = Scores(output, torch.ones(count, dtype=torch.bool)) if isinstance(output, Tensor) else output
        if not isinstance(scores, Scores):
            raise PluginError(f"{who} returned {type(output).__name__}, expected a tensor ({count},) or Scores")
        columns = {"values": scores.values, "valid": scores.valid} | {f"part {k!r}": v for k, v in scores.parts.items()}
        for label, column in columns.items():
            found = f"shape {tuple(column.shape)}" if isinstance(column, Tensor) else type(column).__name__
            if found != f"shape ({count},)":
                raise PluginError(f"{who} returned {label} of {found}, expected shape ({count},), one per image")
        if len(scores.reasons) not in (0, count):
            raise PluginError(f"{who} returned {len(scores.reasons)} reasons, expected {count}, one per image")
        reasons, valid = scores.reasons, scores.valid.to(device=device, dtype=torch.bool)
        values = scores.values.to(device).float()
        wrong = (valid & ~values.isfinite()).nonzero().flatten().tolist()
        if wrong:
            found = f"{values[wrong[0]].item()} for image {first + wrong[0]}, {examples[wrong[0]].text!r}"
            if self.scoring.on_error == "raise":
                raise PluginError(
                    f"{who} returned {found}, expected a finite number, or Scores that mark the image as invalid; "
                    "--set scoring.on_error=skip treats such images as not scored (also with --resume)"
                )
            if self.scoring.warn is not None:
                self.scoring.warn(f"{who} returned scores that are not finite; such images count as not scored")
            valid = valid & values.isfinite()
            not_finite = dict.fromkeys(wrong, "its score is not finite")
            reasons = [not_finite.get(i, reason) for i, reason in enumerate(reasons or [""] * count)]
        values = values.masked_fill(~valid, torch.nan)
        parts = {k: v.to(device).float().masked_fill(~valid, torch.nan) for k, v in scores.parts.items()}
        return Scores(values, valid, parts, reasons)


def wait(closed: Event, seconds: float) -> bool:
    """Wait for `seconds`, and return early with True if `closed` is set."""
    return closed.wait(seconds)


def copies(examples: Sequence[Example]) -> list[Example]:
    """Return copies of the examples with metadata that may be modified."""
    return [replace(e, metadata=deepcopy(dict(e.metadata))) for e in examples]


@contextmanager
def blaming(name: str, reward: Reward, when: str) -> Iterator[None]:
    """Turn any exception that is not an AlignkitError into a PluginError that names the reward."""
    try:
        yield
    except AlignkitError:
        raise
    except Exception as error:
        raise _failed(name, reward, when, error) from error


def _failed(name: str, reward: Reward, when: str, error: Exception) -> PluginError:
    reason = next(iter(str(error).splitlines()), "")
    raised = f"{type(error).__name__}: {reason} ({source_line(error)})"
    return PluginError(f"{_origin(name, reward)} failed {when}: {raised}")


def _origin(name: str, reward: Reward) -> str:
    """Name the reward and its origin for messages: `reward.origin`, else the distribution that it comes from."""
    rows = [row for row in default_registry().named(name) if row.kind == "reward"]
    origin = reward.origin or (rows[0].origin if rows else "")
    return f"reward {name!r} ({origin})" if origin else f"reward {name!r}"
