"""The load: connections, requests on kept ones, datagrams and long connections, and what of it is lost.

Each way has a thread; all of a place's ways are in one process. Servers are those of ``tests.lab.servers``.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec

from tests.lab.processes import Child, read_line
from tests.lab.spaces import Space

#: A reply that takes longer is lost. A lost SYN is sent again after 1, 3 and 7 s.
SECONDS = 10.0
#: Between two of a thread, so that what is tested has a processor, too.
_PAUSE = 0.004
_LONG = 8
KINDS = ("connect", "request", "udp", "long")


class Way(msgspec.Struct, frozen=True):
    """A Service's address, and the names of the servers that may answer there."""

    host: str
    port: int
    names: tuple[str, ...]
    udp: int = 0


class Result(msgspec.Struct):
    """What became of one kind of load on one way: ``lost`` has the time (Unix seconds) and the reason."""

    kind: str
    host: str
    count: int = 0
    lost: list[tuple[float, str]] = msgspec.field(default_factory=list)
    slowest: float = 0.0


class WrongBackendError(OSError):
    """A server has answered that is no endpoint of the Service."""


class _Thread(threading.Thread):
    def __init__(self, kind: str, way: Way, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.result = Result(kind, way.host)
        self._way = way
        self._stop_event = stop
        self._kept: list[socket.socket] = []
        self._once: Callable[[], None] = getattr(self, f"_{kind}")
        self.ready = threading.Event()

    def run(self) -> None:
        if self.result.kind in ("request", "long"):
            count = 1 if self.result.kind == "request" else _LONG
            while len(self._kept) < count and not self._stop_event.is_set():
                self._try(lambda: self._kept.append(self._open()))
        self.ready.set()
        while not self._stop_event.wait(_PAUSE):
            self._try(self._once)
        for each in self._kept:
            each.close()

    def _try(self, what: Callable[[], None]) -> None:
        began, when = time.monotonic(), time.time()
        try:
            what()
        except OSError as error:
            self.result.lost.append((when, repr(error)))
            time.sleep(0.02)
        self.result.count += 1
        self.result.slowest = max(self.result.slowest, time.monotonic() - began)

    def _open(self) -> socket.socket:
        sock = socket.create_connection((self._way.host, self._way.port), SECONDS)
        try:
            self._check(_received(sock))
        except BaseException:
            sock.close()
            raise
        return sock

    def _check(self, reply: bytes) -> None:
        if not reply:
            raise ConnectionResetError("closed without a reply")
        name = json.loads(reply)["name"]
        if name not in self._way.names:
            raise WrongBackendError(f"{name} answers for {', '.join(self._way.names)}")

    def _connect(self) -> None:
        self._open().close()

    def _request(self) -> None:
        """On a connection that is closed after 50 requests, so that it is a new one's next."""
        self._ask(0)
        if self.result.count % 50 == 0:
            before, self._kept[0] = self._kept[0], self._open()
            before.close()

    def _long(self) -> None:
        self._ask(self.result.count % len(self._kept))

    def _ask(self, number: int) -> None:
        sock = self._kept[number]
        try:
            self._echo(sock)
        except OSError:
            # It is lost once.
            sock.close()
            self._kept[number] = self._open()
            raise

    def _echo(self, sock: socket.socket) -> None:
        sock.sendall(b"still there?")
        if not sock.recv(100):
            raise ConnectionResetError("closed")

    def _udp(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(SECONDS)
            there = self._way.host, self._way.udp
            is_connected = self.result.count % 2
            if is_connected:
                sock.connect(there)
                sock.send(b"?")
            else:
                sock.sendto(b"?", there)
            try:
                data, source = sock.recvfrom(4096)
            except TimeoutError as error:
                raise TimeoutError(f"no answer to port {sock.getsockname()[1]}") from error
            if source != there:
                kind = "connected" if is_connected else "unconnected"
                raise OSError(f"a datagram of a socket ({kind}) to {there} is answered by {source}")
            self._check(data)


def _received(sock: socket.socket) -> bytes:
    """What the server sends first. A connection that has timed out without it was opened, and has a port."""
    try:
        return sock.recv(4096)
    except TimeoutError as error:
        raise TimeoutError(f"connected from port {sock.getsockname()[1]}, and nothing came") from error


def main(ways: Sequence[Way], kinds: Sequence[str]) -> None:
    """Until standard input ends."""
    stop = threading.Event()
    threads = [_Thread(kind, way, stop) for way in ways for kind in kinds if way.udp or kind != "udp"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.ready.wait(60)
    print("ready", flush=True)
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join()
    print(msgspec.json.encode([each.result for each in threads]).decode(), flush=True)


class Load:
    """The load of one place, from :meth:`wait` to :meth:`stop`."""

    def __init__(self, space: Space, ways: Sequence[Way], kinds: Sequence[str] = KINDS) -> None:
        self.place = space.netns.rpartition("-")[2]
        self._process: Child = space.fork(main, ways, kinds)

    def wait(self) -> None:
        assert read_line(self._process) == "ready"

    def stop(self) -> list[Result]:
        self._process.stdin.close()
        found = msgspec.json.decode(self._process.stdout.read(), type=list[Result])
        with suppress(OSError):
            self._process.wait()
        return found
