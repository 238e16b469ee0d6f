"""Query a server over HTTP: bounded time per answer, retries, parallel requests, no secrets in messages.

Only JSON and PNG go over the wire, never a pickle: unpickling executes code chosen by the sender.
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
"""Seconds before the second try, doubled for each further try; and the upper limit, whatever the server requests."""


@dataclass(frozen=True)
class Answer:
    """A server's answer to one request."""

    status: int
    body: Any
    """The JSON value; None if the body is not JSON."""
    reason: str
    """The error message on one line, with the key masked; empty if there was no error."""


@dataclass(frozen=True)
class Endpoint:
    """Address of a server and the limits on requests to it. Raises ConfigError for a bad URL or variable."""

    reward: str
    """The reward's name, for messages."""
    url: str
    """Base URL that the paths are appended to."""
    key_field: str
    """The field of the reward that names the environment variable with the bearer token."""
    key_env: str
    """Name of that variable; empty for no token."""
    concurrency: int
    timeout: float
    """Seconds to wait for an answer, and after which a request is not retried."""
    retries: int
    """Further tries of a request that failed in a way that may pass. One request takes less than two timeouts."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"https?://[^/?#\s]+(/[^?#\s]*)?", self.url):
            raise ConfigError(f"{self.reward}: url is {self.url!r}, expected http://HOST:PORT or https://HOST")
        if "@" in self.url:
            raise ConfigError(
                f"{self.reward}: url contains a user name or password, which would be written into the run folder; put "
                f"a token into the environment variable that {self.key_field} names"
            )
        if not re.fullmatch(r"\w*", self.key_env, re.ASCII):  # most likely the key itself: do not show it
            raise ConfigError(
                f"{self.reward}: {self.key_field} is not the name of an environment variable, such as HOUSE_TOKEN"
            )

    def key(self) -> str:
        """Return the bearer token; empty for none. It is only in the environment, never in a run's files."""
        return os.environ.get(self.key_env, "").strip() if self.key_env else ""

    @contextmanager
    def connect(self) -> Iterator[Connection]:
        """Open connections for the requests of one batch, and close them afterwards."""
        import httpx2

        key = self.key()
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(
                f"{self.reward}: the environment variable {self.key_env} holds a token with characters that cannot be "
                "sent in a header; expected printable ASCII"
            )
        with httpx2.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(self.timeout, connect=min(self.timeout, 10.0)),
            limits=httpx2.Limits(max_connections=self.concurrency),
            trust_env=not is_loopback(httpx2.URL(self.url).host),  # a proxy cannot reach this machine's loopback
        ) as client:
            yield Connection(self, client, key)


class Connection:
    """Open connections to an endpoint; thread-safe."""

    def __init__(self, endpoint: Endpoint, client: Any, key: str) -> None:
        self.endpoint, self._client, self._key = endpoint, client, key
        self._stopping = threading.Event()

    def map(self, function: Callable[[A], B], items: Sequence[A]) -> list[B]:
        """Apply `function` to each item, at most `concurrency` at once; results are in the order of the items.

        The first error is raised at once: calls that have not started are cancelled, and retries are not waited for.
        """
        with ThreadPoolExecutor(self.endpoint.concurrency) as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException:
                self._stopping.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def request(self, method: str, path: str, body: Any = None) -> Answer:
        """Send one request, retrying transient failures. The answer's status may be an error that a retry cannot fix.

        Raises TransientError if the last try failed in a way that may pass, and ConfigError if the token is refused or
        the server redirects, which would send images and token elsewhere.
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
                    self._check_status(answer, url)
                    return answer
                problem = f"status {answer.status}: {answer.reason}"
                wait = min(_retry_after(response.headers.get("Retry-After", ""), wait), LONGEST_WAIT)
            # After a timeout the server may still be working on the request: a retry would double its work.
            late = monotonic() - begun + wait > end.timeout
            if attempt == end.retries or late or self._stopping.wait(wait):
                break
        tries = f"{attempt + 1} {'try' if attempt == 0 else 'tries'}"
        raise TransientError(f"{end.reward}: no answer from {url} in {tries} ({problem}); check that the server is up")

    def _check_status(self, answer: Answer, url: str) -> None:
        """Raise ConfigError for a refused token and for a redirect."""
        end = self.endpoint
        if answer.status in (401, 403):
            sent = f"the one in the environment variable {end.key_env}" if self._key else "none was sent"
            raise ConfigError(
                f"{end.reward}: {url} refuses the token, {sent} (status {answer.status}: {answer.reason}); put the "
                f"right one into the environment variable that {end.key_field} names"
            )
        if 300 <= answer.status < 400:
            raise ConfigError(f"{end.reward}: {url} answers with a redirect, which is not followed; correct the url")

    def _reason(self, response: Any) -> str:
        """Return the error message of `alignkit serve` or an OpenAI-style API, or else the beginning of the text."""
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


def _retry_after(header: str, otherwise: float) -> float:
    """Return the seconds of a Retry-After header, given as a number or a date; `otherwise` if it is neither."""
    if re.fullmatch(r"\d{1,9}(\.\d+)?", header.strip()):
        return float(header)
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return otherwise


def as_png(images: Tensor) -> list[bytes]:
    """Encode images (N, 3, H, W) with 8-bit levels in [0, 1] as PNG files, without loss."""
    levels = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
    files = []
    for one in levels:
        file = io.BytesIO()
        Image.fromarray(one).save(file, format="PNG", compress_level=1)  # fast; every level is lossless
        files.append(file.getvalue())
    return files
