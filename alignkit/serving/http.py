"""JSON over HTTP with bounds: on the size of a request, on how many are under way, and on who may ask."""

from __future__ import annotations

import hmac
import ipaddress
import json
import re
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from alignkit import __version__
from alignkit.errors import AlignkitError, PluginError, TransientError

PROTOCOL = 1
"""Stands in every object, on the way there and back; another one is refused."""
TOKEN = "ALIGNKIT_TOKEN"
"""The environment variable with the token that clients must send, if it is set."""

_NUMBER = re.compile(r"[0-9]{1,15}")

Route = Callable[[dict[str, Any]], dict[str, Any]]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`, a name or an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _host(address: str) -> str:
    """The name or address in what a client calls its server, "[::1]:8188"; empty where it does not."""
    try:
        return (urlsplit(f"//{address}").hostname or "").removesuffix(".")
    except ValueError:
        return address


class Refusal(Exception):
    """A request that is not answered, with its status and one line that says why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class JsonServer(ThreadingHTTPServer):
    """Answers JSON objects with JSON objects, in a thread for each connection."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128  # connections not yet accepted; many processes may ask at once
    patience = 60.0
    """Seconds that a request waits until there is room for it, before it is told to come again."""

    def __init__(
        self,
        host: str,
        port: int,
        routes: Mapping[str, Route],
        *,
        token: str,
        max_bytes: int,
        max_requests: int,
    ) -> None:
        """`routes` are what "GET /path" or "POST /path" calls, with the object that was sent; it may raise `Refusal`.

        With a `token`, a request without it is refused. Raises OSError for an address that cannot be bound.
        """
        self.routes, self.token, self.max_bytes = dict(routes), token, max_bytes
        self.max_requests, self.room = max_requests, threading.BoundedSemaphore(max_requests)
        host = host.strip("[]")
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        """Where it answers, with the port that was found where 0 was asked for."""
        host, port = self.server_address[:2]
        return f"http://[{host!s}]:{port}" if self.address_family == socket.AF_INET6 else f"http://{host!s}:{port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news; all else is printed."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: JsonServer
    protocol_version = "HTTP/1.1"
    server_version = f"alignkit/{__version__}"
    sys_version = ""
    timeout = 60  # seconds that a client may let pass without sending anything

    def do_GET(self) -> None:
        if self._admitted():
            self._answer()

    def do_POST(self) -> None:
        if not self._admitted():  # before it takes up any room
            return
        if not self.server.room.acquire(timeout=self.server.patience):
            self._send(503, {"error": f"{self.server.max_requests} requests are under way; come again"})
            return
        try:
            self._answer()
        finally:
            self.server.room.release()

    def _answer(self) -> None:
        status, body = 200, {}
        try:
            route = self.server.routes.get(f"{self.command} {self.path}")
            if route is None:
                raise Refusal(404, f"there is no {self.command} {self.path[:80]} here")
            body = route(self._body() if self.command == "POST" else {})
        except Refusal as refusal:
            status, body = refusal.status, {"error": str(refusal)}
        except TransientError as error:
            status, body = 503, {"error": " ".join(str(error).split())}
        except AlignkitError as error:
            if isinstance(error, PluginError):
                traceback.print_exception(error)
            status, body = 422, {"error": " ".join(str(error).split())}
        except OSError:
            self.close_connection = True  # the client is gone, or sends nothing
            return
        except Exception as error:
            traceback.print_exception(error)
            status, body = 500, {"error": f"{type(error).__name__} in the server"}
        self._send(status, body)

    def _admitted(self) -> bool:
        """Whether the token is right, if there is one; else says so.

        Without one it must be this machine that is addressed: a page in a browser may have its own name resolved to it.
        """
        host = _host(self.headers.get("Host", ""))
        if host and not self.server.token and not is_loopback(host):  # a browser always names its host
            told = f"found Host: {host[:80]}, expected localhost; a server with a token ({TOKEN}) takes any"
            self._send(403, {"error": told})
            return False
        expected = f"Bearer {self.server.token}".encode()
        if self.server.token and not hmac.compare_digest(self.headers.get("Authorization", "").encode(), expected):
            self._send(401, {"error": "the token is missing or wrong"})
            return False
        return True

    def _body(self) -> dict[str, Any]:
        # A page in a browser cannot send this type to a server on its machine without asking that first.
        if self.headers.get_content_type() != "application/json":
            raise Refusal(415, "expected Content-Type: application/json")
        length = self.headers.get("Content-Length", "")
        if not _NUMBER.fullmatch(length) or "Transfer-Encoding" in self.headers:
            raise Refusal(411, "expected a Content-Length")
        if int(length) > self.server.max_bytes:
            raise Refusal(413, f"{length} bytes, expected {self.server.max_bytes} or fewer")
        data = self.rfile.read(int(length))
        del self.headers["Content-Length"]  # nothing is left to discard
        try:
            body = json.loads(data)
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            raise Refusal(400, "expected a JSON object")
        if body.get("protocol") != PROTOCOL:
            found = str(body.get("protocol"))[:20]
            raise Refusal(409, f"this server speaks protocol {PROTOCOL}, not {found}")
        return body

    def _send(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps({"protocol": PROTOCOL, **body}, allow_nan=False).encode()
        try:
            self._discard()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if status == 503:
                self.send_header("Retry-After", "1")
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            self.close_connection = True  # the client is gone

    def _discard(self) -> None:
        """Read what of a refused request is still to come: a connection closed before that takes the answer along."""
        length = self.headers.get("Content-Length", "0")
        left = min(int(length), self.server.max_bytes) if _NUMBER.fullmatch(length) else 0
        if str(left) != length or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # what follows is no request
        while left > 0 and (piece := self.rfile.read(min(left, 1 << 16))):
            left -= len(piece)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line a request would hide the errors."""
