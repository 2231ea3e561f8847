"""Drain requests: commands write them to a map, and the agent carries them out."""

from __future__ import annotations

from ebpfproxy.datapath.abi import layout
from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.kernel.maps import MapSet


class Drained:
    """The ``drained`` map. A port of 0 stands for all ports of the address."""

    def __init__(self, maps: MapSet) -> None:
        self._map = maps["drained"]

    def read(self) -> frozenset[tuple[bytes, int]]:
        return frozenset(layout.unpack_drained(key) for key, _ in self._map.items())

    def add(self, address: bytes, port: int) -> None:
        """Adds a request. Raises BpfError if the map is full."""
        self._map.update(layout.pack_drained(address, port), U32.pack(1))

    def remove(self, address: bytes, port: int) -> bool:
        """Removes a request. Returns False if there is none."""
        return self._map.delete(layout.pack_drained(address, port))
