"""Clients that stay: ``python -m tests.operator.migrate.asking held|load tcp|udp HOST PORT [PAUSE]``.

``held`` connects one socket, prints who answered, and asks it again for every line of its input. ``load`` asks
by a new socket, and by one that it has held from the start, every PAUSE seconds until its input ends; then it
prints how often, and what failed.
"""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

from tests.lab.lab import READY_SECONDS
from tests.lab.spaces import Space

_PAUSE = 0.004
#: An answer may take so long in an emulator or on a busy machine.
_SECONDS = READY_SECONDS / 20


class _Client:
    def __init__(self, what: str, space: Space, kind: str, host: str, port: int, *more: str) -> None:
        command = [sys.executable, "-m", "tests.operator.migrate.asking", what, kind, host, str(port), *more]
        self.name = f"{kind} from {space.netns.partition('-')[2]} to {host}:{port}"
        self.process = space.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.space, self.kind, self.host, self.port = space, kind, host, port
        self.server: str = json.loads(self.line())["name"]

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode()


class Held(_Client):
    """One connected socket."""

    def __init__(self, space: Space, kind: str, host: str, port: int) -> None:
        super().__init__("held", space, kind, host, port)

    def ask(self) -> str:
        """``alive``, or what went wrong."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        return self.line().strip()


class Load(_Client):
    """A context that asks all the time; ``count`` and ``errors`` hold afterwards."""

    def __init__(self, space: Space, kind: str, host: str, port: int, *, pause: float = _PAUSE) -> None:
        super().__init__("load", space, kind, host, port, str(pause))
        self.count = 0
        self.errors: list[str] = []

    def __enter__(self) -> Load:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        found: dict[str, Any] = json.loads(self.line())
        self.count, self.errors = found["count"], found["errors"]


@contextmanager
def no_request_fails(*loads: Load, least: int = 100) -> Iterator[None]:
    with ExitStack() as stack:
        for load in loads:
            stack.enter_context(load)
        yield
    failed = {load.name: load.errors for load in loads if load.errors}
    assert not failed, failed
    assert all(load.count > least for load in loads), [load.count for load in loads]


def _connect(kind: str, host: str, port: int) -> tuple[socket.socket, str]:
    sock = socket.socket(
        socket.AF_INET6 if ":" in host else socket.AF_INET,
        socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM,
    )
    sock.settimeout(_SECONDS)
    sock.connect((host, port))
    if kind == "udp":
        sock.send(b"?")
    return sock, sock.recv(4096).decode().strip()


def _again(sock: socket.socket) -> None:
    sock.send(b"echo")
    if (answer := sock.recv(4096)) != b"echo":
        raise OSError(f"answered {answer!r}")


def _held(kind: str, host: str, port: int) -> None:
    sock, first = _connect(kind, host, port)
    print(first, flush=True)
    for _ in sys.stdin:
        try:
            _again(sock)
            print("alive", flush=True)
        except OSError as error:
            print(repr(error), flush=True)


def _load(kind: str, host: str, port: int, pause: float) -> None:
    held, first = _connect(kind, host, port)
    print(first, flush=True)
    count, errors = 0, []
    while not select.select([sys.stdin], [], [], pause)[0]:
        for what in ("new", "held"):
            try:
                if what == "held":
                    _again(held)
                else:
                    _connect(kind, host, port)[0].close()
            except OSError as error:
                errors.append(f"{time.time():.3f} {what}: {error!r}")
            count += 1
    print(json.dumps({"count": count, "errors": errors[:20]}))


if __name__ == "__main__":
    what, kind, host, port, *more = sys.argv[1:]
    if what == "held":
        _held(kind, host, int(port))
    else:
        _load(kind, host, int(port), float(more[0]))
