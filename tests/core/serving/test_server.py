from __future__ import annotations

import base64
import io
import os
import signal
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from PIL import Image

from alignkit.config.load import RewardConfig
from alignkit.errors import AlignkitError, ConfigError, TransientError
from alignkit.interfaces import Reward
from alignkit.records import Example
from alignkit.rewards.cache import ScoreCache
from alignkit.rewards.checked import Scoring
from alignkit.rewards.weighted import WeightedRewards
from alignkit.serving.http import is_loopback
from alignkit.serving.server import Limits, RewardServer, fingerprint, open_server
from alignkit_rewards.jpeg import JpegIncompressibility
from alignkit_rewards.remote import Remote
from servers import MARK, running, serving

LIMITS = Limits(items=2, bytes=200_000, pixels=2 * 64 * 64, requests=2)


def png(size: tuple[int, int] = (8, 8), mode: str = "RGB", color: Any = None) -> str:
    file = io.BytesIO()
    Image.new(mode, size, color or 0).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def body(*items: Any, **more: Any) -> dict[str, Any]:
    return {"protocol": 1, "items": list(items), **more}


class Red(Reward):
    def __call__(self, images: torch.Tensor, examples: Any) -> torch.Tensor:
        return images[:, 0].mean((1, 2))


@pytest.fixture
def server() -> Iterator[RewardServer]:
    with serving(Red(), limits=LIMITS) as found:
        yield found


@pytest.fixture
def send(server: RewardServer) -> Iterator[Callable[..., tuple[int, dict[str, Any]]]]:
    with httpx2.Client(base_url=server.url, timeout=20, trust_env=False) as client:

        def request(method: str, path: str, **content: Any) -> tuple[int, dict[str, Any]]:
            answer = client.request(method, path, **content)
            return answer.status_code, answer.json()

        yield request


Send = Callable[..., tuple[int, dict[str, Any]]]


def test_the_spec_describes_the_served_reward(send: Send) -> None:
    status, spec = send("GET", "/spec")
    assert status == 200
    assert {"protocol": 1, "name": "served", "fingerprint": MARK, "deterministic": True}.items() <= spec.items()
    assert spec["cacheable"] is False  # it has no fingerprint of its own
    assert spec["bounds"] == [None, None]
    assert spec["limits"] == {"items": 2, "bytes": 200_000, "pixels": 8192}


def test_images_of_every_kind_of_png_are_scored(send: Send) -> None:
    plain = {"png": png(color=(255, 0, 0)), "text": "a"}
    status, answer = send("POST", "/score", json=body(plain, {**plain, "png": png(mode="RGBA", color=(255, 0, 0, 0))}))
    assert status == 200 and answer["fingerprint"] == MARK
    assert [item["score"] for item in answer["items"]] == [1.0, 1.0]
    grey = {"png": png(mode="L", color=51), "text": ""}
    assert send("POST", "/score", json=body(grey))[1]["items"] == [
        {"valid": True, "score": pytest.approx(0.2), "parts": {}}
    ]


def head(width: int, height: int) -> bytes:
    """A PNG file whose header states this size, with almost no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def coded(data: bytes) -> dict[str, str]:
    return {"png": base64.b64encode(data).decode(), "text": "a"}


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "jpeg")
    return file.getvalue()


ONE = {"png": png(), "text": "a"}


@pytest.mark.parametrize(
    ("sent", "status", "message"),
    [
        ({"json": {"items": [ONE]}}, 409, "found protocol None, expected 1"),
        ({"json": {**body(ONE), "protocol": 2}}, 409, "found protocol 2, expected 1"),
        (
            {"json": body(ONE, fingerprint="other")},
            409,
            f"fingerprint other, this server has {MARK}",
        ),
        ({"json": body()}, 400, "found no items, expected at least one"),
        ({"json": {"protocol": 1}}, 400, "items is missing; expected a list of objects"),
        ({"json": body("x")}, 400, "items is missing; expected a list of objects"),
        ({"json": body({"png": png()})}, 400, "expected each item to have text"),
        ({"json": body({**ONE, "metadata": 3})}, 400, "expected each item to have text"),
        ({"json": body({"text": "a"})}, 400, "each item to have png, a PNG file in base64"),
        ({"json": body({**ONE, "png": "/etc/passwd"})}, 400, "each item to have png, a PNG file in base64"),
        (
            {"json": body({**ONE, "png": "file:///etc/passwd"})},
            400,
            "each item to have png, a PNG file in base64",
        ),
        ({"json": body(coded(jpeg()))}, 400, "an image is not a PNG file"),
        ({"json": body(coded(b"\x80\x04K\x01."))}, 400, "an image is not a PNG file"),
        ({"json": body(coded(head(8, 8)))}, 400, "an image cannot be read"),
        (
            {"json": body(coded(head(50_000, 50_000)))},
            413,
            "1 images of 50000x50000, expected 8192 pixels or fewer",
        ),
        ({"json": body(coded(head(0, 8)))}, 400, "an image cannot be read"),
        ({"json": body(ONE, ONE, ONE)}, 413, "found 3 items, expected 2 or fewer"),
        ({"json": body(ONE, {**ONE, "png": png((8, 9))})}, 400, "found images of 2 sizes, expected one size"),
        ({"json": body({**ONE, "text": "x" * 200_000})}, 413, "bytes, expected 200000 or fewer"),
        ({"json": [1]}, 400, "expected a JSON object"),
        ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 400, "expected a JSON object"),
        ({"content": b"[" * 100_000, "headers": {"Content-Type": "application/json"}}, 400, "expected a JSON object"),
        ({"content": b"\xff\xfe", "headers": {"Content-Type": "application/json"}}, 400, "expected a JSON object"),
        ({"content": b"{}", "headers": {"Content-Type": "text/plain"}}, 415, "expected Content-Type: application/json"),
        ({"content": iter([b"{}"]), "headers": {"Content-Type": "application/json"}}, 411, "expected a Content-Length"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else str(value),
)
def test_a_bad_request_is_refused_in_one_line_and_the_server_continues(
    sent: dict[str, Any], status: int, message: str, send: Send
) -> None:
    found, answer = send("POST", "/score", **sent)
    assert (found, set(answer)) == (status, {"protocol", "error"})
    assert message in answer["error"] and "\n" not in answer["error"]
    assert send("POST", "/score", json=body(ONE))[0] == 200


@pytest.mark.parametrize("path", ["/", "/../../etc/passwd", "/v1/score", "/spec?x=1"])
def test_every_other_path_is_not_found(path: str, send: Send) -> None:
    assert send("GET", path)[0] == 404
    assert send("POST", path, json=body())[0] == 404


def test_a_png_file_that_lies_on_its_side_is_turned_and_compared_then(send: Send) -> None:
    def item(size: tuple[int, int], turned: bool) -> dict[str, Any]:
        file, exif = io.BytesIO(), Image.Exif()
        exif[0x0112] = 6 if turned else 1
        Image.new("RGB", size).save(file, "png", exif=exif)
        return {**ONE, "png": base64.b64encode(file.getvalue()).decode()}

    status, answer = send("POST", "/score", json=body(item((16, 8), False), item((16, 8), True)))
    assert status == 400 and answer["error"].startswith("found images of several sizes once they stand upright")
    assert send("POST", "/score", json=body(item((16, 8), True), item((16, 8), True)))[0] == 200


def test_too_many_requests_at_a_time_are_refused_with_503(server: RewardServer, send: Send) -> None:
    server.patience = 0.05
    for _ in range(2):
        assert server.slots.acquire(blocking=False)
    status, answer = send("POST", "/score", json=body(ONE))
    assert (status, answer["error"]) == (503, "2 requests are in progress; try again")
    server.slots.release()
    assert send("POST", "/score", json=body(ONE))[0] == 200
    assert send("POST", "/score", json=body())[0] == 400  # a refused request frees its slot
    assert send("POST", "/score", json=body(ONE))[0] == 200


def test_a_client_that_disconnects_does_no_harm(server: RewardServer, send: Send, capfd: Any) -> None:
    for text in ("POST /score HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{", "GET /sp"):
        with socket.create_connection(server.server_address[:2]) as connection:
            connection.sendall(text.encode())
    assert send("POST", "/score", json=body(ONE))[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_without_a_token_requests_for_another_host_are_refused() -> None:
    with serving(Red()) as server, httpx2.Client(base_url=server.url, trust_env=False) as client:
        for host, status in (("evil.example", 403), ("evil.example:8188", 403), ("[oh", 403), ("localhost:1", 200)):
            assert client.get("/spec", headers={"Host": host}).status_code == status
        assert "ALIGNKIT_TOKEN" in client.get("/spec", headers={"Host": "evil.example"}).json()["error"]
        assert client.get("/spec", headers={"Host": "[::1]:8188"}).status_code == 200
        assert client.get("/spec", headers={"Origin": "http://evil.example"}).status_code == 403
    with serving(Red(), token="s3cret") as server, httpx2.Client(base_url=server.url, trust_env=False) as client:
        headers = {"Host": "rewards.example", "Authorization": "Bearer s3cret"}
        assert client.get("/spec", headers=headers).status_code == 200


def test_bounds_that_are_not_finite_are_none() -> None:
    class Open(Red):
        bounds = (0.0, float("inf"))

    with serving(Open()) as server, httpx2.Client(base_url=server.url, trust_env=False) as client:
        assert client.get("/spec").json()["bounds"] == [0.0, None]


def test_requests_without_the_token_are_refused() -> None:
    with serving(Red(), token="s3cret") as server, httpx2.Client(base_url=server.url, trust_env=False) as client:
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
            assert client.get("/spec", headers=given).status_code == 401
            answer = client.post("/score", json=body(ONE), headers=given)
            assert answer.status_code == 401 and "s3cret" not in answer.text
        assert client.post("/score", json=body(ONE), headers={"Authorization": "Bearer s3cret"}).status_code == 200


def test_loopback_addresses_are_distinguished_from_others() -> None:
    for host in ("127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"):
        assert is_loopback(host)
    for host in ("0.0.0.0", "::", "192.168.0.3", "", "localhost.example", "127.0.0.1.example"):
        assert not is_loopback(host)


def test_a_transient_failure_is_passed_on_at_once_for_the_client_to_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def busy(self: Reward, images: torch.Tensor, examples: Any) -> torch.Tensor:
        calls.append(len(examples))
        raise TransientError("busy")

    monkeypatch.setattr(JpegIncompressibility, "__call__", busy)
    with (
        open_server("jpeg_incompressibility", port=0) as server,
        pytest.raises(TransientError, match="failed after 1 attempt: busy"),
    ):
        server.score(body({"png": png(), "text": "a"}))
    assert calls == [1]


def test_a_public_address_needs_the_flag_and_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALIGNKIT_TOKEN", raising=False)
    with pytest.raises(ConfigError, match=r"--host 0.0.0.0: other machines can reach this address; add --network"):
        open_server("jpeg_incompressibility", host="0.0.0.0", port=0)
    with pytest.raises(ConfigError, match=r"set a token in the variable ALIGNKIT_TOKEN$"):
        open_server("jpeg_incompressibility", host="0.0.0.0", port=0, network=True)
    monkeypatch.setenv("ALIGNKIT_TOKEN", "s3cret")
    with open_server("jpeg_incompressibility", host="0.0.0.0", port=0, network=True) as server:
        assert server.token == "s3cret"


def test_bad_settings_are_refused(server: RewardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALIGNKIT_TOKEN", raising=False)
    with pytest.raises(AlignkitError, match=r"--port \d+: cannot be bound .*; choose another"):
        open_server("jpeg_incompressibility", port=server.server_address[1])
    for port in (-1, 80_000):
        with pytest.raises(ConfigError, match=rf"^--port {port}: expected 1 to 65535, or 0 for a free port"):
            open_server("jpeg_incompressibility", port=port)
    with pytest.raises(ConfigError, match=r"--device quantum: cannot be used"):
        open_server("jpeg_incompressibility", port=0, device="quantum")
    with pytest.raises(AlignkitError, match="unknown reward 'jepg_incompressibility'; did you mean jpeg_incompr"):
        open_server("jepg_incompressibility", port=0)


def test_the_fingerprint_names_reward_and_settings() -> None:
    def of(name: str, **fields: Any) -> str:
        return fingerprint(RewardConfig(name, fields), "")

    marks = {
        of("jpeg_incompressibility", quality=95),
        of("jpeg_incompressibility", quality=90),
        of("jpeg_compressibility", quality=90),
    }
    assert len(marks) == 3 and of("jpeg_compressibility", quality=90) in marks
    assert fingerprint(RewardConfig("jpeg_compressibility", {"quality": 90}), "edited") not in marks


def test_an_edited_function_is_another_reward_and_its_cached_scores_are_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = {"reward.function.target": "edited_reward:score", "reward.function.repeats": True}
    cache = ScoreCache(tmp_path / "scores.sqlite")

    @contextmanager
    def served(source: str) -> Iterator[RewardServer]:
        (tmp_path / "edited_reward.py").write_text(f"def score(images, examples):\n    return {source}\n")
        monkeypatch.delitem(sys.modules, "edited_reward", raising=False)
        with open_server("function", settings, port=0) as server, running(server):
            yield server

    def scored(server: RewardServer) -> list[float]:
        remote = Remote(url=server.url, serves=server.fingerprint)
        rewards = WeightedRewards([("remote", 1.0, remote)], scoring=Scoring(cache=cache))
        rewards.load(torch.device("cpu"))
        return rewards(torch.ones(1, 3, 8, 8), [Example("a")]).values.tolist()

    with served("images.mean((1, 2, 3))") as server:
        first = server.fingerprint
        assert server.spec({})["cacheable"] and scored(server) == [1.0]
        server.reward._function = lambda images, examples: [5.0]  # type: ignore[attr-defined]
        assert scored(server) == [1.0]  # cached
    with served("images.mean((1, 2, 3)) * 10") as server:
        with pytest.raises(ConfigError, match=f"serves function with fingerprint .*, expected {first}; start the serv"):
            Remote(url=server.url, serves=first).check_server([])
        assert scored(server) == [10.0]
    cache.close()


REWARD = ["jpeg_incompressibility", "--set", "reward.jpeg_incompressibility.quality=70", "--port", "0"]


@pytest.mark.slow
def test_the_command_serves_until_it_is_terminated(tmp_path: Path) -> None:
    environment = {**os.environ, "ALIGNKIT_TOKEN": "s3cret"}
    process = subprocess.Popen(
        [sys.executable, "-m", "alignkit", "serve", *REWARD],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("jpeg_incompressibility at http://127.0.0.1:") and "s3cret" not in line
        url, mark = line.split()[2].rstrip(","), line.split()[4].rstrip(";")
        images = (torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
        examples = [Example("a")] * 3
        with pytest.raises(ConfigError, match="refuses the token"):
            Remote(url=url, token_env="").check_server(examples)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ALIGNKIT_TOKEN", "s3cret")
            remote = Remote(url=url, serves=mark)
            remote.check_server(examples)
            remote.load(torch.device("cpu"))
            assert torch.equal(remote(images, examples).values, JpegIncompressibility(70)(images, examples))
        process.send_signal(signal.SIGTERM)  # SIGINT is ignored by what a shell put into the background
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0 and errors == "stopped\n"
    finally:
        process.kill()
        process.communicate()
