"""Serve a reward over HTTP: the server of `alignkit serve`, and the protocol of the reward `remote`.

Protocol 1 is JSON in UTF-8; every object has the key "protocol". An image is a PNG file in base64, which is lossless
and cannot contain code:

    GET  /spec                                                    -> name, fingerprint, cacheable, limits, ...
    POST /check  {"items": [{"text", "metadata"}]}                -> {"problem": null or the reason}
    POST /score  {"fingerprint", "items": [{"png", "text", "metadata"}]}
                      -> {"fingerprint", "items": [{"valid", "score", "parts", "reason"}]}, in the same order

Refusals are {"error": one line}, with status 401 without the token, 409 for another protocol or fingerprint, 413 for
a request that is too large, 422 if the reward cannot score it and 503 for too many requests at a time.
"""

from __future__ import annotations

import base64
import hashlib
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

from alignkit import __version__
from alignkit.config.load import RewardConfig
from alignkit.config.load import load as load_config
from alignkit.data.decode import UNREADABLE, as_rgb, open_image
from alignkit.data.text import too_long
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
    """Limits on the size and number of requests, which together bound the memory of the server."""

    items: int = 64
    bytes: int = 256 << 20
    """Bytes of JSON text in a request."""
    pixels: int = 64 << 20
    """Pixels of all images in a request together."""
    requests: int = 4
    """Requests that are decoded or scored at a time; others wait, and after a minute get status 503. Those that are
    still on their way take as much memory as this number of the largest ones at most."""


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
    """Load the reward `reward`, bind the address and return the server; `serve_forever` starts it.

    `overrides` are settings as for a run. `network` allows an address that other machines can reach, which also needs a
    token. Raises ConfigError for invalid settings, and AlignkitError if the address cannot be bound.
    """
    from alignkit.runs.build import Parts  # imports diffusers

    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port}: expected 1 to 65535, or 0 for a free port")
    token = os.environ.get(TOKEN, "").strip()
    if not is_loopback(host) and not network:
        raise ConfigError(f"--host {host}: other machines can reach this address; add --network to allow it")
    if not is_loopback(host) and not token:
        raise ConfigError(f"--host {host}: other machines can reach this address; set a token in the variable {TOKEN}")
    config = load_config(None, {**(overrides or {}), "reward": [reward]})
    parts = Parts(config)
    # Clients retry by themselves, and one request is scored at a time.
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
    """Hash the served reward: its name, settings and versions, and `own`, the fingerprint of the loaded reward.

    If `own` is empty, an edited function or replaced weights in the same folder do not change the result.
    """
    row = default_registry().find("reward", config.name)
    parts = [PROTOCOL, config.name, config.fields, row.distribution, row.version, __version__, own]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class RewardServer(JsonServer):
    """A server that scores images with one reward, one request at a time."""

    def __init__(
        self, host: str, port: int, rewards: WeightedRewards, fingerprint: str, token: str, chunk: int, limits: Limits
    ) -> None:
        """Bind the address for the single reward in `rewards`. Raises OSError if that fails."""
        self.rewards, self.fingerprint, self.chunk, self.limits = rewards, fingerprint, chunk, limits
        ((self.name, _, self.reward),) = rewards.rewards
        self.own_fingerprint = ""
        """`Reward.fingerprint` of the loaded reward."""
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
        """Load the reward. Raises ConfigError if the device does not exist."""
        self.device = find_device(device)
        self.rewards.load(self.device)
        with blaming(self.name, self.reward, "in fingerprint"):
            self.own_fingerprint = self.reward.fingerprint()

    def server_close(self) -> None:
        super().server_close()
        self.rewards.close()

    def spec(self, body: dict[str, Any]) -> dict[str, Any]:
        """Respond to GET /spec."""
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
        """Respond to POST /check."""
        examples = [_example(item) for item in _items(body)]
        try:
            self.rewards.check(examples)
        except ConfigError as error:
            return {"problem": " ".join(str(error).split())}
        return {"problem": None}

    def score(self, body: dict[str, Any]) -> dict[str, Any]:
        """Respond to POST /score. Raises Refusal for a malformed or too large request."""
        items = _items(body)
        if body.get("fingerprint", self.fingerprint) != self.fingerprint:
            wanted = str(body["fingerprint"])[:40]
            raise Refusal(409, f"the request is for fingerprint {wanted}, this server has {self.fingerprint}")
        if not items:
            raise Refusal(400, "found no items, expected at least one")
        if len(items) > self.limits.items:
            raise Refusal(413, f"found {len(items)} items, expected {self.limits.items} or fewer")
        examples, files = [_example(item) for item in items], [_file(item) for item in items]
        sizes = {_size(file) for file in files}
        if len(sizes) > 1:
            raise Refusal(400, f"found images of {len(sizes)} sizes, expected one size")
        (width, height) = sizes.pop()
        if width * height * len(items) > self.limits.pixels:
            found = f"{len(items)} images of {width}x{height}"
            raise Refusal(413, f"found {found}, expected {self.limits.pixels} pixels or fewer")
        with self._lock:
            decoded = [_levels(file) for file in files]
            if len({one.shape for one in decoded}) > 1:  # PNG files may say that they lie on their side
                raise Refusal(400, "found images of several sizes once they stand upright, expected one size")
            levels = torch.from_numpy(np.stack(decoded)).to(self.device)
            # In the memory layout of a decoder's output: sums over another layout differ in the last bit.
            images = levels.permute(0, 3, 1, 2).contiguous().float() / 255
            scores = self.rewards.score(images, examples, self.chunk)
        prefix = f"{self.name}/"
        parts = {k.removeprefix(prefix): v.tolist() for k, v in scores.parts.items() if k.startswith(prefix)}
        results = []
        for row, (value, valid) in enumerate(zip(scores.values.tolist(), scores.valid.tolist(), strict=True)):
            own = {name: column[row] for name, column in parts.items() if math.isfinite(column[row])}
            reason = scores.reasons[row].removeprefix(f"{self.name}: ") if scores.reasons else ""
            results.append(
                {"valid": valid, "score": value, "parts": own} if valid else {"valid": False, "reason": reason}
            )
        return {"fingerprint": self.fingerprint, "items": results}


def _items(body: dict[str, Any]) -> list[dict[str, Any]]:
    items = body.get("items")
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise Refusal(400, "items is missing; expected a list of objects")
    return items


def _example(item: dict[str, Any]) -> Example:
    text, metadata = item.get("text"), item.get("metadata", {})
    if not isinstance(text, str) or not isinstance(metadata, dict):
        raise Refusal(400, "expected each item to have text, a string, and metadata, an object")
    if too_long(text):
        raise Refusal(413, too_long(text))
    return Example(text, metadata)


def _file(item: dict[str, Any]) -> bytes:
    try:
        return base64.b64decode(item.get("png"), validate=True)  # type: ignore[arg-type]  # TypeError is caught
    except (TypeError, ValueError):
        raise Refusal(400, "expected each item to have png, a PNG file in base64") from None


def _size(file: bytes) -> tuple[int, int]:
    """Read width and height from the header, so that an image that is too large is never decompressed."""
    if len(file) < 24 or file[:8] != b"\x89PNG\r\n\x1a\n" or file[12:16] != b"IHDR":
        raise Refusal(400, "an image is not a PNG file")
    width, height = struct.unpack(">II", file[16:24])
    return width, height


def _levels(file: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Decode a PNG file to 8-bit RGB levels (H, W, 3)."""
    try:
        with open_image(file, ["PNG"]) as image:
            return np.asarray(as_rgb(image))
    except UNREADABLE as error:
        raise Refusal(400, f"an image cannot be read ({error})") from None
