"""Unconnected datagram sockets: which backends, and which removed ones, they have a record of.

The agent changes no such record: the program that sends the next datagram finds the removal in
``departures``, and chooses anew. Hence the removal must stay there until no record names its backend.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator

from ebpfproxy.datapath.abi import socket_layout
from ebpfproxy.datapath.abi.flow_layout import BackendUse
from ebpfproxy.datapath.flows.origin_table import OriginTable
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.maps import MapSet

#: Entries a system call. Small: a batch in Python holds up the reconciler's thread.
_BATCH = 512


def recorded_removals(maps: MapSet, removed: Collection[BackendUse]) -> set[BackendUse]:
    """Returns those removed backends of which a socket still has a record."""
    found: set[BackendUse] = set()
    for uses in unconnected_uses(maps) if removed else ():
        found.update(BackendUse(*pair) for pair in uses if pair in removed)
        time.sleep(0)
    return found


def unconnected_uses(maps: MapSet) -> Iterator[Iterator[tuple[int, int]]]:
    """What unconnected sockets use, in batches; each pair equals a BackendUse."""
    for origins in OriginTable(maps).unconnected():
        yield socket_layout.unconnected_uses(origins)
    peers = maps["sock_peers"]
    size = peers.spec.value_size
    for _, values, count in bpf.map_lookup_batches(peers.fd, peers.spec.key_size, size, _BATCH):
        yield socket_layout.peer_uses(values, count)
