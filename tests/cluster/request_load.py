"""Clients that continuously send requests to Services while the cluster changes, and report failures with their time.

``python -m tests.cluster.request_load WAYS``, on a node, in a pod or outside, where WAYS is JSON: ``[["tcp", HOST, PORT], …]``.
Each way has a thread, which asks agnhost's netexec for its name by a new socket and by one that it holds: a TCP
connection that is kept alive, a UDP socket that is not connected. ``ready`` is printed once all ways got replies; when
the input ends, the counts are printed as JSON.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

#: Between two requests of a way; the machine is shared by clients, servers and what is tested.
_PAUSE = 0.05
#: The time for a reply. A lost SYN is sent again after 1 s and would go unnoticed, so that UDP, which sends nothing again, is asked as well.
_SECONDS = 5.0
#: The time until a new Service replies.
_START_SECONDS = 60.0

#: The least number of requests of each way, for short changes.
_LEAST = 40
_REQUEST = b"GET /hostname HTTP/1.1\r\nHost: service\r\n\r\n"

Way = tuple[str, str, int]


class Failure(NamedTuple):
    """``held``: the request was sent by the held socket, to which ``server`` had replied before."""

    time: float
    client: str
    way: str
    held: bool
    server: str
    error: str

    def __str__(self) -> str:
        what = f"held to {self.server}" if self.held else "new"
        return f"{time.strftime('%H:%M:%S', time.gmtime(self.time))}.{int(self.time % 1 * 1000):03} {self.client}: {self.way}, {what}: {self.error}"


# -- in the client's process


def _open(kind: str, host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
    sock.settimeout(_SECONDS)
    return sock


def _http(sock: socket.socket) -> str:
    """Returns the server that replies; raises OSError."""
    sock.sendall(_REQUEST)
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(4096)
        if not more:
            raise ConnectionResetError(f"closed after {data!r}")
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    (length,) = (
        int(each.split(b":")[1]) for each in head.split(b"\r\n") if each.lower().startswith(b"content-length")
    )
    while len(body) < length:
        more = sock.recv(4096)
        if not more:
            raise ConnectionResetError(f"closed within {body!r}")
        body += more
    return body.decode()


class _Asking(threading.Thread):
    def __init__(self, way: Way, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.way, self.stop = way, stop
        self.answered = threading.Event()
        self.count = 0
        self.failures: list[tuple[float, bool, str, str]] = []
        self.servers: set[str] = set()
        self._held: socket.socket | None = None
        self._server = ""

    def run(self) -> None:
        while not self.answered.is_set() and not self.stop.is_set():
            with suppress(OSError):
                self._ask_new()
                self._ask_held()
                self.answered.set()
            time.sleep(0.2)
        while not self.stop.wait(_PAUSE) or (self.count < _LEAST and not self.failures):
            for held, ask in ((False, self._ask_new), (True, self._ask_held)):
                began = time.time()
                try:
                    ask()
                except OSError as error:
                    self.failures.append((began, held, self._server if held else "", repr(error)))
                    if held:
                        self._drop()
                self.count += 1
        self._drop()

    def _ask_new(self) -> None:
        kind, host, port = self.way
        with _open(*self.way) as sock:
            sock.connect((host, port))
            if kind == "tcp":
                self.servers.add(_http(sock))
            else:
                sock.send(b"hostname")
                self.servers.add(sock.recv(4096).decode())

    def _ask_held(self) -> None:
        kind, host, port = self.way
        if self._held is None:
            self._held = _open(*self.way)
            if kind == "tcp":
                self._held.connect((host, port))
        if kind == "tcp":
            self._server = _http(self._held)
            return
        self._held.sendto(b"hostname", (host, port))
        data, source = self._held.recvfrom(4096)
        if source[:2] != (host, port):
            raise OSError(f"answered by {source[0]}:{source[1]}")
        self._server = data.decode()

    def _drop(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None


def main(ways: list[Way]) -> None:
    stop = threading.Event()
    threads = [_Asking((kind, host, port), stop) for kind, host, port in ways]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + _START_SECONDS
    silent = [
        f"{each.way[0]} {each.way[1]} {each.way[2]}"
        for each in threads
        if not each.answered.wait(max(0.0, deadline - time.monotonic()))
    ]
    print(f"no answer: {', '.join(silent)}" if silent else "ready", flush=True)
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join()
    found = [
        {
            "way": f"{each.way[0]} {each.way[1]} {each.way[2]}",
            "count": each.count,
            "failures": each.failures,
            "servers": sorted(each.servers),
        }
        for each in threads
    ]
    print(json.dumps(found), flush=True)


# -- in the test's process


class Client:
    """Sends requests from where ``popen`` starts processes, until :meth:`end`."""

    def __init__(
        self,
        name: str,
        popen: Callable[..., subprocess.Popen[Any]],
        checkout: str,
        python: str,
        ways: Sequence[Way],
    ) -> None:
        """``checkout`` and ``python``: paths of this checkout and its interpreter as the process sees them."""
        self.name = name
        module = ["-m", "tests.cluster.request_load", json.dumps(ways)]
        self.process = popen(
            ["env", "-C", checkout, python, *module], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.count = 0
        self.counts: dict[str, int] = {}
        self.failures: list[Failure] = []
        self.servers: set[str] = set()

    def wait(self) -> None:
        """Waits until every way got a reply; raises RuntimeError."""
        if (message := self._line()) != "ready":
            raise RuntimeError(f"{self.name}: {message or 'its process ended'}")

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        found: list[dict[str, Any]] = json.loads(self._line() or "[]")
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        for each in found:
            self.counts[each["way"]] = each["count"]
            self.servers |= {*each["servers"]}
            self.failures += (
                Failure(when, self.name, each["way"], held, server, error)
                for when, held, server, error in each["failures"]
            )

    def _line(self) -> str:
        assert self.process.stdout is not None
        return str(self.process.stdout.readline().decode().strip())


@contextmanager
def asking(*clients: Client, ended: Callable[[Failure], bool] = lambda _: False) -> Iterator[None]:
    """Asserts that no request of the clients fails meanwhile, except those that ``ended`` allows.

    Raises AssertionError with all that failed.
    """
    try:
        for each in clients:
            each.wait()
        yield
    finally:
        for each in clients:
            each.end()
    failed = sorted(failure for each in clients for failure in each.failures if not ended(failure))
    assert not failed, (
        f"{len(failed)} of {sum(sum(each.counts.values()) for each in clients)} failed:\n"
        + "\n".join(map(str, failed[:40]))
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
