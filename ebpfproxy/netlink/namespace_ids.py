"""Ids by which this process's network namespace knows others ("nsid", ip-netns(8)).

An id ends with its namespace and does not keep it: it distinguishes a namespace that is gone from one that
only a descriptor or a socket holds, and that has no path any more.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from pathlib import Path

from ebpfproxy.netlink import codec

_NETLINK_ROUTE = 0
# linux/net_namespace.h, linux/rtnetlink.h
_NEWNSID, _GETNSID = 88, 90
_NSID, _FD = 1, 3
_NUMBER = struct.Struct("=i")
_FAMILY = bytes(4)  # struct rtgenmsg
_TIMEOUT_SECONDS = 5.0
#: What the kernel says for a namespace that has none (NETNSA_NSID_NOT_ASSIGNED).
_NONE = -1


class NamespaceIds:
    """Asks the kernel for ids of network namespaces. Close it."""

    def __init__(self) -> None:
        self._route = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_ROUTE)
        self._route.settimeout(_TIMEOUT_SECONDS)

    def __enter__(self) -> NamespaceIds:
        return self

    def __exit__(self, *_: object) -> None:
        self._route.close()

    def id_of(self, namespace: Path) -> int | None:
        """The namespace's id, which it gets if it had none; None if it cannot get one.

        Raises OSError: the namespace is gone, or nothing may be asked about it (CAP_NET_ADMIN).
        """
        fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = id_in(self._route, fd)
            if found is None:
                with suppress(FileExistsError):
                    inside = _attribute(_FD, fd) + _attribute(_NSID, -1)
                    _send(self._route, _NEWNSID, codec.REQUEST | codec.ACK, inside)
                    for _ in codec.replies(self._route):
                        pass
                found = id_in(self._route, fd)
        finally:
            os.close(fd)
        return found

    def all(self) -> set[int]:
        """All ids that are in use."""
        _send(self._route, _GETNSID, codec.REQUEST | codec.DUMP, b"")
        return {found for each in codec.replies(self._route) if (found := _id(each)) is not None}


def id_in(route: socket.socket, namespace: int) -> int | None:
    """The id that the network namespace of a socket has for another one (a descriptor), if any.

    The kernel gives one to the namespace of a device's other end (IFLA_LINK_NETNSID): a pod's has one for
    its node's. Raises OSError.
    """
    _send(route, _GETNSID, codec.REQUEST, _attribute(_FD, namespace))
    return _id(next(codec.replies(route)))


def _send(route: socket.socket, kind: int, flags: int, attributes: bytes) -> None:
    route.send(codec.pack(kind, flags, _FAMILY + attributes))


def _attribute(kind: int, number: int) -> bytes:
    return codec.attribute(kind, _NUMBER.pack(number))


@codec.reading
def _id(reply: codec.Message) -> int | None:
    value = codec.attributes(reply.payload[len(_FAMILY) :]).get(_NSID)
    number = _NUMBER.unpack(value)[0] if value is not None else _NONE
    return None if number == _NONE else number
