"""A client that keeps connected sockets open and reports which of them were closed with an error.

Each specification has a name, a kind, a host, a port and the number of sockets; kinds are udp, tcp, udp-again (connected twice), udp-asking (sends), tcp-opening (does not wait for the SYN-ACK).
It prints a JSON line when all are connected: the number of sockets by name and backend. After a number on its
input it watches for SECONDS, or for up to a minute until that many are closed. Then it prints a second line: the
number of closed sockets by name, backend and error, and the time of the last.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import socket
import sys
import time
from collections import Counter
from typing import Any

from tests.lab.choices import remote_ends
from tests.lab.processes import read_line
from tests.lab.spaces import Space

#: The time to wait for expected errors, which are late on a busy machine.
MOST_SECONDS = 60.0


class Holder:
    """The side of the test: it starts the client in a space and reads its lines."""

    def __init__(
        self, space: Space, specs: list[tuple[str, str, str, int, int]], seconds: float = 2.0
    ) -> None:
        self._process = space.fork(main, seconds, specs)
        #: The number of sockets by name and backend for IPv4 UDP sockets, by name for others.
        self.connected: Counter[str] = Counter()

    def wait(self) -> Counter[str]:
        self.connected = Counter(self._line())
        return self.connected

    def watch(self, expected: int = 0) -> None:
        """Watches for the holder's seconds, or for up to a minute until ``expected`` sockets are closed."""
        self._process.stdin.write(f"{expected}\n".encode())
        self._process.stdin.flush()

    def result(self) -> tuple[Counter[str], float]:
        """The number of closed sockets by name, and the Unix time of the last."""
        found = self._line()
        return Counter(found["ended"]), found["last"]

    def close(self) -> None:
        """Kills the client, which closes its sockets."""
        self._process.kill()
        self._process.wait()

    def _line(self) -> Any:
        return json.loads(read_line(self._process))


def main(seconds: float, specs: list[tuple[str, str, str, int, int]]) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    sockets: dict[int, tuple[str, socket.socket]] = {}
    for name, kind, host, port, count in specs:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        for _ in range(count):
            sock = socket.socket(family, socket.SOCK_DGRAM if kind.startswith("udp") else socket.SOCK_STREAM)
            if kind == "tcp-opening":
                sock.setblocking(False)
                sock.connect_ex((host, port))
            else:
                sock.connect((host, port))
            if kind == "udp-again":
                sock.connect((host, port))
            elif kind == "udp-asking":
                sock.send(b"?")
            sockets[sock.fileno()] = (name, sock)
    ends = remote_ends()
    meant = {}
    for fd, (name, sock) in sockets.items():
        is_plain = sock.family == socket.AF_INET and sock.type == socket.SOCK_DGRAM
        meant[fd] = f"{name} {ends[sock.getsockname()[1]]}" if is_plain else name
    print(json.dumps(Counter(meant.values())), flush=True)
    expected = int(sys.stdin.readline() or 0)

    poll = select.epoll()
    for fd in sockets:
        poll.register(fd, select.EPOLLERR)
    ended: Counter[str] = Counter()
    last = 0.0
    began = time.time()
    while (passed := time.time() - began) < (MOST_SECONDS if ended.total() < expected else seconds):
        for fd, _ in poll.poll(max(seconds - passed, 0.1)):
            error = sockets[fd][1].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            ended[meant[fd] if error == errno.ECONNABORTED else f"{meant[fd]}: {os.strerror(error)}"] += 1
            last = time.time()
            poll.unregister(fd)
    print(json.dumps({"ended": ended, "last": last}), flush=True)
    # All file descriptors stay open until a line or the end of input.
    sys.stdin.readline()
