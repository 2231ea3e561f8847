"""What devices and their drivers say of XDP (linux/netdev.h, linux/if_link.h, linux/genetlink.h)."""

from __future__ import annotations

import enum
import errno
import socket
import struct
from types import TracebackType
from typing import NamedTuple

from ebpfproxy.netlink import codec
from ebpfproxy.netlink.rtnetlink import GETLINK, IFINFOMSG, SETLINK, Rtnetlink

_GENERIC_NETLINK, _CONTROL = 16, 16  # NETLINK_GENERIC, GENL_ID_CTRL
_GENLMSG = struct.Struct("=BBxx")  # command, version
_GET_FAMILY, _FAMILY_ID, _FAMILY_NAME = 3, 1, 2
_FAMILY = b"netdev\0"
_DEV_GET, _IFINDEX, _XDP_FEATURES = 1, 1, 3
_IFLA_XDP = 43
_XDP_FD, _XDP_ATTACHED, _XDP_FLAGS, _XDP_PROG_ID, _XDP_EXPECTED_FD = 1, 2, 3, 4, 8
_UPDATE_IF_NOEXIST, _REPLACE = 1 << 0, 1 << 4
_NO_PROGRAM = -1
_ATTACHED_GENERIC = 2  # XDP_ATTACHED_SKB
_SIGNED = struct.Struct("=i")
_NUMBER, _SHORT, _LONG = struct.Struct("=I"), struct.Struct("=H"), struct.Struct("=Q")
_TIMEOUT_SECONDS = 10.0


class XdpFeatures(enum.IntFlag):
    """enum netdev_xdp_act."""

    BASIC = 1 << 0
    REDIRECT = 1 << 1
    #: It takes frames that a program redirects to it.
    NDO_XMIT = 1 << 2


class XdpState:
    """Asks for the state of one device at a time. Use it as a context. Raises OSError."""

    @codec.reading
    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _GENERIC_NETLINK
        )
        self._socket.settimeout(_TIMEOUT_SECONDS)
        name = codec.attribute(_FAMILY_NAME, _FAMILY)
        try:
            found = self._ask(_CONTROL, _GET_FAMILY, name)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            found = {}
        self._family = _SHORT.unpack(found[_FAMILY_ID])[0] if _FAMILY_ID in found else 0

    def __enter__(self) -> XdpState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    @codec.reading
    def features(self, ifindex: int) -> XdpFeatures | None:
        """What the driver can do now; None where the kernel does not tell (before Linux 6.3)."""
        if not self._family:
            return None
        found = self._ask(self._family, _DEV_GET, codec.attribute(_IFINDEX, _NUMBER.pack(ifindex)))
        return XdpFeatures(_LONG.unpack(found[_XDP_FEATURES])[0] & sum(XdpFeatures))

    def _ask(self, kind: int, command: int, attributes: bytes) -> dict[int, memoryview]:
        body = _GENLMSG.pack(command, 1) + attributes
        self._socket.send(codec.pack(kind, codec.REQUEST | codec.ACK, body))
        (reply,) = codec.replies(self._socket)
        return codec.attributes(reply.payload[_GENLMSG.size :])


class XdpProgram(NamedTuple):
    """The XDP program of a device by its id, 0 without one. ``is_generic``: it runs behind the driver."""

    number: int
    is_generic: bool


@codec.reading
def xdp_program(netlink: Rtnetlink, ifindex: int) -> XdpProgram:
    """The XDP program that the device has. Raises OSError."""
    (message,) = netlink.ask(GETLINK, IFINFOMSG.pack(0, 0, ifindex, 0, 0))
    found = codec.attributes(message[IFINFOMSG.size :])
    inside = codec.attributes(found.get(_IFLA_XDP, memoryview(b"")))
    number = int(_NUMBER.unpack(inside[_XDP_PROG_ID])[0]) if _XDP_PROG_ID in inside else 0
    return XdpProgram(number, bytes(inside.get(_XDP_ATTACHED, b"")) == bytes([_ATTACHED_GENERIC]))


def xdp_refusal(ifindex: int, program: int, mode: int) -> str:
    """Why the device does not take a program, in the words of its driver: a link is refused without any.

    ``mode``: the kernel's flag. Empty where the device does take it; then it has it no more.
    """
    with Rtnetlink(explains=True) as netlink:
        try:
            _set_xdp(netlink, ifindex, program, mode | _UPDATE_IF_NOEXIST)
        except OSError as error:
            return error.strerror or str(error)
        _set_xdp(netlink, ifindex, _NO_PROGRAM, mode | _REPLACE, expected=program)
        return ""


def _set_xdp(netlink: Rtnetlink, ifindex: int, program: int, flags: int, expected: int | None = None) -> None:
    inside = [
        codec.attribute(_XDP_FD, _SIGNED.pack(program)),
        codec.attribute(_XDP_FLAGS, _NUMBER.pack(flags)),
    ]
    if expected is not None:
        inside.append(codec.attribute(_XDP_EXPECTED_FD, _SIGNED.pack(expected)))
    netlink.change(SETLINK, IFINFOMSG.pack(0, 0, ifindex, 0, 0) + codec.nested(_IFLA_XDP, *inside))
