"""Query a server over HTTP: bounded time and size of answers, retries, parallel requests, no secrets in messages.

Only JSON and PNG go over the wire, never a pickle: unpickling executes code chosen by the sender.
"""

from __future__ import annotations

import io
import json
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
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import anyio
from anyio.from_thread import BlockingPortal, start_blocking_portal
from PIL import Image
from torch import Tensor

from alignkit.data.decode import to_uint8
from alignkit.errors import ConfigError, TransientError
from alignkit.files import parse_json
from alignkit.serving.http import is_loopback

A = TypeVar("A")
B = TypeVar("B")

RETRYABLE = frozenset({408, 425, 429, 500, 502, 503, 504})
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before the second try, doubled for each further try; and the upper limit, whatever the server requests."""

MOST_BYTES = 16 << 20
"""Largest answer. That of `alignkit serve` takes some hundred bytes an image."""


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
    """Seconds for a request and its whole answer, and after which a request is not retried."""
    retries: int
    """Further tries of a request that failed in a way that may pass. One request takes less than two timeouts."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"https?://[^/?#\s\x00-\x1f]+(/[^?#\s\x00-\x1f]*)?", self.url) or not _has_host(self.url):
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
        client = httpx2.AsyncClient(
            # A compressed answer could be a thousand times as large as what is counted.
            headers={"Accept-Encoding": "identity", **({"Authorization": f"Bearer {key}"} if key else {})},
            timeout=httpx2.Timeout(self.timeout, connect=min(self.timeout, 10.0)),
            limits=httpx2.Limits(max_connections=self.concurrency),
            trust_env=not is_loopback(httpx2.URL(self.url).host),  # a proxy cannot reach this machine's loopback
        )
        # A thread of its own can end a request at any moment; a blocking client only between two pieces of it.
        with start_blocking_portal() as portal, portal.wrap_async_context_manager(client):
            yield Connection(self, client, portal, key)


class Connection:
    """Open connections to an endpoint; thread-safe."""

    def __init__(self, endpoint: Endpoint, client: Any, portal: BlockingPortal, key: str) -> None:
        self.endpoint, self._client, self._portal, self._key = endpoint, client, portal, key
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
        content = None if body is None else json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
        for attempt in range(end.retries + 1):
            wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.SystemRandom().uniform(0.75, 1.25)
            try:
                response = self._portal.call(self._exchange, method, url, content)
            except httpx2.TransportError as error:
                problem = " ".join(f"{type(error).__name__} {_reason(error)}".split())
            except TimeoutError:
                problem = f"no whole answer within {end.timeout:g} seconds"
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

    async def _exchange(self, method: str, url: str, content: bytes | None) -> Any:
        """Send one request and return the response, read to its end.

        Raises TimeoutError when the time is over, wherever the exchange stands, and ConfigError for too large an
        answer.
        """
        import httpx2

        headers = {} if content is None else {"Content-Type": "application/json"}
        with anyio.fail_after(self.endpoint.timeout):
            async with self._client.stream(method, url, content=content, headers=headers) as response:
                if response.headers.get("Content-Encoding", "identity") != "identity":
                    self._refuse(url, "compresses its answer, which no request allows")
                data = bytearray()
                async for piece in response.aiter_raw():
                    data += piece
                    if len(data) > MOST_BYTES:
                        self._refuse(url, f"answers with more than {MOST_BYTES >> 20} MiB")
                return httpx2.Response(response.status_code, headers=response.headers, content=bytes(data))

    def _refuse(self, url: str, what: str) -> NoReturn:
        raise ConfigError(f"{self.endpoint.reward}: {url} {what}; correct the url")

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
            self._refuse(url, "answers with a redirect, which is not followed")

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


def _reason(error: BaseException) -> str:
    """Return the message of the system's error at the root of `error`, else its own."""
    found: list[BaseException] = [error]
    for one in found:  # grows while it is gone through
        causes = [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
        found += [cause for cause in causes if cause is not None and cause not in found]
    numbers = [one.errno for one in found if isinstance(one, OSError) and one.errno and one.errno > 0]
    return os.strerror(numbers[0]) if numbers else str(error)


def _has_host(url: str) -> bool:
    try:
        return bool(urlsplit(url).hostname) and urlsplit(url).port != 0
    except ValueError:  # a port of letters, half of the brackets of an IPv6 address
        return False


def _json(response: Any) -> Any:
    try:
        return parse_json(response.content)
    except ValueError:
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
