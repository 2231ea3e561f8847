"""BPF filters at a device's ingress and egress (tc-bpf(8); linux/rtnetlink.h, linux/pkt_cls.h)."""

from __future__ import annotations

import errno
import socket
import struct
from contextlib import suppress
from typing import NamedTuple

from ebpfproxy.netlink import codec, rtnetlink
from ebpfproxy.netlink.rtnetlink import Rtnetlink

INGRESS, EGRESS = 0xFFFFFFF2, 0xFFFFFFF3

_TCMSG = struct.Struct("=BxxxiIII")  # family, ifindex, handle, parent, info
_CLSACT_HANDLE, _CLSACT_PARENT = 0xFFFF0000, 0xFFFFFFF1
_KIND, _OPTIONS = 1, 2
_CLASS, _FD, _NAME, _FLAGS = 3, 6, 7, 8
_DIRECT_ACTION = 1
_ETH_P_ALL = 3
_NUMBER = struct.Struct("=I")
_REPLACE, _EXCLUSIVE, _CREATE = 0x100, 0x200, 0x400


class Place(NamedTuple):
    """A device's :data:`INGRESS` or :data:`EGRESS`, and a priority there: low numbers run first.

    Filters of one priority have different handles; the one that was added last runs first.
    """

    ifindex: int
    parent: int
    priority: int
    handle: int = 1


class Filter(NamedTuple):
    """``name`` is empty for one that is not BPF's."""

    priority: int
    name: str
    handle: int = 1


def filters(netlink: Rtnetlink, ifindex: int, parent: int) -> list[Filter]:
    """The filters at :data:`INGRESS` or :data:`EGRESS` in the order in which they run. Raises OSError.

    There are none if there is no such device.
    """
    request = _TCMSG.pack(0, ifindex, 0, parent, 0)
    try:
        messages = list(netlink.dump(rtnetlink.GETTFILTER, request))
    except OSError as error:
        # No clsact there, or no device any more.
        if error.errno in (errno.EINVAL, errno.ENOENT, errno.ENODEV):
            return []
        raise
    return [found for message in messages if (found := _filter(message)) is not None]


@codec.reading
def _filter(message: memoryview) -> Filter | None:
    _, _, handle, _, info = _TCMSG.unpack_from(message)
    # The kernel lists a priority itself as well, by the handle 0.
    if not handle:
        return None
    found = codec.attributes(message[_TCMSG.size :])
    name = b""
    if bytes(found.get(_KIND, b"")) == b"bpf\0":
        name = bytes(codec.attributes(found.get(_OPTIONS, memoryview(b""))).get(_NAME, b"")).rstrip(b"\0")
    return Filter(info >> 16, name.decode(errors="replace"), handle)


def put_filter(netlink: Rtnetlink, place: Place, program: int, name: str) -> None:
    """Adds the filter there, or replaces it in one step.

    ``program`` is a descriptor, whose result is the packet's verdict. Raises OSError, with EINVAL where the
    priority belongs to filters of another kind.
    """
    with suppress(FileExistsError):
        netlink.change(rtnetlink.NEWQDISC, _clsact(place.ifindex), _CREATE | _EXCLUSIVE)
    options = codec.nested(
        _OPTIONS,
        codec.attribute(_CLASS, _NUMBER.pack(1)),
        codec.attribute(_FD, _NUMBER.pack(program)),
        codec.attribute(_NAME, name.encode() + b"\0"),
        codec.attribute(_FLAGS, _NUMBER.pack(_DIRECT_ACTION)),
    )
    netlink.change(rtnetlink.NEWTFILTER, _at(place) + options, _CREATE | _REPLACE)


def delete_filter(netlink: Rtnetlink, place: Place) -> None:
    """Raises OSError."""
    netlink.change(rtnetlink.DELTFILTER, _at(place))


def delete_clsact(netlink: Rtnetlink, ifindex: int) -> None:
    """Deletes it with all its filters. Raises OSError."""
    netlink.change(rtnetlink.DELQDISC, _clsact(ifindex))


def _clsact(ifindex: int) -> bytes:
    return _TCMSG.pack(0, ifindex, _CLSACT_HANDLE, _CLSACT_PARENT, 0) + _kind("clsact")


def _at(place: Place) -> bytes:
    info = place.priority << 16 | socket.htons(_ETH_P_ALL)
    return _TCMSG.pack(0, place.ifindex, place.handle, place.parent, info) + _kind("bpf")


def _kind(name: str) -> bytes:
    return codec.attribute(_KIND, name.encode() + b"\0")
