"""Which Services' ids open connections still count for.

A connection has the id that its Service had when it began, until it ends. Before that, an id should have no
other owner: what is measured would be counted for that one, and the connection would end with its backends.
"""

from __future__ import annotations

from ebpfproxy.datapath.abi.flow_layout import FLOW, NAT, NAT_IDS_AT
from ebpfproxy.datapath.abi.socket_layout import ORIGIN, ORIGIN_IDS_AT
from ebpfproxy.datapath.flows.origin_table import OriginTable
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.maps import MapSet

_BATCH = 4096
_WORD = 4
#: Connections are read again after this many ids were retired: that takes a while if there are many.
_RETIRED = 1024


class HeldIds:
    """Reads connections when it is first asked, and seldom after that. One thread uses it."""

    def __init__(self, maps: MapSet) -> None:
        self._maps = maps
        self._held: set[int] | None = None
        self._retired = 0

    def __contains__(self, number: object) -> bool:
        if self._held is None:
            self._held, self._retired = self._read(), 0
        return number in self._held

    def retire(self, number: int) -> None:
        """Its Service is gone: connections may have the id that did not when they were read."""
        if self._held is None:
            return
        self._held.add(number)
        self._retired += 1
        if self._retired >= _RETIRED:
            self._held = None

    def _read(self) -> set[int]:
        """There may be very many connections, and the reconciler waits: no loop in Python looks at each."""
        held: set[int] = set()
        origins = OriginTable(self._maps)
        for table in (origins.connected(), origins.closed()):
            for some in table:
                held.update(_words(memoryview(some), ORIGIN_IDS_AT, ORIGIN.size))
        flows = self._maps["conntrack"].fd
        for _, values, count in bpf.map_lookup_batches(flows, FLOW.size, NAT.size, _BATCH):
            held.update(_words(values[: count * NAT.size], NAT_IDS_AT, NAT.size))
        return held


def _words(packed: memoryview, at: int, size: int) -> memoryview:
    """The 32 bits there of each record."""
    return packed.cast("I")[at // _WORD :: size // _WORD]
