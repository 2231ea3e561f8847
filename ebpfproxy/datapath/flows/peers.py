"""Unconnected datagram sockets: which departed backends they still have a record of.

Such a record is never looked at from here: the program that sends the next datagram sees that the backend
has left, and chooses anew. It sees so by the departure, which must stay until no record is about it.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from ebpfproxy.datapath.abi import flow_layout
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.maps import MapSet

#: Entries a system call. Small: a batch in Python holds up the reconciler's thread.
_BATCH = 512


def noted_departures(maps: MapSet, departures: Collection[bytes]) -> set[bytes]:
    """Those of some departures (packed keys) that a socket has a record of."""
    found: set[bytes] = set()
    if not departures:
        return found
    peers = maps["sock_peers"]
    size = peers.spec.value_size
    for _, values, count in bpf.map_lookup_batches(peers.fd, peers.spec.key_size, size, _BATCH):
        for i in range(count):
            for pair in flow_layout.peer_ids(bytes(values[i * size : (i + 1) * size])):
                if pair in departures:
                    found.add(pair)
        time.sleep(0)
    return found
