"""The backends that sockets are connected to, from /proc/net/udp of a pod."""

from __future__ import annotations

import socket
from pathlib import Path

#: The number of sockets that are open at the same time.
_BATCH = 500


def remote_ends() -> dict[int, str]:
    """The peer addresses of this namespace's IPv4 UDP sockets, by local port."""
    found = {}
    for line in Path("/proc/thread-self/net/udp").read_text().splitlines()[1:]:
        local, remote = line.split()[1:3]
        address = socket.inet_ntoa(bytes.fromhex(remote[:8])[::-1])
        found[int(local[9:], 16)] = address
    return found


def open_sockets(host: str, port: int, count: int) -> list[socket.socket]:
    """Connected UDP sockets; connect() selects a backend."""
    made = []
    for _ in range(count):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.connect((host, port))
        made.append(sock)
    return made


def where(sockets: list[socket.socket]) -> list[str]:
    ends = remote_ends()
    return [ends[sock.getsockname()[1]] for sock in sockets]


def choices(host: str, port: int, count: int) -> list[str]:
    """The backends that ``count`` calls of connect() select, in order."""
    found: list[str] = []
    while len(found) < count:
        sockets = open_sockets(host, port, min(_BATCH, count - len(found)))
        found += where(sockets)
        for sock in sockets:
            sock.close()
    return found


def held(host: str, port: int, count: int, drop: str, more: int) -> tuple[list[str], list[str]]:
    """Opens ``count`` sockets, closes those to the backend ``drop``, opens ``more``; returns both selections."""
    first = open_sockets(host, port, count)
    before = where(first)
    for sock, backend in zip(first, before, strict=True):
        if backend == drop:
            sock.close()
    second = open_sockets(host, port, more)
    after = where(second)
    for sock in first + second:
        sock.close()
    return before, after
