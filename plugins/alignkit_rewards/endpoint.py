"""Query a server over HTTP: bounded time per answer, retries, parallel requests, no secrets in messages.

JSON and PNG go over the wire, never a pickle: who reads one runs what its sender wrote.
"""

from __future__ import annotations

import io
import os
import random
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from time import monotonic
from typing import Any, TypeVar

from PIL import Image
from torch import Tensor

from alignkit.data.decode import to_uint8
from alignkit.errors import ConfigError, TransientError
from alignkit.serving.http import is_loopback

A = TypeVar("A")
B = TypeVar("B")

RETRYABLE = frozenset({408, 425, 429, 500, 502, 503, 504})
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before the second try, doubled for each further one; and the longest, whatever a server asks for."""


@dataclass(frozen=True)
class Answer:
    """A server's answer to one question."""

    status: int
    body: Any
    """The JSON value; None where it was something else."""
    reason: str
    """What an error says, on one line, without the key; empty where there is none."""


@dataclass(frozen=True)
class Endpoint:
    """Where a reward asks, and how patiently. Raises ConfigError for fields that cannot work."""

    reward: str
    """The reward's name, for messages."""
    url: str
    """What the paths are appended to."""
    key_field: str
    """The field of the reward that names the environment variable with the bearer token."""
    key_env: str
    """That variable; empty for no token."""
    concurrency: int
    timeout: float
    """Seconds that an answer may take, and after which a question is not asked again."""
    retries: int
    """Further tries of a question that may yet be answered; so it takes less than two timeouts in all."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"https?://[^/?#\s]+(/[^?#\s]*)?", self.url):
            raise ConfigError(f"{self.reward}: url is {self.url!r}, expected http://HOST:PORT or https://HOST")
        if "@" in self.url:
            raise ConfigError(
                f"{self.reward}: url holds a name or password, which would be written into the run folder; put a token "
                f"into the environment variable that {self.key_field} names"
            )
        if not re.fullmatch(r"\w*", self.key_env, re.ASCII):  # most likely the key itself: do not show it
            raise ConfigError(f"{self.reward}: {self.key_field} is no name of an environment variable, as HOUSE_TOKEN")
        for field, least in (("concurrency", 1), ("retries", 0)):
            if getattr(self, field) < least:
                raise ConfigError(f"{self.reward}: {field} is {getattr(self, field)}, expected {least} or more")
        if not 0 < self.timeout < float("inf"):
            raise ConfigError(f"{self.reward}: timeout is {self.timeout}, expected seconds, more than 0")

    def key(self) -> str:
        """The bearer token; empty for none. It stands in the environment alone, never in a run's files."""
        return os.environ.get(self.key_env, "").strip() if self.key_env else ""

    @contextmanager
    def connect(self) -> Iterator[Connection]:
        """Connections for the questions of one batch, closed behind it."""
        import httpx2

        key = self.key()
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(f"{self.reward}: the environment variable {self.key_env} holds no token that can be sent")
        with httpx2.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(self.timeout, connect=min(self.timeout, 10.0)),
            limits=httpx2.Limits(max_connections=self.concurrency),
            trust_env=not is_loopback(httpx2.URL(self.url).host),  # no proxy reaches this machine's own loopback
        ) as client:
            yield Connection(self, client, key)


class Connection:
    """Open connections to an endpoint; may be used from several threads."""

    def __init__(self, endpoint: Endpoint, client: Any, key: str) -> None:
        self.endpoint, self._client, self._key = endpoint, client, key
        self._stopping = threading.Event()

    def map(self, function: Callable[[A], B], items: Sequence[A]) -> list[B]:
        """`function` of each item, at most `concurrency` at once, in the order of the items.

        The first error ends it: what has not begun is left out, and nobody waits for another try.
        """
        with ThreadPoolExecutor(self.endpoint.concurrency) as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException:
                self._stopping.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def ask(self, method: str, path: str, body: Any = None) -> Answer:
        """The answer to one question, whose status may be a refusal that is not worth another try.

        Raises TransientError where the last try failed in a way that may pass, ConfigError for a token that is refused
        and for a redirect, which would carry images and token to another place.
        """
        import httpx2

        end, url, begun = self.endpoint, self.endpoint.url.rstrip("/") + path, monotonic()
        for attempt in range(end.retries + 1):
            wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.SystemRandom().uniform(0.75, 1.25)
            try:
                response = self._client.request(method, url, json=body)
            except httpx2.TransportError as error:
                problem = " ".join(f"{type(error).__name__} {error}".split())
            else:
                answer = Answer(response.status_code, _json(response), self._reason(response))
                if answer.status not in RETRYABLE:
                    return self._admitted(answer, url)
                problem = f"status {answer.status}: {answer.reason}"
                wait = min(_asked_wait(response.headers.get("Retry-After", ""), wait), LONGEST_WAIT)
            # Who had all the time there is may be at it still: asked again at once it had twice the work.
            late = monotonic() - begun + wait > end.timeout
            if attempt == end.retries or late or self._stopping.wait(wait):
                break
        tries = f"{attempt + 1} {'try' if attempt == 0 else 'tries'}"
        raise TransientError(f"{end.reward}: no answer from {url} in {tries} ({problem}); see that the server is up")

    def _admitted(self, answer: Answer, url: str) -> Answer:
        end = self.endpoint
        if answer.status in (401, 403):
            held = f"the one in the environment variable {end.key_env}" if self._key else "none was sent"
            raise ConfigError(
                f"{end.reward}: {url} refuses the token, {held} (status {answer.status}: {answer.reason}); put the "
                f"right one into the environment variable that {end.key_field} names"
            )
        if 300 <= answer.status < 400:
            raise ConfigError(f"{end.reward}: {url} answers with a redirect, which is not followed; correct the url")
        return answer

    def _reason(self, response: Any) -> str:
        """What an error says, in the manner of `alignkit serve` or of OpenAI, else the beginning of the text."""
        if response.is_success:
            return ""
        body = _json(response)
        for key in ("error", "message", "detail"):
            body = body.get(key, body) if isinstance(body, dict) else body
        text = " ".join((body if isinstance(body, str) else str(response.text)).split())
        text = text.replace(self._key, "***") if self._key else text
        return text if len(text) <= 300 else text[:300] + "..."


def _json(response: Any) -> Any:
    try:
        return response.json()
    except (ValueError, RecursionError):
        return None


def _asked_wait(header: str, otherwise: float) -> float:
    """Seconds that a Retry-After header asks for, as a number or as a date."""
    if re.fullmatch(r"\d{1,9}(\.\d+)?", header.strip()):
        return float(header)
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return otherwise


def as_png(images: Tensor) -> list[bytes]:
    """Images (N, 3, H, W) in [0, 1], as 8-bit files hold them, as such files: nothing is lost."""
    levels = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
    files = []
    for one in levels:
        file = io.BytesIO()
        Image.fromarray(one).save(file, format="PNG", compress_level=1)  # quick; lossless at every level
        files.append(file.getvalue())
    return files
