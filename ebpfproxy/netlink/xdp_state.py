"""What devices and their drivers say of XDP (linux/netdev.h, linux/if_link.h, linux/genetlink.h)."""

from __future__ import annotations

import enum
import errno
import socket
import struct
from types import TracebackType

from ebpfproxy.netlink import codec
from ebpfproxy.netlink.rtnetlink import GETLINK, IFINFOMSG, Rtnetlink

_GENERIC_NETLINK, _CONTROL = 16, 16  # NETLINK_GENERIC, GENL_ID_CTRL
_GENLMSG = struct.Struct("=BBxx")  # command, version
_GET_FAMILY, _FAMILY_ID, _FAMILY_NAME = 3, 1, 2
_FAMILY = b"netdev\0"
_DEV_GET, _IFINDEX, _XDP_FEATURES = 1, 1, 3
_IFLA_XDP, _XDP_PROG_ID = 43, 4
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


@codec.reading
def xdp_program(netlink: Rtnetlink, ifindex: int) -> int:
    """The id of the XDP program that the device has, 0 without one. Raises OSError."""
    (message,) = netlink.ask(GETLINK, IFINFOMSG.pack(0, 0, ifindex, 0, 0))
    found = codec.attributes(message[IFINFOMSG.size :])
    inside = codec.attributes(found.get(_IFLA_XDP, memoryview(b"")))
    return int(_NUMBER.unpack(inside[_XDP_PROG_ID])[0]) if _XDP_PROG_ID in inside else 0
