"""Clients that are slow, silent or many, against a server whose bounds are small."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator

import httpx2
import pytest

import servers
from alignkit.serving import http
from alignkit.serving.connections import Connections
from alignkit.serving.http import PROTOCOL, JsonServer

BODY = json.dumps({"protocol": PROTOCOL, "text": "hello"}).encode()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JsonServer]:
    """A server that echoes: 2 requests at once, 8 connections, 1.5 seconds for each transfer."""
    monkeypatch.setattr(http, "MOST_CONNECTIONS", 8)
    monkeypatch.setattr(http, "SECONDS", 1.5)
    routes = {"POST /": lambda body: {"length": len(body["text"])}}
    echo = JsonServer("127.0.0.1", 0, routes, token="", max_bytes=100_000, max_requests=2)
    with servers.running(echo):
        yield echo


def opened(server: JsonServer, length: int, sent: bytes = b"") -> socket.socket:
    """Begin a request of `length` bytes of which only `sent` arrive."""
    client = socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=10)
    head = f"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    client.sendall(head.encode() + sent)
    return client


def honest(server: JsonServer) -> int:
    return httpx2.post(server.url, content=BODY, headers={"Content-Type": "application/json"}, timeout=10).status_code


def test_slow_bodies_hold_no_place_of_an_honest_client(server: JsonServer) -> None:
    slow = [opened(server, 1000, b"{") for _ in range(6)]
    begun = time.monotonic()
    assert honest(server) == 200 and time.monotonic() - begun < 1
    for client in slow:
        client.close()


def test_more_connections_than_the_server_takes_cost_the_oldest_its_place(server: JsonServer) -> None:
    slow = [opened(server, 1000, b"{") for _ in range(20)]
    assert honest(server) == 200
    assert slow[0].recv(1) == b""
    for client in slow:
        client.close()


def test_a_client_that_takes_too_long_is_cut_off_though_it_keeps_sending(server: JsonServer) -> None:
    client, begun = opened(server, 1000), time.monotonic()
    client.settimeout(0.1)
    answer = None
    while answer is None and time.monotonic() - begun < 8:
        with contextlib.suppress(TimeoutError):
            client.sendall(b" ")
            answer = client.recv(1)
    assert answer == b"" and 1 < time.monotonic() - begun < 6
    client.close()


def test_bodies_on_their_way_take_no_more_memory_than_allowed_and_the_slowest_gives_way(server: JsonServer) -> None:
    slow = [opened(server, 90_000, b" " * 80_000) for _ in range(2)]
    time.sleep(0.3)
    fast = opened(server, 60_000, b" " * 50_000)
    fast.sendall(b" " * (10_000 - len(BODY)) + BODY)
    assert fast.recv(12) == b"HTTP/1.1 200"
    ended = [client.recv(1) == b"" for client in slow]
    assert ended.count(True) >= 1
    for client in [*slow, fast]:
        client.close()


def test_a_connection_that_the_server_works_on_is_never_cut() -> None:
    near, far = socket.socketpair()
    other, end = socket.socketpair()
    with near, far, other, end:
        bounds = Connections(1, 100, 0.0)
        assert bounds.add(near) and bounds.receive(near, 60)
        bounds.work(near)
        bounds.cut_late()
        assert not bounds.add(other)  # there is room for one alone, and the server works on it
        far.sendall(b"x")
        assert near.recv(1) == b"x"
        bounds.answer(near)
        time.sleep(0.01)
        bounds.cut_late()
        assert near.recv(1) == b""
