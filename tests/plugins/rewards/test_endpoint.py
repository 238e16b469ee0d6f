from __future__ import annotations

import base64
import io
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import numpy as np
import pytest
import torch
from PIL import Image

from alignkit.errors import ConfigError
from alignkit_rewards.endpoint import LONGEST_WAIT, Endpoint, _retry_after, as_png
from servers import Endpoint as Server
from servers import running


def endpoint(url: str) -> Endpoint:
    return Endpoint("it", url, "key_env", "", concurrency=2, timeout=20.0, retries=1)


def test_a_png_file_preserves_every_level() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16).clone()
    levels[1] = levels[1].flip(0, 2)
    for file, expected in zip(as_png(levels.float() / 255), levels, strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(file))), expected.permute(1, 2, 0).numpy())


def test_retry_after_is_a_number_or_a_date() -> None:
    assert _retry_after("2", 9.0) == 2 and _retry_after("0.25", 9.0) == 0.25
    assert _retry_after("", 9.0) == 9 and _retry_after("soon", 9.0) == 9 and _retry_after("-1", 9.0) == 9
    later = datetime.now(UTC) + timedelta(seconds=1000)
    assert 900 < _retry_after(format_datetime(later, usegmt=True), 9.0) <= 1000
    assert _retry_after(format_datetime(datetime(2020, 1, 1, tzinfo=UTC), usegmt=True), 9.0) == 0
    assert LONGEST_WAIT == 30  # the upper limit on what a server may request


def test_a_redirect_is_not_followed() -> None:
    with running(server := Server(lambda *_: (307, "over there"))), endpoint(server.url).connect() as connection:
        server.models = None
        file = base64.b64encode(as_png(torch.zeros(1, 3, 4, 4))[0]).decode()
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{file}"}}
        body = {"model": "x", "messages": [{"content": [image, {"type": "text", "text": "?"}]}]}
        with pytest.raises(ConfigError, match="answers with a redirect, which is not followed; correct the url"):
            connection.request("POST", "/chat/completions", body)


def test_loopback_is_reached_without_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with running(server := Server(lambda *_: "")), endpoint(server.url).connect() as connection:
        assert connection.request("GET", "/models").status == 200


def test_the_first_error_cancels_the_rest_without_waiting() -> None:
    with endpoint("http://127.0.0.1:1").connect() as connection:
        done: list[int] = []

        def work(item: int) -> int:
            if item == 0:
                raise ValueError("first")
            done.append(item)
            connection._stopping.wait(20)
            return item

        start = time.monotonic()
        with pytest.raises(ValueError, match="first"):
            connection.map(work, range(100))
        assert time.monotonic() - start < 15 and len(done) < 10
