"""A reward behind HTTP: what `alignkit serve` runs, and what the reward `remote` asks.

Protocol 1, JSON in UTF-8, each object with the key "protocol"; an image is a PNG file in base64, so nothing is lost
and nothing that is sent can run:

    GET  /spec                                                    -> name, fingerprint, cacheable, limits, ...
    POST /check  {"items": [{"text", "metadata"}]}                -> {"problem": null or what cannot be scored}
    POST /score  {"fingerprint", "items": [{"png", "text", "metadata"}]}
                      -> {"fingerprint", "items": [{"valid", "score", "parts", "reason"}]}, one for each, in order

Refusals are {"error": one line}: 401 without the token, 409 for another protocol or fingerprint, 413 for what is too
large, 422 where the reward cannot score it, 503 for too much at once.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from alignkit import __version__
from alignkit.config.load import RewardConfig
from alignkit.config.load import load as load_config
from alignkit.data.decode import UNREADABLE, as_rgb
from alignkit.errors import AlignkitError, ConfigError
from alignkit.models.device import find_device
from alignkit.records import Example
from alignkit.registry import default_registry
from alignkit.rewards.checked import blaming
from alignkit.rewards.weighted import WeightedRewards
from alignkit.serving.http import PROTOCOL, TOKEN, JsonServer, Refusal, is_loopback

PORT = 8188


@dataclass(frozen=True)
class Limits:
    """What one request may hold, and how many may be under way: together they bound the server's memory."""

    items: int = 64
    bytes: int = 256 << 20
    """Of the JSON text."""
    pixels: int = 64 << 20
    """Of all images of a request together."""
    requests: int = 4
    """Read or scored at once; further ones wait, and are told to come again when that takes long."""


def open_server(
    reward: str,
    overrides: Mapping[str, Any] | None = None,
    host: str = "127.0.0.1",
    port: int = PORT,
    network: bool = False,
    device: str = "auto",
    chunk: int = 16,
    limits: Limits | None = None,
) -> RewardServer:
    """A server of the reward with this name, loaded and bound; `serve_forever` answers.

    `overrides` as for a run; `network` allows an address that other machines reach, for which a token must be set.
    Raises ConfigError for what cannot be served, AlignkitError for an address that cannot be bound.
    """
    from alignkit.runs.build import Parts  # brings diffusers along

    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port}: expected a number from 1 to 65535, or 0, which takes a free port")
    token = os.environ.get(TOKEN, "").strip()
    if not is_loopback(host) and not network:
        raise ConfigError(f"--host {host}: other machines reach this address; add --network if that is what you want")
    if not is_loopback(host) and not token:
        raise ConfigError(f"--host {host}: other machines reach this address; set a token in the environment: {TOKEN}")
    config = load_config(None, {**(overrides or {}), "reward": [reward]})
    parts = Parts(config)
    # A client is told at once to come again, and sees to it itself; one request is scored at a time.
    scoring = replace(parts.scoring(), retries=0, overlap=False)
    rewards = WeightedRewards(parts.trained_rewards(), scoring=scoring)
    rewards.check([])
    try:
        server = RewardServer(host, port, rewards, "", token, chunk, limits or Limits())
    except OSError as error:
        raise AlignkitError(f"--host {host} --port {port}: cannot be bound ({error}); choose another") from error
    try:
        server.load(device)
        server.fingerprint = fingerprint(config.rewards[0], server.own_fingerprint)
    except BaseException:
        server.server_close()
        raise
    return server


def fingerprint(config: RewardConfig, own: str) -> str:
    """Names what is served: the reward, its settings, the versions of alignkit and of the reward's distribution, and
    what the loaded reward tells of itself, `own`.

    Where that is nothing, a function that was edited or a folder whose weights were exchanged keeps its fingerprint.
    """
    row = default_registry().find("reward", config.name)
    told = [PROTOCOL, config.name, config.fields, row.distribution, row.version, __version__, own]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]


class RewardServer(JsonServer):
    """Answers for one reward, one request at a time."""

    def __init__(
        self, host: str, port: int, rewards: WeightedRewards, fingerprint: str, token: str, chunk: int, limits: Limits
    ) -> None:
        """`rewards` holds the one, which `load` loads. Raises OSError for an address that cannot be bound."""
        self.rewards, self.fingerprint, self.chunk, self.limits = rewards, fingerprint, chunk, limits
        ((self.name, _, self.reward),) = rewards.rewards
        self.own_fingerprint = ""
        """What the reward tells of itself once it is loaded."""
        self.device = torch.device("cpu")
        self._lock = threading.Lock()
        super().__init__(
            host,
            port,
            {"GET /spec": self.spec, "POST /check": self.check, "POST /score": self.score},
            token=token,
            max_bytes=limits.bytes,
            max_requests=limits.requests,
        )

    def load(self, device: str) -> None:
        """Load the reward. Raises ConfigError for a device that is not there."""
        self.device = find_device(device)
        self.rewards.load(self.device)
        with blaming(self.name, self.reward, "in fingerprint"):
            self.own_fingerprint = self.reward.fingerprint()

    def server_close(self) -> None:
        super().server_close()
        self.rewards.close()

    def spec(self, body: dict[str, Any]) -> dict[str, Any]:
        limits = self.limits
        return {
            "name": self.name,
            "alignkit": __version__,
            "fingerprint": self.fingerprint,
            "deterministic": bool(self.reward.deterministic),
            "cacheable": bool(self.reward.deterministic and self.own_fingerprint),
            "bounds": [bound if bound is not None and math.isfinite(bound) else None for bound in self.reward.bounds],
            "limits": {"items": limits.items, "bytes": limits.bytes, "pixels": limits.pixels},
        }

    def check(self, body: dict[str, Any]) -> dict[str, Any]:
        examples = [_example(item) for item in _items(body)]
        try:
            self.rewards.check(examples)
        except ConfigError as error:
            return {"problem": " ".join(str(error).split())}
        return {"problem": None}

    def score(self, body: dict[str, Any]) -> dict[str, Any]:
        items = _items(body)
        if body.get("fingerprint", self.fingerprint) != self.fingerprint:
            raise Refusal(409, f"this server's fingerprint is {self.fingerprint}, not {str(body['fingerprint'])[:40]}")
        if not items:
            raise Refusal(400, "items is empty, expected one or more")
        if len(items) > self.limits.items:
            raise Refusal(413, f"{len(items)} items, expected {self.limits.items} or fewer")
        examples, files = [_example(item) for item in items], [_file(item) for item in items]
        sizes = {_size(file) for file in files}
        if len(sizes) > 1:
            raise Refusal(400, f"images of {len(sizes)} sizes, expected one")
        (width, height) = sizes.pop()
        if width * height * len(items) > self.limits.pixels:
            raise Refusal(413, f"{len(items)} images of {width}x{height}, more than {self.limits.pixels} pixels")
        with self._lock:
            levels = torch.from_numpy(np.stack([_levels(file) for file in files])).to(self.device)
            # In the memory layout that a decoder gives: sums over another one differ in the last bit.
            images = levels.permute(0, 3, 1, 2).contiguous().float() / 255
            scores = self.rewards.score(images, examples, self.chunk)
        prefix = f"{self.name}/"
        parts = {k.removeprefix(prefix): v.tolist() for k, v in scores.parts.items() if k.startswith(prefix)}
        answers = []
        for row, (value, valid) in enumerate(zip(scores.values.tolist(), scores.valid.tolist(), strict=True)):
            own = {name: column[row] for name, column in parts.items() if math.isfinite(column[row])}
            reason = scores.reasons[row].removeprefix(f"{self.name}: ") if scores.reasons else ""
            answers.append(
                {"valid": valid, "score": value, "parts": own} if valid else {"valid": False, "reason": reason}
            )
        return {"fingerprint": self.fingerprint, "items": answers}


def _items(body: dict[str, Any]) -> list[dict[str, Any]]:
    items = body.get("items")
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise Refusal(400, "items is missing, expected a list of objects")
    return items


def _example(item: dict[str, Any]) -> Example:
    text, metadata = item.get("text"), item.get("metadata", {})
    if not isinstance(text, str) or not isinstance(metadata, dict):
        raise Refusal(400, "an item lacks text, expected a string, or has metadata that are no object")
    return Example(text, metadata)


def _file(item: dict[str, Any]) -> bytes:
    try:
        return base64.b64decode(item.get("png"), validate=True)  # type: ignore[arg-type]  # TypeError is told
    except (TypeError, ValueError):
        raise Refusal(400, "an item lacks png, expected a PNG file in base64") from None


def _size(file: bytes) -> tuple[int, int]:
    """Width and height, read off the file's head: what is too large is never unpacked."""
    if len(file) < 24 or file[:8] != b"\x89PNG\r\n\x1a\n" or file[12:16] != b"IHDR":
        raise Refusal(400, "an image is no PNG file")
    width, height = struct.unpack(">II", file[16:24])
    return width, height


def _levels(file: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(H, W, 3) grey levels."""
    try:
        with Image.open(io.BytesIO(file), formats=["PNG"]) as image:
            return np.asarray(as_rgb(image))
    except UNREADABLE as error:
        raise Refusal(400, f"an image cannot be read ({error})") from None
