"""Clients that stay: ``python -m tests.migrate.asking held|load tcp|udp HOST PORT``.

``held`` connects one socket, prints who answered, and asks it again for every line of its input. ``load`` asks
by a new socket, and by one that it has held from the start, every few milliseconds until its input ends; then
it prints how often, and what failed.
"""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
import time
from types import TracebackType
from typing import Any

from tests.lab.spaces import Space

_PAUSE = 0.004


class _Client:
    def __init__(self, what: str, space: Space, kind: str, host: str, port: int) -> None:
        command = [sys.executable, "-m", "tests.migrate.asking", what, kind, host, str(port)]
        self.name = f"{kind} from {space.netns.partition('-')[2]} to {host}:{port}"
        self.process = space.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
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
    """As a context: ``count`` and ``errors`` afterwards."""

    def __init__(self, space: Space, kind: str, host: str, port: int) -> None:
        super().__init__("load", space, kind, host, port)
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


def _connect(kind: str, host: str, port: int) -> tuple[socket.socket, str]:
    sock = socket.socket(
        socket.AF_INET6 if ":" in host else socket.AF_INET,
        socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM,
    )
    sock.settimeout(2)
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


def _load(kind: str, host: str, port: int) -> None:
    held, first = _connect(kind, host, port)
    print(first, flush=True)
    count, errors = 0, []
    while not select.select([sys.stdin], [], [], _PAUSE)[0]:
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
    {"held": _held, "load": _load}[sys.argv[1]](sys.argv[2], sys.argv[3], int(sys.argv[4]))
