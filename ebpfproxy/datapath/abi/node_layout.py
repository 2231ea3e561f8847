"""The bytes of what packet programs know of this node, and of what they count.

The conventions are those of ``layout``.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

from ebpfproxy.datapath.abi.layout import lpm, pack_address, unlpm, unpack_address
from ebpfproxy.services.model import Prefix


class DeviceFlags(enum.IntFlag):
    """Of ``devices``. HANDOVER_MODE, NO_NEW_FLOWS and MIGRATING_FLOWS are the node's: device 0 has them."""

    #: What comes in by it is a pod's, as detectLocalMode says.
    PODS = 1 << 0
    #: It is neither an uplink nor a tunnel.
    LOCAL = 1 << 1
    #: TCP connections that began elsewhere are netfilter's.
    HANDOVER_MODE = 1 << 2
    #: Programs create no flow.
    NO_NEW_FLOWS = 1 << 3
    #: The program at a device below this one has seen what comes in here, and will see what leaves here.
    INGRESS_BELOW = 1 << 4
    EGRESS_BELOW = 1 << 5
    #: The program at a device above this one has seen some of what leaves here.
    EGRESS_ABOVE = 1 << 6
    #: Flows of other maps are still being copied to these.
    MIGRATING_FLOWS = 1 << 7
    #: To other nodes' pods.
    TUNNEL = 1 << 8
    #: The whole node routes by sources, too; each device has this.
    RULES = 1 << 9


class XdpFlags(enum.IntFlag):
    """Of ``xdp_devices``."""

    FORWARDS = 1 << 0
    SENDS_BACK = 1 << 1
    TAKES = 1 << 2


class CidrFlags(enum.IntFlag):
    PODS = 1 << 0
    SERVICES = 1 << 1
    #: In a Service CIDR, but this node's own, or of a Service that another proxy serves.
    TAKEN = 1 << 2


#: Index of the ``unallocated`` map, by path and IP version; ``enum unallocated`` in C.
UNALLOCATED = {("packet", 4): 0, ("socket", 4): 1, ("packet", 6): 2, ("socket", 6): 3}


class PacketEvent(enum.IntEnum):
    """Why a packet was neither passed nor translated as usual; ``enum event`` in C."""

    NO_ENDPOINT = 0
    NO_SUCH_PORT = 1
    BACKEND_GONE = 2
    NO_LOCAL_ENDPOINT = 3
    SOURCE_RANGE = 4
    NO_SUCH_SERVICE = 5
    FRAGMENT = 6
    PORTS_TAKEN = 7
    TABLE_FULL = 8
    UNROUTABLE = 9
    HOPS = 10
    REWRITE = 11
    MARTIAN = 12
    MALFORMED = 13
    FLOWS_MADE = 14
    FLOWS_ENDED = 15
    SOCKETS_FULL = 16
    NO_FLOW = 17
    #: Translated, and forwarded by the program at XDP.
    XDP = 18
    ICMP_RATE_LIMIT = 19
    EARLY_DROPS = 20
    DSR = 21

    def __str__(self) -> str:
        return self.name.lower().replace("_", "-")


#: The packet is rejected, passed or dropped for these reasons.
REJECTED = frozenset(
    {PacketEvent.NO_ENDPOINT, PacketEvent.NO_SUCH_PORT, PacketEvent.BACKEND_GONE, PacketEvent.NO_FLOW}
)
PASSED = frozenset({PacketEvent.MARTIAN, PacketEvent.MALFORMED, PacketEvent.SOCKETS_FULL})
FORWARDED = frozenset({PacketEvent.XDP})
_FLOWS = frozenset({PacketEvent.FLOWS_MADE, PacketEvent.FLOWS_ENDED, PacketEvent.EARLY_DROPS})
DROPPED = frozenset(PacketEvent) - REJECTED - PASSED - FORWARDED - _FLOWS
#: What happened to packets, and the reasons.
ACTIONS = {"rejected": REJECTED, "dropped": DROPPED, "passed": PASSED, "forwarded": FORWARDED}
DEVICE = struct.Struct("=16s16sII")
XDP_DEVICE = struct.Struct("=6sH")
CIDR = struct.Struct("=I16s")


def pack_device(address4: bytes, address6: bytes, flags: int, mtu: int) -> bytes:
    """Packs a device with the addresses that masquerading uses, which may be empty. ``mtu`` in bytes."""
    return DEVICE.pack(pack_address(address4) if address4 else b"", address6, flags, mtu)


class DeviceEntry(NamedTuple):
    """``struct device``: addresses that masquerading uses, empty where there is none; ``mtu`` in bytes."""

    address4: bytes
    address6: bytes
    flags: DeviceFlags
    mtu: int


def unpack_device(packed: bytes) -> DeviceEntry:
    address4, address6, flags, mtu = DEVICE.unpack(packed)
    return DeviceEntry(
        unpack_address(address4) if any(address4) else b"",
        address6 if any(address6) else b"",
        DeviceFlags(flags),
        mtu,
    )


def pack_xdp_device(link_address: bytes, flags: XdpFlags) -> bytes:
    return XDP_DEVICE.pack(link_address, flags)


def unpack_xdp_device(packed: bytes) -> tuple[bytes, XdpFlags]:
    link_address, flags = XDP_DEVICE.unpack(packed)
    return link_address, XdpFlags(flags)


def with_device_flags(packed: bytes, flags: DeviceFlags) -> bytes:
    """Adds flags to a packed device."""
    address4, address6, before, mtu = DEVICE.unpack(packed)
    return DEVICE.pack(address4, address6, before | flags, mtu)


def is_local_device(packed: bytes) -> bool:
    """True unless a packed device is an uplink or a tunnel."""
    return bool(DEVICE.unpack(packed)[2] & DeviceFlags.LOCAL)


def pack_cidr(prefix: Prefix) -> bytes:
    """Key of ``cidrs``."""
    return CIDR.pack(*lpm(*prefix))


def unpack_cidr(packed: bytes) -> Prefix:
    return unlpm(*CIDR.unpack(packed))
