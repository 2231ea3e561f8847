"""Pods of this node as clients: one client by its sockets, a network namespace, and by its packets."""

from __future__ import annotations

from collections.abc import Mapping

from ebpfproxy.datapath.abi.layout import U64, pack_address
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.kernel.owned import Owned


class ClientNamespaces:
    """The only writer of ``client_namespaces``. One thread uses it."""

    def __init__(self, maps: MapSet) -> None:
        self._map = maps["client_namespaces"]
        self._entries = dict(self._map.items())

    def set(self, cookies: Mapping[bytes, int]) -> None:
        """Makes the map hold exactly these: cookies of network namespaces, by the pods' addresses.

        Addresses for which there is no room are left out: such a pod is two clients.
        """
        wanted = {pack_address(address): U64.pack(cookie) for address, cookie in cookies.items()}
        refused = self._map.bring(wanted)
        self._entries = {key: value for key, value in wanted.items() if key not in refused}

    def owned(self) -> Owned:
        """The map, with what it should hold."""
        return Owned(self._map, lambda: list(self._entries.items()))
