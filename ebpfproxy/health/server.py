"""Small HTTP servers: paths to functions, on an address that may be taken, in threads of their own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar, NamedTuple

import msgspec

from ebpfproxy.config.bind_address import BindAddressError, parse_bind_address
from ebpfproxy.logs import get_logger

log = get_logger(__name__)

_RETRY_SECONDS = 5.0
_CLIENT_SECONDS = 10.0


class Answer(NamedTuple):
    status: int
    content_type: str
    body: bytes


Page = Callable[[], Answer]


def text_answer(text: str) -> Answer:
    return Answer(200, "text/plain; charset=utf-8", text.encode())


def json_answer(value: object, status: int = 200) -> Answer:
    return Answer(status, "application/json", msgspec.json.encode(value))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    pages: Mapping[str, Page]

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = _CLIENT_SECONDS
    server: _Server
    _unknown: ClassVar[Answer] = Answer(404, "text/plain; charset=utf-8", b"404 page not found\n")

    def do_GET(self) -> None:
        page = self.server.pages.get(self.path.partition("?")[0])
        answer = page() if page else self._unknown
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_HEAD = do_GET  # noqa: N815 - the base class's name

    def version_string(self) -> str:
        return "ebpfproxy"

    def log_message(self, format: str, *args: object) -> None:
        log.debug("http request", client=self.client_address[0], request=format % args)


class HttpServer:
    """Serves ``pages`` (path to function) at ``address``. An address in use is retried, and logged once."""

    def __init__(
        self, name: str, address: str, pages: Mapping[str, Page], *, hard_fail: bool = False
    ) -> None:
        """Raises BindAddressError. An empty address serves nothing. ``hard_fail``: see :meth:`start`."""
        self._hard_fail = hard_fail
        self._name = name
        self._text = address
        self._address = parse_bind_address(address) if address else None
        self._pages = pages
        self._server: _Server | None = None
        self._why = ""
        self._stop = threading.Event()

    @property
    def name(self) -> str:
        return self._name

    @property
    def failure(self) -> str:
        """Why the address could not be bound at the start; empty where it could, or there is none."""
        return f"{self._text}: {self._why}" if self._why else ""

    @property
    def port(self) -> int | None:
        """The bound port, None while nothing is bound."""
        return self._server.server_address[1] if self._server is not None else None

    def start(self) -> None:
        """Raises BindAddressError where the address cannot be bound, and that is not to be tried again."""
        if self._address is None:
            return
        bound = self._bind()
        if not bound and self._hard_fail:
            raise BindAddressError(f"{self._name}: {self._text}: {self._why}")
        if not bound:
            log.error("cannot serve, trying again", server=self._name, address=self._text, error=self._why)
        threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def _bind(self) -> bool:
        assert self._address is not None
        host = self._address[0]
        kind = _Server6 if ":" in host else _Server
        try:
            server = kind(self._address, _Handler)
        except OSError as error:
            if host == "::" and "[" not in self._text and self._bind_v4_only():
                return True
            self._why = str(error)
            return False
        server.pages = self._pages
        self._server = server
        return True

    def _bind_v4_only(self) -> bool:
        """``:port`` on a kernel without IPv6."""
        assert self._address is not None
        try:
            server = _Server(("0.0.0.0", self._address[1]), _Handler)
        except OSError:
            return False
        server.pages = self._pages
        self._server = server
        return True

    def _run(self) -> None:
        while self._server is None:
            if self._stop.wait(_RETRY_SECONDS):
                return
            if self._bind():
                log.info("serving now", server=self._name, address=self._text)
        self._server.serve_forever(poll_interval=0.1)

    def stop(self) -> None:
        self._stop.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
