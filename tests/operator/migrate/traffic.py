"""Clients with long connections, and client processes that send requests until they are told to stop."""

from __future__ import annotations

import json
import select
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

from tests.lab import clients
from tests.lab.processes import read_line
from tests.lab.spaces import Space
from tests.lab.waiting import READY_SECONDS

#: Ten such clients send a request every 2 ms and leave most of the processor to the tested code.
_PAUSE = 0.02
#: A response may take this long in an emulator or on a busy machine.
_TIMEOUT = READY_SECONDS / 20


class LongConnection:
    """A connected socket of a client, and the name of the server that it is connected to."""

    def __init__(self, space: Space, kind: str, host: str, port: int) -> None:
        self.name = _name(space, kind, host, port)
        self.space, self.kind, self.host = space, kind, host
        self.socket, response = space.open(_connect, kind, host, port)
        self.socket.settimeout(_TIMEOUT)
        self.server: str = json.loads(response)["name"]

    def check(self) -> str:
        """Sends a request and returns ``alive`` or the error, with what tells a lost packet from a broken connection."""
        if not (error := self._error()):
            return "alive"
        again = self._error() or "answered"
        return f"{error}; the request after it: {again}; {self.space.call(clients.udp_counters)}"

    def _error(self) -> str:
        try:
            _request(self.socket)
        except OSError as error:
            return repr(error)
        return ""


class RequestLoad:
    """A client process that sends requests until the context ends; ``count`` and ``errors`` are set then."""

    def __init__(self, space: Space, kind: str, host: str, port: int, *, pause: float = _PAUSE) -> None:
        self.name = _name(space, kind, host, port)
        self.space = space
        self.process = space.fork(main, kind, host, port, pause)
        self.count = 0
        self.errors: list[str] = []
        assert read_line(self.process)

    def __enter__(self) -> RequestLoad:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.stdin.close()
        result: dict[str, Any] = json.loads(read_line(self.process))
        self.count, self.errors = result["count"], result["errors"]


@contextmanager
def no_request_fails(*loads: RequestLoad, least: int = 40) -> Iterator[None]:
    """Runs the loads within the context; each has to send more than ``least`` requests.

    What fails within it is raised with the errors of the loads.
    """
    try:
        with ExitStack() as stack:
            for load in loads:
                stack.enter_context(load)
            yield
    except Exception as error:
        error.add_note(f"errors of the loads: {_errors(loads)}")
        raise
    failed = _errors(loads)
    assert not failed, failed
    assert all(load.count > least for load in loads), [load.count for load in loads]


def _errors(loads: tuple[RequestLoad, ...]) -> dict[str, list[str]]:
    return {load.name: load.errors for load in loads if load.errors}


def _name(space: Space, kind: str, host: str, port: int) -> str:
    return f"{kind} from {space.netns.partition('-')[2]} to {host}:{port}"


def _connect(kind: str, host: str, port: int) -> tuple[socket.socket, str]:
    sock = socket.socket(
        socket.AF_INET6 if ":" in host else socket.AF_INET,
        socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM,
    )
    sock.settimeout(_TIMEOUT)
    sock.connect((host, port))
    if kind == "udp":
        sock.send(b"?")
    return sock, sock.recv(4096).decode().strip()


def _request(sock: socket.socket) -> None:
    sock.send(b"echo")
    if (response := sock.recv(4096)) != b"echo":
        raise OSError(f"unexpected response {response!r}")


def main(kind: str, host: str, port: int, pause: float) -> None:
    """Sends a request on a new socket and one on a long connection every ``pause`` seconds until its input ends.

    Then it prints the number of requests and the errors.
    """
    long, response = _connect(kind, host, port)
    print(response, flush=True)
    count, errors = 0, []
    while not select.select([sys.stdin], [], [], pause)[0]:
        for connection in ("new", "long"):
            try:
                if connection == "long":
                    _request(long)
                else:
                    _connect(kind, host, port)[0].close()
            except OSError as error:
                errors.append(f"{time.time():.3f} {connection} connection: {error!r}")
            count += 1
    print(json.dumps({"count": count, "errors": errors[:20]}))
