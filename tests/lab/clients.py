"""Clients for ``pod.call``: each opens a socket and sends one request."""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

R = TypeVar("R")

UDPLITE = 136
#: With this many connections to two backends, one of them gets none once in 5 * 10^8 runs.
ENOUGH = 30


def has_udp_lite() -> bool:
    """True if the kernel has sockets of UDP-Lite; Linux 7.2 has none."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM, UDPLITE).close()
    except OSError as error:
        if error.errno != errno.EPROTONOSUPPORT:
            raise
        return False
    return True


def _family(host: str) -> int:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def udp_counters() -> dict[str, int]:
    """Returns the counters of UDP in this network namespace that are not 0, those of IPv6 as ``Udp6...``.

    A reply with an unexpected source counts as one of ``NoPorts``, one that is damaged as one of ``InCsumErrors``.
    """
    lines = Path("/proc/net/snmp").read_text().splitlines()
    names, values = (line.split()[1:] for line in lines if line.startswith("Udp:"))
    pairs = [
        *zip(names, values, strict=True),
        *map(str.split, Path("/proc/net/snmp6").read_text().splitlines()),
    ]
    return {
        name: int(value) for name, value in pairs if value != "0" and not name.startswith(("Ip6", "Icmp6"))
    }


def ask_tcp(host: str, port: int, timeout: float = 3.0) -> dict[str, Any]:
    """Returns the name of the backend, the client's address that it sees, and getpeername()."""
    with socket.socket(_family(host), socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        sock.connect((host, port))
        peer = sock.getpeername()
        reply: dict[str, Any] = json.loads(sock.recv(4096))
        return {**reply, "getpeername": peer[:2]}


def ask_udp(
    host: str, port: int, *, connected: bool = False, protocol: int = 0, timeout: float = 3.0
) -> dict[str, Any]:
    """Returns the name of the backend, and the source of the reply."""
    with socket.socket(_family(host), socket.SOCK_DGRAM, protocol) as sock:
        sock.settimeout(timeout)
        if connected:
            sock.connect((host, port))
            sock.send(b"?")
        else:
            sock.sendto(b"?", (host, port))
        data, source = sock.recvfrom(4096)
        found: dict[str, Any] = {**json.loads(data), "from": source[:2]}
        if connected:
            found["getpeername"] = sock.getpeername()[:2]
        return found


def ask_udp_connected(host: str, port: int) -> dict[str, Any]:
    return ask_udp(host, port, connected=True)


def get(port: int, path: str) -> tuple[int, str]:
    """Sends GET to an HTTP server of this namespace; returns status and body."""
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        response = b""
        while chunk := connection.recv(65536):
            response += chunk
    if not response:
        raise ConnectionResetError(f"the connection to port {port} was closed without a response")
    head, _, body = response.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


def is_echoed(host: str, port: int, size: int) -> bool:
    """Sends random data while it receives; returns True if a server echoes all of it unchanged within 20 s."""
    data = os.urandom(size)
    with socket.create_connection((host, port), 5) as sock:
        while not sock.recv(4096).endswith(b"\n"):
            pass
        received = bytearray()
        sent = 0
        sock.setblocking(False)
        deadline = time.monotonic() + 20
        while len(received) < size and time.monotonic() < deadline:
            readable, writable, _ = select.select([sock], [sock] if sent < size else [], [], 1)
            if writable:
                sent += sock.send(data[sent : sent + 65536])
            if readable:
                received += sock.recv(65536)
        return bytes(received) == data


def hold(host: str, port: int) -> None:
    """Opens a connection and keeps it. For each line of its input it sends a byte, and prints what became of it."""
    with socket.create_connection((host, port), 3) as sock:
        sock.recv(4096)
        print("ready", flush=True)
        sock.settimeout(2)
        for _ in sys.stdin:
            try:
                sock.sendall(b"x")
                print("alive" if sock.recv(10) else "closed", flush=True)
            except OSError as error:
                print(type(error).__name__, flush=True)


def repeated(count: int, ask: Callable[..., R], *arguments: Any) -> list[R]:
    """Calls a client ``count`` times: one forked child is enough for all."""
    return [ask(*arguments) for _ in range(count)]


def spread_tcp(host: str, port: int, count: int) -> Counter[str]:
    """The number of connections by backend, of ``count``."""
    return Counter(ask_tcp(host, port)["name"] for _ in range(count))


def spread_udp(host: str, port: int, count: int) -> Counter[str]:
    """The number of sockets by backend, of ``count`` that send one datagram each."""
    found: Counter[str] = Counter()
    for _ in range(count):
        reply = ask_udp(host, port)
        assert reply["from"] == (host, port), f"reply from {reply['from']}"
        found[reply["name"]] += 1
    return found


def connect_error(host: str, port: int, timeout: float = 3.0) -> str:
    """The name of the error of connect()."""
    try:
        ask_tcp(host, port, timeout)
    except OSError as error:
        return type(error).__name__ if error.errno is None else _name(error)
    return "connected"


def send_error(host: str, port: int) -> str:
    """The name of the error of sendto() on an unconnected socket."""
    with socket.socket(_family(host), socket.SOCK_DGRAM) as sock:
        try:
            sock.sendto(b"?", (host, port))
        except OSError as error:
            return _name(error)
    return "sent"


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error))
