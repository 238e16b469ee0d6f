"""A server of JSON and pages over HTTP that limits the size of requests, their number, and who may send them."""

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
from alignkit.files import parse_json
from alignkit.serving.connections import Connections

PROTOCOL = 1
"""Protocol version, sent in every request and response. Requests with another version are refused."""
TOKEN = "ALIGNKIT_TOKEN"
"""Name of the environment variable with the token; if it is set, clients must send it."""

MOST_CONNECTIONS = 512
"""Connections at a time, each with a thread. The limit of files that a process may open is 1024 on most machines."""
SECONDS = 60.0
"""Time for a client to send a request, and again to read the answer; a server cuts off those that take longer."""

_NUMBER = re.compile(r"[0-9]{1,15}")

Route = Callable[[dict[str, Any]], dict[str, Any] | str]
"""A function of the request's JSON object that returns the JSON object of the response, or the text of an HTML page."""


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _host(address: str) -> str:
    """Return the name or address in a Host header such as "[::1]:8188"; empty if there is none."""
    try:
        return (urlsplit(f"//{address}").hostname or "").removesuffix(".")
    except ValueError:
        return address


class Refusal(Exception):
    """A refused request, with its HTTP status and a one-line reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class JsonServer(ThreadingHTTPServer):
    """A server whose requests are JSON objects and whose responses are those or HTML pages; one thread a connection."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128  # connections not yet accepted; many processes may connect at once
    patience = 60.0
    """Seconds that a complete request waits for a free slot before it gets status 503."""

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
        """Bind the address. `routes` maps "GET /path" or "POST /path" to a function, which may raise `Refusal`.

        If there is a `token`, requests without it are refused. Raises OSError if the address cannot be bound.
        """
        self.routes, self.token, self.max_bytes = dict(routes), token, max_bytes
        self.max_requests, self.slots = max_requests, threading.BoundedSemaphore(max_requests)
        self.connections = Connections(MOST_CONNECTIONS, max_requests * max_bytes, SECONDS)
        host = host.strip("[]")
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        """The URL of this server, with the actual port if port 0 was requested."""
        host, port = self.server_address[:2]
        return f"http://[{host!s}]:{port}" if self.address_family == socket.AF_INET6 else f"http://{host!s}:{port}"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the thread of a connection, where there is room for it."""
        if self.connections.add(request):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        self.connections.remove(request)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Cut off late clients; `serve_forever` calls it twice a second."""
        super().service_actions()
        self.connections.cut_late()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print errors, except those of clients that disconnect."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: JsonServer
    protocol_version = "HTTP/1.1"
    server_version = f"alignkit/{__version__}"
    sys_version = ""
    timeout = SECONDS  # also where no `serve_forever` runs

    def handle_one_request(self) -> None:
        self.server.connections.begin(self.connection)
        super().handle_one_request()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _respond(self) -> dict[str, Any] | str:
        """Return the response of the route. A request takes a slot once it is complete, so slow clients hold none."""
        route = self.server.routes.get(f"{self.command} {self.path}")
        if route is None:
            raise Refusal(404, f"there is no {self.command} {self.path[:80]} here")
        data = self._read_body() if self.command == "POST" else bytearray()
        self.server.connections.work(self.connection)
        if self.command == "GET":
            return route({})
        if not self.server.slots.acquire(timeout=self.server.patience):
            raise Refusal(503, f"{self.server.max_requests} requests are in progress; try again")
        try:
            return route(_parsed(data))
        finally:
            self.server.slots.release()

    def _answer(self) -> None:
        if not self._admitted():
            return
        status = 200
        body: dict[str, Any] | str
        try:
            body = self._respond()
        except Refusal as refusal:
            status, body = refusal.status, {"error": str(refusal)}
        except TransientError as error:
            status, body = 503, {"error": " ".join(str(error).split())}
        except AlignkitError as error:
            if isinstance(error, PluginError):
                traceback.print_exception(error)
            status, body = 422, {"error": " ".join(str(error).split())}
        except OSError:
            self.close_connection = True  # the client disconnected or timed out
            return
        except Exception as error:
            traceback.print_exception(error)
            status, body = 500, {"error": f"{type(error).__name__} in the server"}
        self._send(status, body)

    def _admitted(self) -> bool:
        """Check the token, Host and Origin; send the refusal and return False if one of them is wrong.

        Without a token, the Host header must name this machine, because a web page can make its own domain name resolve
        to it (DNS rebinding), and a request that a web page sends must come from a page of this server.
        """
        host = _host(self.headers.get("Host", ""))
        if host and not self.server.token and not is_loopback(host):  # browsers always send Host
            reason = f"found Host: {host[:80]}, expected localhost; a server with a token ({TOKEN}) accepts any host"
            self._send(403, {"error": reason})
            return False
        origin = self.headers.get("Origin")
        if origin is not None and not self.server.token and origin != f"http://{self.headers.get('Host', '')}":
            self._send(403, {"error": f"found Origin: {origin[:80]}, expected a page of this server"})
            return False
        expected = f"Bearer {self.server.token}".encode()
        if self.server.token and not hmac.compare_digest(self.headers.get("Authorization", "").encode(), expected):
            self._send(401, {"error": "the token is missing or wrong"})
            return False
        return True

    def _read_body(self) -> bytearray:
        # A web page cannot send this type to another origin without a preflight request, which this server refuses.
        if self.headers.get_content_type() != "application/json":
            raise Refusal(415, "expected Content-Type: application/json")
        length = self.headers.get("Content-Length", "")
        if not _NUMBER.fullmatch(length) or "Transfer-Encoding" in self.headers:
            raise Refusal(411, "expected a Content-Length header")
        if int(length) > self.server.max_bytes:
            raise Refusal(413, f"found {length} bytes, expected {self.server.max_bytes} or fewer")
        data = bytearray()
        while len(data) < int(length):
            piece = self.rfile.read1(min(int(length) - len(data), 1 << 16))
            if not piece:
                raise ConnectionError("the client disconnected")
            if not self.server.connections.receive(self.connection, len(piece)):
                self.close_connection = True
                raise Refusal(503, "other requests take all memory for requests; try again")
            data += piece
        del self.headers["Content-Length"]  # nothing is left for _discard to read
        return data

    def _send(self, status: int, body: dict[str, Any] | str) -> None:
        if isinstance(body, str):
            data, kind = body.encode(), "text/html; charset=utf-8"
        else:
            data, kind = json.dumps({"protocol": PROTOCOL, **body}, allow_nan=False).encode(), "application/json"
        self.server.connections.answer(self.connection)
        try:
            self._discard()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("X-Frame-Options", "DENY")  # another page could place ours under the user's clicks
            if status == 503:
                self.send_header("Retry-After", "1")
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            self.close_connection = True  # the client disconnected

    def _discard(self) -> None:
        """Read the rest of a refused request: closing the connection earlier could lose the response."""
        length = self.headers.get("Content-Length", "0")
        left = min(int(length), self.server.max_bytes) if _NUMBER.fullmatch(length) else 0
        if str(left) != length or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # the rest of the stream is not a request
        while left > 0 and (piece := self.rfile.read(min(left, 1 << 16))):
            left -= len(piece)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing, because one line per request would hide the errors."""


def _parsed(data: bytearray) -> dict[str, Any]:
    """Return the JSON object of a request. Raises Refusal for anything else."""
    try:
        body = parse_json(data)
    except ValueError as error:
        raise Refusal(400, f"expected a JSON object: {error}") from None
    if not isinstance(body, dict):
        raise Refusal(400, "expected a JSON object")
    if body.get("protocol") != PROTOCOL:
        found = str(body.get("protocol"))[:20]
        raise Refusal(409, f"found protocol {found}, expected {PROTOCOL}; use the same version of alignkit")
    return body
