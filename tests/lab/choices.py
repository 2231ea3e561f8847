"""Which backends sockets were sent to, told by the kernel's own table of a pod's sockets."""

from __future__ import annotations

import socket
from pathlib import Path

#: Sockets that are open at once.
_BATCH = 500


def remote_ends() -> dict[int, str]:
    """Of this namespace's IPv4 UDP sockets: local port and the address that they are connected to."""
    found = {}
    for line in Path("/proc/thread-self/net/udp").read_text().splitlines()[1:]:
        local, remote = line.split()[1:3]
        address = socket.inet_ntoa(bytes.fromhex(remote[:8])[::-1])
        found[int(local[9:], 16)] = address
    return found


def open_sockets(host: str, port: int, count: int) -> list[socket.socket]:
    """Connected UDP sockets: a connect() is all that it takes to be given a backend."""
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
    """The backends of so many connects, in their order."""
    found: list[str] = []
    while len(found) < count:
        sockets = open_sockets(host, port, min(_BATCH, count - len(found)))
        found += where(sockets)
        for sock in sockets:
            sock.close()
    return found


def held(host: str, port: int, count: int, drop: str, more: int) -> tuple[list[str], list[str]]:
    """Opens ``count``, closes those to the backend ``drop``, opens ``more``: the choices of both times."""
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
