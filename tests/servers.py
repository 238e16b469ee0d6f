"""Servers for tests, in threads: a reward over HTTP, an endpoint that imitates a vision language model, and images."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from alignkit.errors import ConfigError, TransientError
from alignkit.interfaces import Reward
from alignkit.records import Example, Scores
from alignkit.rewards.checked import Scoring
from alignkit.rewards.weighted import WeightedRewards
from alignkit.serving.answers import Pair
from alignkit.serving.server import Limits, RewardServer

MARK = "0123456789abcdef"


def solid(pair: Pair) -> tuple[bytes, bytes]:
    """Two images whose levels name the pair and which of both they are."""
    files = []
    for which in range(2):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (pair.prompt, pair.copy, which)).save(file, "PNG")
        files.append(file.getvalue())
    return files[0], files[1]


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serving(
    reward: Reward,
    *,
    token: str = "",
    limits: Limits | None = None,
    port: int = 0,
    fingerprint: str = MARK,
    chunk: int = 16,
) -> Iterator[RewardServer]:
    """Serve `reward` over HTTP on a free port."""
    rewards = WeightedRewards([("served", 1.0, reward)], scoring=Scoring(retries=0))
    server = RewardServer("127.0.0.1", port, rewards, fingerprint, token, 16, limits or Limits())
    server.load("cpu")
    with running(server):
        yield server


class Endpoint(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint with the model "judge".

    `respond(brightness, question)` returns its response: a status with an error, the log-probabilities of the first
    token, or a text. `requests` holds the requests so far.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, respond: Callable[[float, str], tuple[int, str] | dict[str, float] | str], slow: float = 0
    ) -> None:
        self.respond, self.slow = respond, slow
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.models: list[str] | None = ["judge", "other"]
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Chat)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Chat(BaseHTTPRequestHandler):
    server: Endpoint
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        models = self.server.models
        if self.path == "/v1/models" and models is not None:
            self._send(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in models]})
        else:
            self._send(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append(body)
            server.headers.append(dict(self.headers))
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        time.sleep(server.slow)
        with server.lock:
            server.at_once -= 1
        if self.path != "/v1/chat/completions" or body["model"] not in (server.models or [body["model"]]):
            return self._send(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
        image, text = body["messages"][0]["content"]
        kind, _, data = image["image_url"]["url"].partition(";base64,")
        assert kind == "data:image/png" and image["type"] == "image_url" and text["type"] == "text"
        with Image.open(io.BytesIO(base64.b64decode(data))) as opened:
            brightness = float(np.asarray(opened).mean() / 255)
        response = server.respond(brightness, text["text"])
        if isinstance(response, tuple):
            return self._send(response[0], {"error": {"message": response[1], "type": "error"}})
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "logprobs": None}
        if isinstance(response, dict):
            top = [{"token": token, "logprob": value, "bytes": None} for token, value in response.items()]
            choice |= {"message": {"role": "assistant", "content": next(iter(response), "")}}
            choice |= {"logprobs": {"content": [{**top[0], "top_logprobs": top}] if top else []}}
        else:
            choice |= {"message": {"role": "assistant", "content": response}}
        self._send(200, {"id": "x", "object": "chat.completion", "model": body["model"], "choices": [choice]})

    def _send(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        return


def brightness(images: torch.Tensor) -> torch.Tensor:
    """Return the mean of the 8-bit levels of images (N, 3, H, W), (N,), as the endpoint computes it."""
    return (images * 255).round().double().mean((1, 2, 3)) / 255


@dataclass
class Odd(Reward):
    """The brightness, with parts and unscorable prompts; fails in the way that `wrong` names."""

    wrong: str = ""
    calls: int = 0

    bounds = (0.0, 1.0)

    def check(self, examples: Any) -> None:
        for example in examples:
            if "unscorable" in example.text:
                raise ConfigError(f"odd: the prompt {example.text!r} cannot be scored")

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Scores:
        self.calls += 1
        if self.wrong == "busy" and self.calls < 3:
            raise TransientError("odd: come again")
        if self.wrong == "bug":
            raise KeyError("target")
        values = images.mean((1, 2, 3))
        if self.wrong == "nan":
            values[0] = torch.nan
        weights = torch.tensor([float(example.metadata.get("weight", 1)) for example in examples])
        valid = torch.tensor(["?" not in example.text for example in examples])
        some = torch.where(torch.arange(len(values)) % 2 == 0, values / 2, torch.nan)
        reasons = ["" if one else "a question" for one in valid.tolist()]
        return Scores(values * weights, valid, {"half": values / 2, "some": some}, reasons)
