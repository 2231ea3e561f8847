"""``python -m tests.e2e.many HOST PORT COUNT``: opens connections and keeps them open.

It prints how many are open, waits for a line, sends a request on each, and prints how many were answered.
"""

from __future__ import annotations

import selectors
import socket
import sys
import time

_AT_ONCE = 500


def hold(host: str, port: int, count: int) -> list[socket.socket]:
    """Opens connections; returns those on which the server has sent its first line."""
    selector = selectors.EpollSelector()
    alive: list[socket.socket] = []
    for start in range(0, count, _AT_ONCE):
        waiting = min(_AT_ONCE, count - start)
        for _ in range(waiting):
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            sock.setblocking(False)
            sock.connect_ex((host, port))
            selector.register(sock, selectors.EVENT_READ, sock)
        deadline = time.monotonic() + 60
        while waiting and time.monotonic() < deadline:
            for key, _ in selector.select(1):
                try:
                    if key.data.recv(4096):
                        alive.append(key.data)
                except OSError as error:
                    print(f"{key.data.getsockname()}: {error}", file=sys.stderr)
                selector.unregister(key.data)
                waiting -= 1
    return alive


def ask(alive: list[socket.socket]) -> int:
    for sock in alive:
        sock.sendall(b"?")
    answered = 0
    for sock in alive:
        sock.settimeout(30)
        answered += sock.recv(10) == b"?"
    return answered


def main(host: str, port: int, count: int) -> None:
    alive = hold(host, port, count)
    print(len(alive), flush=True)
    sys.stdin.readline()
    print(ask(alive), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
