"""A reward that another process computes, here or on another machine: the client of `alignkit serve`."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from alignkit import Example, Reward, Scores, check_ranges
from alignkit.config.ranges import Positive
from alignkit.errors import ConfigError, PluginError
from alignkit.imports import Token
from alignkit.serving.http import PROTOCOL, TOKEN
from alignkit_rewards.endpoint import Connection, Endpoint, as_png


@dataclass
class Remote(Reward):
    """Scores of the reward served at `url`, the same as if it were computed here, but without gradient.

    Images are sent as PNG files, which are lossless.
    """

    url: str = "http://127.0.0.1:8188"
    """Address of `alignkit serve`."""
    serves: str = ""
    """Fingerprint that the server must have, as it prints at its start; empty accepts whatever it serves when the run
    begins. Scores are cached only if this is set and the served reward has a fingerprint of its own."""
    token_env: Annotated[str, Token("url")] = TOKEN
    """The environment variable with the server's token; nothing is sent if it is not set."""
    images_per_request: Annotated[int, Ge(1)] = 16
    """Images per request."""
    concurrency: Annotated[int, Ge(1)] = 2
    """Requests in flight at once: one is scored while another is transferred."""
    timeout: Positive = 120.0
    """Seconds to wait for an answer, and after which a request is not retried."""
    retries: Annotated[int, Ge(0)] = 2
    """Further tries of one request, with increasing waits; then the whole batch is retried as set in `[scoring]`
    (retries, retry_limit) before the run stops."""

    slow: ClassVar[bool] = True
    name: ClassVar[str] = "remote"

    def __post_init__(self) -> None:
        check_ranges(self)
        self._endpoint = Endpoint(
            self.name, self.url, "token_env", self.token_env, self.concurrency, self.timeout, self.retries
        )
        self._spec: dict[str, Any] = {}

    @property
    def deterministic(self) -> bool:
        # Without `serves`, the server may serve another reward next time under the same settings.
        return bool(self.serves) and self._spec.get("deterministic") is True

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        low, high = self._spec.get("bounds", (None, None))
        return low, high

    def check(self, examples: Iterable[Example]) -> None:
        """Raise ConfigError for a prompt that cannot be sent."""
        for item in _items(examples):
            try:
                json.dumps(item, ensure_ascii=False, allow_nan=False).encode()
            except (TypeError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise ConfigError(f"remote: the prompt {item['text']!r} cannot be sent as JSON ({reason})") from error

    def check_server(self, examples: Iterable[Example]) -> None:
        """Let the server check the prompts. This also detects a missing server before any weights load."""
        items = _items(examples)
        with self._endpoint.connect() as connection:
            self._identify(connection)
            for start in range(0, len(items), 1000):
                body = self._request(connection, "POST", "/check", {"items": items[start : start + 1000]})
                if body.get("problem"):
                    raise ConfigError(f"remote: {self.url} cannot score a prompt: {body['problem']}")

    def load(self, device: torch.device) -> None:
        with self._endpoint.connect() as connection:
            self._identify(connection)

    def identity(self) -> str:
        spec = self._spec
        return f"{spec.get('name')} of alignkit {spec.get('alignkit')} with fingerprint {spec['fingerprint']}"

    def fingerprint(self) -> str:
        # If the served reward has no fingerprint of its own, its scores may change while the server's fingerprint stays
        # the same.
        cacheable = self.deterministic and self._spec.get("cacheable") is True
        return f"remote {self._spec['fingerprint']}" if cacheable else ""

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Scores:
        files = [base64.b64encode(file).decode() for file in as_png(images)]
        items = [
            {"png": file, "text": example.text, "metadata": dict(example.metadata)}
            for file, example in zip(files, examples, strict=True)
        ]
        pixels = images.shape[-1] * images.shape[-2]
        with self._endpoint.connect() as connection:
            answers = connection.map(lambda part: self._score(connection, part), list(self._requests(items, pixels)))
        found = [answer for part in answers for answer in part]
        valid = torch.tensor([answer["valid"] for answer in found])
        values = torch.tensor([answer.get("score", math.nan) for answer in found], dtype=torch.float32)
        names = dict.fromkeys(name for answer in found for name in answer.get("parts", {}))
        parts = {
            name: torch.tensor([answer.get("parts", {}).get(name, math.nan) for answer in found], dtype=torch.float32)
            for name in names
        }
        reasons = [" ".join(str(answer.get("reason", "")).split())[:300] for answer in found]
        return Scores(values, valid, parts, reasons)

    def _requests(self, items: Sequence[dict[str, Any]], pixels: int) -> Iterator[list[dict[str, Any]]]:
        """Split the items into requests within the server's limits."""
        limits = self._spec["limits"]
        most = min(self.images_per_request, limits["items"], limits["pixels"] // pixels)
        part: list[dict[str, Any]] = []
        size = overhead = 4096  # for the JSON around the items
        for item in items:
            length = len(json.dumps(item))
            if most < 1 or overhead + length > limits["bytes"]:
                raise ConfigError(f"remote: an image of {pixels} pixels is larger than {self.url} accepts")
            if part and (len(part) >= most or size + length > limits["bytes"]):
                yield part
                part, size = [], overhead
            part.append(item)
            size += length + 2
        yield part

    def _score(self, connection: Connection, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Send one request and return the answer for each item."""
        body = self._request(connection, "POST", "/score", {"fingerprint": self._spec["fingerprint"], "items": items})
        if body.get("fingerprint") != self._spec["fingerprint"]:
            raise ConfigError(
                f"remote: {self.url} answered with fingerprint {str(body.get('fingerprint'))[:40]}, expected "
                f"{self._spec['fingerprint']}, as at its first answer; keep one reward at this address"
            )
        answers = body.get("items")
        if not isinstance(answers, list) or len(answers) != len(items):
            found = len(answers) if isinstance(answers, list) else "no"
            raise PluginError(f"remote: {self.url} returned {found} scores for {len(items)} images, expected one each")
        for answer in answers:
            if not _is_answer(answer):
                found = json.dumps(answer)[:200]
                raise PluginError(
                    f'remote: {self.url} returned {found}, expected "valid" and, if it is true, "score", a number'
                )
        return answers

    def _identify(self, connection: Connection) -> None:
        """Store the server's spec. Raises ConfigError if it serves another reward than expected."""
        spec = self._request(connection, "GET", "/spec")
        limits, bounds = spec.get("limits"), spec.get("bounds")
        complete = (
            isinstance(spec.get("fingerprint"), str)
            and isinstance(limits, dict)
            and all(type(limits.get(key)) is int and limits[key] > 0 for key in ("items", "bytes", "pixels"))
            and isinstance(bounds, list)
            and len(bounds) == 2
            and all(bound is None or (_is_number(bound) and math.isfinite(bound)) for bound in bounds)
        )
        if not complete:
            raise ConfigError(
                f"remote: {self.url} does not report a fingerprint, limits and bounds; expected `alignkit serve`"
            )
        expected = self.serves or (self._spec and self._spec["fingerprint"])
        if expected and spec["fingerprint"] != expected:
            raise ConfigError(
                f"remote: {self.url} serves {spec.get('name')} with fingerprint {spec['fingerprint']}, expected "
                f"{expected}; start the server with the same settings and versions as before"
            )
        self._spec = spec

    def _request(
        self, connection: Connection, method: str, path: str, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Send one request and return the JSON object of the answer.

        Raises PluginError if the reward failed, and ConfigError if the server is not served by `alignkit serve` of this
        protocol or refuses the request (because it serves another reward, for instance).
        """
        answer = connection.request(method, path, None if body is None else {"protocol": PROTOCOL, **body})
        if answer.status == 422:
            raise PluginError(f"remote: the reward at {self.url} failed: {answer.reason}")
        if not isinstance(answer.body, dict) or "protocol" not in answer.body:
            status = f" (status {answer.status}: {answer.reason})" if answer.status != 200 else ""
            raise ConfigError(f"remote: {self.url}{path} is not served by `alignkit serve`{status}; correct the url")
        if answer.body["protocol"] != PROTOCOL:
            raise ConfigError(
                f"remote: {self.url} uses protocol {answer.body['protocol']}, this alignkit uses {PROTOCOL}; install "
                "the same version of alignkit on both sides"
            )
        if answer.status != 200:
            raise ConfigError(f"remote: {self.url}{path} refuses the request (status {answer.status}: {answer.reason})")
        return answer.body


def _items(examples: Iterable[Example]) -> list[dict[str, Any]]:
    return [{"text": example.text, "metadata": dict(example.metadata)} for example in examples]


def _is_answer(answer: Any) -> bool:
    """Whether it is {"valid": false}, or {"valid": true, "score": number, "parts": numbers by name}."""
    if not isinstance(answer, dict) or not isinstance(answer.get("valid"), bool):
        return False
    parts = answer.get("parts", {})
    if not isinstance(parts, dict):
        return False
    numbers = [*([answer.get("score")] if answer["valid"] else []), *parts.values()]
    return all(_is_number(n) and math.isfinite(n) for n in numbers)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
