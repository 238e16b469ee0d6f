"""Bounds on the connections of a server, so that slow, silent or many clients take no room from the others."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic


@dataclass(eq=False)
class Transfer:
    """A request that arrives, or an answer that leaves, on one connection."""

    connection: socket.socket
    since: float
    received: int = 0
    """Bytes of the request's body that are in memory."""
    moving: bool = True
    """Whether the client is to send or to read; else the server works on its request."""

    def rate(self) -> float:
        """Bytes a second."""
        return self.received / max(monotonic() - self.since, 1e-3)

    def cut(self) -> None:
        """Wake the thread that reads or writes the connection, which then closes it."""
        self.moving = False
        with contextlib.suppress(OSError):  # the client was faster
            self.connection.shutdown(socket.SHUT_RDWR)


class Connections:
    """The open connections of a server; thread-safe.

    A client that takes longer than `seconds` to send its request, or to read the answer, is cut off. Where there are
    `most` connections, the one that has been sending the longest makes room for the next; where bodies take more than
    `most_bytes` of memory, the slowest.
    """

    def __init__(self, most: int, most_bytes: int, seconds: float) -> None:
        self.most, self.most_bytes, self.seconds = most, most_bytes, seconds
        self._open: dict[socket.socket, Transfer] = {}
        self._lock = threading.Lock()

    def add(self, connection: socket.socket) -> bool:
        """Take a new connection. Returns False if there is no room, since the server works on all others."""
        with self._lock:
            if len(self._open) >= self.most and not self._cut_worst(lambda one: one.since):
                return False
            self._open[connection] = Transfer(connection, monotonic())
            return True

    def remove(self, connection: socket.socket) -> None:
        """Forget a connection that is closed."""
        with self._lock:
            self._open.pop(connection, None)

    def begin(self, connection: socket.socket) -> None:
        """Start the time of a request, before its first line is read."""
        self._mark(connection, moving=True, keep=0)

    def work(self, connection: socket.socket) -> None:
        """Stop the time: the request is complete, and the server works on it."""
        self._mark(connection, moving=False, keep=1)

    def answer(self, connection: socket.socket) -> None:
        """Start the time in which the client reads its answer."""
        self._mark(connection, moving=True, keep=0)

    def receive(self, connection: socket.socket, count: int) -> bool:
        """Note `count` further bytes of a body. Returns False if there is no room for them."""
        with self._lock:
            if (own := self._open.get(connection)) is None or not own.moving:
                return False
            own.received += count
            while sum(one.received for one in self._open.values()) > self.most_bytes:
                if (worst := self._cut_worst(Transfer.rate)) is own or worst is None:
                    own.received = 0
                    return False
                worst.received = 0
            return True

    def cut_late(self) -> None:
        """Cut off the clients whose time is over."""
        with self._lock:
            for one in self._open.values():
                if one.moving and monotonic() - one.since > self.seconds:
                    one.cut()

    def _mark(self, connection: socket.socket, moving: bool, keep: int) -> None:
        with self._lock:
            if own := self._open.get(connection):
                own.since, own.moving, own.received = monotonic(), moving, own.received * keep

    def _cut_worst(self, key: Callable[[Transfer], float]) -> Transfer | None:
        """Cut off the transfer with the lowest key and return it; None if there is none."""
        worst = min((one for one in self._open.values() if one.moving), key=key, default=None)
        if worst is not None:
            worst.cut()
        return worst
