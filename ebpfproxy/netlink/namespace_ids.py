"""Ids by which this process's network namespace knows others ("nsid", ip-netns(8)).

An id ends with its namespace and does not keep it: it tells a namespace that is no more from one that only a
descriptor or a socket holds, and that has no path any more.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_NETLINK_ROUTE = 0
# linux/net_namespace.h, linux/rtnetlink.h
_NEWNSID, _GETNSID = 88, 90
_NSID, _FD = 1, 3
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HHi")  # one of 32 bits
_FAMILY = bytes(4)  # struct rtgenmsg
_RECEIVE = 1 << 16
_TIMEOUT_SECONDS = 5.0
#: What the kernel says for a namespace that has none (NETNSA_NSID_NOT_ASSIGNED).
_NONE = -1


class NamespaceIds:
    """Close it."""

    def __init__(self) -> None:
        self._route = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_ROUTE)
        self._route.settimeout(_TIMEOUT_SECONDS)

    def __enter__(self) -> NamespaceIds:
        return self

    def __exit__(self, *_: object) -> None:
        self._route.close()

    def id_of(self, namespace: Path) -> int | None:
        """Its id, given to it if it had none; None where it could not be.

        Raises OSError: the namespace is gone, or nothing may be asked about it (CAP_NET_ADMIN).
        """
        fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = self._ask(fd)
            if found is None:
                with suppress(FileExistsError):
                    attributes = _ATTRIBUTE.pack(8, _FD, fd) + _ATTRIBUTE.pack(8, _NSID, -1)
                    self._send(_NEWNSID, _REQUEST | _ACK, attributes)
                    for _ in self._answers():
                        pass
                found = self._ask(fd)
        finally:
            os.close(fd)
        return found

    def _ask(self, fd: int) -> int | None:
        self._send(_GETNSID, _REQUEST, _ATTRIBUTE.pack(8, _FD, fd))
        return next(self._answers(), None)

    def all(self) -> set[int]:
        """Those that there are."""
        self._send(_GETNSID, _REQUEST | _DUMP, b"")
        return set(self._answers(whole=True))

    def _send(self, kind: int, flags: int, attributes: bytes) -> None:
        size = _HEADER.size + len(_FAMILY) + len(attributes)
        self._route.send(_HEADER.pack(size, kind, flags, 0, 0) + _FAMILY + attributes)

    def _answers(self, *, whole: bool = False) -> Iterator[int]:
        """The ids of one answer, which is an acknowledgement without any, or of a ``whole`` dump."""
        while True:
            data = self._route.recv(_RECEIVE)
            at = 0
            while at < len(data):
                length, kind, _, _, _ = _HEADER.unpack_from(data, at)
                start = at + _HEADER.size
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    (code,) = struct.unpack_from("=i", data, start)
                    if code:
                        raise OSError(-code, "namespace's id")
                    return
                _, attribute, number = _ATTRIBUTE.unpack_from(data, start + len(_FAMILY))
                if attribute == _NSID and number != _NONE:
                    yield number
                at += length + 3 & ~3
            if not whole:
                return
