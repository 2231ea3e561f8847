"""Requests to nfnetlink (linux/netfilter/nfnetlink.h)."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from types import TracebackType

from ebpfproxy.netlink import codec

ACCOUNTS, CONNTRACK = 7, 1

_NETLINK_NETFILTER = 12
_FAMILY = struct.Struct("=BBH")  # struct nfgenmsg: family, version, resource
_TIMEOUT_SECONDS = 10.0


class Netfilter:
    """A socket to this network namespace's netfilter. Use it as a context."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        self._socket.settimeout(_TIMEOUT_SECONDS)
        self._socket.bind((0, 0))

    def __enter__(self) -> Netfilter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def request(self, system: int, command: int, *inside: bytes, family: int = 0, flags: int = 0) -> None:
        """Sends a change and waits for its acknowledgement. Raises OSError with the kernel's number."""
        for _ in self._exchange(system, command, inside, family, codec.REQUEST | codec.ACK | flags):
            pass

    def dump(self, system: int, command: int, *inside: bytes, family: int = 0) -> Iterator[memoryview]:
        """The attributes of each entry, valid until the next one. Raises OSError."""
        return self._exchange(system, command, inside, family, codec.REQUEST | codec.DUMP)

    def _exchange(
        self, system: int, command: int, inside: tuple[bytes, ...], family: int, flags: int
    ) -> Iterator[memoryview]:
        body = _FAMILY.pack(family, 0, 0) + b"".join(inside)
        self._socket.send(codec.pack(system << 8 | command, flags, body, 1))
        for each in codec.replies(self._socket):
            yield each.payload[_FAMILY.size :]
