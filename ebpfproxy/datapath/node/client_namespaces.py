"""Pods of this node as clients: one client by its sockets, a network namespace, and by its packets."""

from __future__ import annotations

from collections.abc import Mapping

from ebpfproxy.datapath.abi.layout import U64, pack_address
from ebpfproxy.datapath.kernel.maps import MapSet


def set_client_namespaces(maps: MapSet, cookies: Mapping[bytes, int]) -> None:
    """Makes ``client_namespaces`` hold exactly these: cookies of network namespaces, by the pods' addresses.

    Addresses for which there is no room are left out: such a pod is two clients.
    """
    wanted = {pack_address(address): U64.pack(cookie) for address, cookie in cookies.items()}
    maps["client_namespaces"].bring(wanted)
