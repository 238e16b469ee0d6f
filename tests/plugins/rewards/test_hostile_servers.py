"""The client against servers that are slow, endless or confused; each answer is plain bytes on a socket."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from itertools import repeat

import pytest

from alignkit.errors import ConfigError, TransientError
from alignkit_rewards import endpoint
from alignkit_rewards.endpoint import Endpoint

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@contextlib.contextmanager
def answering(pieces: list[bytes], forever: bytes = b"", every: float = 0.05) -> Iterator[str]:
    """Serve `pieces` to each client, then `forever` again and again, one every so many seconds."""
    server, ended = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def serve() -> None:
        with contextlib.suppress(OSError):
            while not ended.is_set():
                client, _ = server.accept()
                threading.Thread(target=answer, args=(client,), daemon=True).start()

    def answer(client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            client.recv(1 << 16)
            for piece in pieces:
                client.sendall(piece)
            for piece in repeat(forever):
                if not piece or ended.wait(every):
                    return
                client.sendall(piece)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
    finally:
        ended.set()
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(5)


def ask(url: str, timeout: float = 0.5) -> object:
    with Endpoint("it", url, "key_env", "", concurrency=1, timeout=timeout, retries=3).connect() as connection:
        return connection.request("GET", "/spec").body


@pytest.mark.parametrize(
    "head", [HEAD + b"Content-Length: 100000\r\n\r\n", b"HTTP/1.1 200 OK", HEAD + b"X-A: "], ids=str
)
def test_an_answer_that_trickles_ends_at_the_deadline(head: bytes) -> None:
    begun = time.monotonic()
    with answering([head], forever=b" ") as url, pytest.raises(TransientError, match=r"no whole answer within 0.5 sec"):
        ask(url)
    assert time.monotonic() - begun < 3


def test_an_endless_answer_is_left_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "MOST_BYTES", 1 << 20)
    refused = pytest.raises(ConfigError, match=r"it: .* answers with more than 1 MiB; correct the url")
    with answering([HEAD + b"\r\n"], forever=b" " * (1 << 18), every=0) as url, refused:
        ask(url, timeout=20)


def test_a_compressed_answer_is_not_unpacked() -> None:
    refused = pytest.raises(ConfigError, match="compresses its answer, which no request allows")
    with answering([HEAD + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd"]) as url, refused:
        ask(url)


@pytest.mark.parametrize("body", [b"[" * 5000, b'{"a": ' * 200 + b"1" + b"}" * 200, b"9" * 5000, b'"\\ud800"', b"\xff"])
def test_what_is_no_sound_json_is_no_answer(body: bytes) -> None:
    with answering([HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body]) as url:
        assert ask(url, timeout=20) is None
