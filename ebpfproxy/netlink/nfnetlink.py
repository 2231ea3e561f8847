"""Requests to nfnetlink (linux/netfilter/nfnetlink.h), packed here: dumps may have a million entries."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from types import TracebackType

ACCOUNTS, CONNTRACK = 7, 1

_NETLINK_NETFILTER = 12
_ERROR, _DONE = 2, 3
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_FAMILY = struct.Struct("=BBH")  # family, version, resource
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_NESTED, _TYPE_MASK = 1 << 15, 0x3FFF
_RECEIVE = 1 << 18
_TIMEOUT_SECONDS = 10.0


def attribute(kind: int, value: bytes) -> bytes:
    packed = _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value
    return packed + b"\0" * (-len(packed) % 4)


def nested(kind: int, *inside: bytes) -> bytes:
    return attribute(kind | _NESTED, b"".join(inside))


def attributes(data: memoryview) -> dict[int, memoryview]:
    """Values by type, flags off."""
    found = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            break
        found[kind & _TYPE_MASK] = data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    return found


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

    def request(self, system: int, command: int, *inside: bytes, family: int = 0) -> None:
        """A change, acknowledged. Raises OSError with the kernel's number."""
        for _ in self._exchange(system, command, inside, family, _REQUEST | _ACK):
            pass

    def dump(self, system: int, command: int, *inside: bytes, family: int = 0) -> Iterator[memoryview]:
        """The attributes of each entry, valid until the next one. Raises OSError."""
        return self._exchange(system, command, inside, family, _REQUEST | _DUMP)

    def _exchange(
        self, system: int, command: int, inside: tuple[bytes, ...], family: int, flags: int
    ) -> Iterator[memoryview]:
        body = _FAMILY.pack(family, 0, 0) + b"".join(inside)
        header = _HEADER.pack(_HEADER.size + len(body), system << 8 | command, flags, 1, 0)
        self._socket.send(header + body)
        while True:
            data = memoryview(self._socket.recv(_RECEIVE))
            at = 0
            while at + _HEADER.size <= len(data):
                length, kind, _, _, _ = _HEADER.unpack_from(data, at)
                payload = data[at + _HEADER.size : at + length]
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    number = -struct.unpack_from("=i", payload)[0]
                    if number:
                        raise OSError(number, os.strerror(number))
                    return
                yield payload[_FAMILY.size :]
                at += (length + 3) & ~3
