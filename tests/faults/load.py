"""The load: connections, requests on kept ones, datagrams and long connections, and what of it is lost.

Each kind on each way has a thread, which takes the way's addresses in turn: half of the load is IPv6. All of a place's
ways are in one process. Servers are those of ``tests.lab.servers``.
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
PAUSE = 0.004
#: A thread keeps so many open, half of them of each family.
_LONG = 8
#: A connection is closed after so many requests, so that it is a new one's next.
_REQUESTS = 50
KINDS = ("connect", "request", "udp", "long")


class Way(msgspec.Struct, frozen=True):
    """A Service's addresses, one of each family, and the names of the servers that may answer there."""

    hosts: tuple[str, ...]
    port: int
    names: tuple[str, ...]
    udp: int = 0


class Result(msgspec.Struct):
    """What became of one kind of load to one address: ``lost`` has the time (Unix seconds) and the reason."""

    kind: str
    host: str
    count: int = 0
    lost: list[tuple[float, str]] = msgspec.field(default_factory=list)
    slowest: float = 0.0


class WrongBackendError(OSError):
    """A server has answered that is no endpoint of the Service."""


class _Thread(threading.Thread):
    def __init__(self, kind: str, way: Way, stop: threading.Event, pause: float) -> None:
        super().__init__(daemon=True)
        self.results = [Result(kind, host) for host in way.hosts]
        self._way = way
        self._stop_event = stop
        self._pause = pause
        #: These are the open connections to each address.
        self._kept: list[list[socket.socket]] = [[] for _ in way.hosts]
        self._kind = kind
        self._once: Callable[[int], None] = getattr(self, f"_{kind}")
        self.ready = threading.Event()

    def run(self) -> None:
        if self._kind in ("request", "long"):
            count = 1 if self._kind == "request" else _LONG // len(self._kept)
            for at, kept in enumerate(self._kept):
                while len(kept) < count and not self._stop_event.is_set():
                    self._try(lambda at: self._kept[at].append(self._open(at)), at)
        self.ready.set()
        at = 0
        while not self._stop_event.wait(self._pause):
            self._try(self._once, at)
            at = (at + 1) % len(self._kept)
        for kept in self._kept:
            for each in kept:
                each.close()

    def _try(self, what: Callable[[int], None], at: int) -> None:
        began, when, result = time.monotonic(), time.time(), self.results[at]
        try:
            what(at)
        except OSError as error:
            result.lost.append((when, repr(error)))
            time.sleep(0.02)
        result.count += 1
        result.slowest = max(result.slowest, time.monotonic() - began)

    def _open(self, at: int) -> socket.socket:
        sock = socket.create_connection((self._way.hosts[at], self._way.port), SECONDS)
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

    def _connect(self, at: int) -> None:
        self._open(at).close()

    def _request(self, at: int) -> None:
        self._ask(at, 0)
        if self.results[at].count % _REQUESTS == 0:
            before, self._kept[at][0] = self._kept[at][0], self._open(at)
            before.close()

    def _long(self, at: int) -> None:
        self._ask(at, self.results[at].count % len(self._kept[at]))

    def _ask(self, at: int, number: int) -> None:
        sock = self._kept[at][number]
        try:
            self._echo(sock)
        except OSError:
            # It is lost once.
            sock.close()
            self._kept[at][number] = self._open(at)
            raise

    def _echo(self, sock: socket.socket) -> None:
        sock.sendall(b"still there?")
        if not sock.recv(100):
            raise ConnectionResetError("closed")

    def _udp(self, at: int) -> None:
        there = self._way.hosts[at], self._way.udp
        family = socket.AF_INET6 if ":" in there[0] else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.settimeout(SECONDS)
            is_connected = self.results[at].count % 2
            if is_connected:
                sock.connect(there)
                sock.send(b"?")
            else:
                sock.sendto(b"?", there)
            try:
                data, source = sock.recvfrom(4096)
            except TimeoutError as error:
                raise TimeoutError(f"no answer to port {sock.getsockname()[1]}") from error
            if source[:2] != there:
                kind = "connected" if is_connected else "unconnected"
                raise OSError(f"a datagram of a socket ({kind}) to {there} is answered by {source}")
            self._check(data)


def _received(sock: socket.socket) -> bytes:
    """What the server sends first. A connection that has timed out without it was opened, and has a port."""
    try:
        return sock.recv(4096)
    except TimeoutError as error:
        raise TimeoutError(f"connected from port {sock.getsockname()[1]}, and nothing came") from error


def main(ways: Sequence[Way], kinds: Sequence[str], pause: float) -> None:
    """Until standard input ends."""
    stop = threading.Event()
    threads = [_Thread(kind, way, stop, pause) for way in ways for kind in kinds if way.udp or kind != "udp"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.ready.wait(60)
    print("ready", flush=True)
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join()
    found = [result for each in threads for result in each.results]
    print(msgspec.json.encode(found).decode(), flush=True)


class Load:
    """The load of one place, from :meth:`wait` to :meth:`stop`."""

    def __init__(
        self, space: Space, ways: Sequence[Way], kinds: Sequence[str] = KINDS, pause: float = PAUSE
    ) -> None:
        self.place = space.netns.rpartition("-")[2]
        self._process: Child = space.fork(main, ways, kinds, pause)

    def wait(self) -> None:
        assert read_line(self._process) == "ready"

    def stop(self) -> list[Result]:
        self._process.stdin.close()
        found = msgspec.json.decode(self._process.stdout.read(), type=list[Result])
        with suppress(OSError):
            self._process.wait()
        return found
