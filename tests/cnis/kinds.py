"""Kinds of devices in network namespaces: whether the kernel has them, and those that iproute2 6.1 cannot make."""

from __future__ import annotations

import base64
import struct
from typing import Any

from ebpfproxy.netlink import codec
from ebpfproxy.netlink.rtnetlink import IFINFOMSG, Rtnetlink
from tests.cnis.network import ip
from tests.lab.spaces import Space

# Attributes: linux/if_link.h.
_NEWLINK, _IFNAME, _LINKINFO, _INFO_KIND, _INFO_DATA = 16, 3, 18, 1, 2
_NETKIT_PEER, _NETKIT_MODE = 1, 5
#: netkit's modes: with link addresses and neighbours, or without.
NETKIT_L2, NETKIT_L3 = 0, 1
WIREGUARD_PORT = 51820


def lacking(space: Space, kinds: tuple[str, ...]) -> str:
    """Returns the first of these kinds that the kernel lacks, empty if it has all of them."""
    for kind in kinds:
        try:
            ip(space, f"link add probe type {kind}")
        except RuntimeError as error:
            if "Unknown device type" in str(error):
                return kind
        else:
            ip(space, "link del probe")
    return ""


def add_netkit(space: Space, name: str, peer: str, mode: int) -> None:
    """Adds a pair of netkits; ``name`` is the primary one, as that of a pod on its node."""
    space.call(_add_netkit, name, peer, mode)


def _add_netkit(name: str, peer: str, mode: int) -> None:
    def device(of: str) -> bytes:
        return IFINFOMSG.pack(0, 0, 0, 0, 0) + codec.attribute(_IFNAME, of.encode() + b"\0")

    data = codec.nested(
        _INFO_DATA,
        codec.attribute(_NETKIT_MODE, struct.pack("=I", mode)),
        codec.nested(_NETKIT_PEER, device(peer)),
    )
    info = codec.nested(_LINKINFO, codec.attribute(_INFO_KIND, b"netkit\0"), data)
    with Rtnetlink() as netlink:
        netlink.change(_NEWLINK, device(name) + info, codec.CREATE)


def add_wireguard(space: Space, name: str, number: int) -> str:
    """Adds a WireGuard device with the private key of this number, and returns its public one."""
    ip(space, f"link add {name} type wireguard")
    return space.call(_set_key, name, number)


def _set_key(name: str, number: int) -> str:
    # Importing pyroute2 takes time that no other test needs.
    from pyroute2 import WireGuard  # noqa: PLC0415

    private = base64.b64encode(bytes([8, number, *bytes(29), 64])).decode()
    with WireGuard() as wireguard:
        wireguard.set(name, private_key=private, listen_port=WIREGUARD_PORT)
        (found, *_) = wireguard.info(name)
        public = found.get_attr("WGDEVICE_A_PUBLIC_KEY")
    return public.decode() if isinstance(public, bytes) else str(public)


def add_wireguard_peer(space: Space, name: str, public: str, endpoint: str, *allowed: str) -> None:
    peer = {
        "public_key": public,
        "endpoint_addr": endpoint,
        "endpoint_port": WIREGUARD_PORT,
        "allowed_ips": list(allowed),
    }
    space.call(_set_peer, name, peer)


def _set_peer(name: str, peer: dict[str, Any]) -> None:
    from pyroute2 import WireGuard  # noqa: PLC0415

    with WireGuard() as wireguard:
        wireguard.set(name, peer=peer)
