"""Which maps there are, of which kind and size."""

from __future__ import annotations

import hashlib
import struct
from typing import NamedTuple

import msgspec

from ebpfproxy.datapath.abi.flow_layout import (
    AFFINITY,
    AFFINITY_KEY,
    CLASH,
    FLOW,
    FRAGMENT,
    NAT,
    ORIGIN_SIZE,
    PEERS,
    REDIRECT,
)
from ebpfproxy.datapath.abi.layout import (
    BACKEND,
    BACKEND_STATS,
    DRAINED,
    LOAD,
    NAME,
    PAIR,
    POLICIES,
    SELECTION,
    SERVICE,
    SERVICE4_KEY,
    SERVICE6_KEY,
    SERVICE_STATS,
    SLOT_SIZE,
    SOURCE_RANGE,
    U64,
)
from ebpfproxy.datapath.abi.node_layout import CIDR, DEVICE, UNALLOCATED, PacketEvent
from ebpfproxy.datapath.kernel import bpf

SCHEMA_VERSION = 4


class MapSpec(NamedTuple):
    name: str
    kind: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int = 0


class Capacity(msgspec.Struct, frozen=True):
    """How much the maps can hold. Fixed when they are made; another value makes new ones beside the old."""

    #: Service ports, counted once for each address family.
    services: int = 65536
    #: Distinct endpoint address, port and protocol; both families together.
    backends: int = 262144
    #: Connected sockets that are open and were translated; memory is taken for those that are there.
    connected: int = 1 << 19
    #: Unconnected UDP sockets that are open and have sent to a Service; memory as for ``connected``.
    unconnected: int = 1 << 18
    #: Conntrack entries: two for each flow, four where it is masqueraded. 180 bytes each, taken at once.
    conntrack: int = 1 << 19
    #: Prefixes of all loadBalancerSourceRanges.
    source_ranges: int = 1 << 18
    #: Places in selections: one a backend and service port, more with weights, a table's size with Maglev.
    slots: int = 1 << 20
    #: Clients with session affinity. 110 bytes each, taken at once.
    affinity: int = 1 << 16

    @property
    def frontends(self) -> int:
        return 2 * self.services


#: One bit for each hash of an address, and one byte for each of a pair; see ``datapath.filter``.
ADDRESS_FILTER_BITS = 20
FLOW_FILTER_BITS = 18
#: One bit for each /20 of IPv4 and each hash of an IPv6 /64; see ``datapath.service_cidrs``.
CIDR_FILTER_BITS = 20
CRC_STEPS = 17
#: Open MPTCP sockets that asked for a Service. Those beyond are served, and their records are swept.
MPTCP_SOCKETS = 1 << 16
#: struct scratch in conntrack.h: no one but programs reads it.
SCRATCH_SIZE = 512
#: When the maps were last changed (Unix seconds), and how long that took (seconds).
PROGRAMMED = struct.Struct("=dd")
#: The agent's own account of itself (JSON), for ``ebpfproxy status``.
AGENT_STATE_SIZE = 16384


def map_specs(capacity: Capacity) -> tuple[MapSpec, ...]:
    """Every map that programs and agent share, in a fixed order."""
    array = bpf.MAP_ARRAY, 4
    return (
        MapSpec(
            "services4",
            bpf.MAP_HASH,
            SERVICE4_KEY.size,
            SERVICE.size,
            capacity.frontends,
            bpf.F_NO_PREALLOC,
        ),
        MapSpec(
            "services6",
            bpf.MAP_HASH,
            SERVICE6_KEY.size,
            SERVICE.size,
            capacity.frontends,
            bpf.F_NO_PREALLOC,
        ),
        MapSpec("selections", *array, SELECTION.size, capacity.services * POLICIES, bpf.F_MMAPABLE),
        MapSpec("slots", *array, SLOT_SIZE, capacity.slots, bpf.F_MMAPABLE),
        MapSpec("turns", *array, U64.size, capacity.services * POLICIES),
        MapSpec("members", bpf.MAP_HASH, PAIR.size, 4, capacity.slots, bpf.F_NO_PREALLOC),
        MapSpec("affinity", bpf.MAP_LRU_HASH, AFFINITY_KEY.size, AFFINITY.size, capacity.affinity),
        MapSpec("loads", *array, LOAD.size, capacity.backends, bpf.F_MMAPABLE),
        MapSpec("client_namespaces", bpf.MAP_HASH, 16, U64.size, 65536, bpf.F_NO_PREALLOC),
        MapSpec("drained", bpf.MAP_HASH, DRAINED.size, 4, 4096, bpf.F_NO_PREALLOC),
        MapSpec("backends", *array, BACKEND.size, capacity.backends, bpf.F_MMAPABLE),
        MapSpec("node_addresses", bpf.MAP_HASH, 16, 4, 4096, bpf.F_NO_PREALLOC),
        MapSpec("sock_peers", bpf.MAP_HASH, 8, PEERS.size, capacity.unconnected, bpf.F_NO_PREALLOC),
        MapSpec("port_clashes", bpf.MAP_LRU_HASH, CLASH.size, 4, 4096),
        MapSpec("sock_origin", bpf.MAP_HASH, 8, ORIGIN_SIZE, capacity.connected, bpf.F_NO_PREALLOC),
        MapSpec("mptcp_subflows", bpf.MAP_HASH, U64.size, U64.size, MPTCP_SOCKETS, bpf.F_NO_PREALLOC),
        MapSpec(
            "sock_redirects", bpf.MAP_HASH, FLOW.size, REDIRECT.size, capacity.connected, bpf.F_NO_PREALLOC
        ),
        MapSpec("service_stats", bpf.MAP_PERCPU_ARRAY, 4, SERVICE_STATS.size, capacity.services),
        MapSpec("backend_stats", bpf.MAP_PERCPU_ARRAY, 4, BACKEND_STATS.size, capacity.backends),
        MapSpec("service_names", bpf.MAP_HASH, 4, NAME.size, capacity.services, bpf.F_NO_PREALLOC),
        MapSpec("conntrack", bpf.MAP_LRU_HASH, FLOW.size, NAT.size, capacity.conntrack),
        MapSpec("epochs", *array, U64.size, capacity.services, bpf.F_MMAPABLE),
        MapSpec("departures", bpf.MAP_HASH, 8, 4, capacity.backends, bpf.F_NO_PREALLOC),
        MapSpec("fragments", bpf.MAP_LRU_HASH, 40, FRAGMENT.size, 8192),
        MapSpec("fragment_ids", *array, U64.size, 1),
        MapSpec(
            "source_ranges",
            bpf.MAP_LPM_TRIE,
            SOURCE_RANGE.size,
            4,
            capacity.source_ranges,
            bpf.F_NO_PREALLOC,
        ),
        MapSpec("cidrs", bpf.MAP_LPM_TRIE, CIDR.size, 4, 65536, bpf.F_NO_PREALLOC),
        MapSpec("cidr_filter", *array, (1 << CIDR_FILTER_BITS) // 8, 1, bpf.F_MMAPABLE),
        MapSpec("unallocated", bpf.MAP_PERCPU_ARRAY, 4, U64.size, len(UNALLOCATED)),
        MapSpec("devices", bpf.MAP_HASH, 4, DEVICE.size, 16384, bpf.F_NO_PREALLOC),
        MapSpec("address_filter", *array, (1 << ADDRESS_FILTER_BITS) // 8, 1, bpf.F_MMAPABLE),
        MapSpec("port_filter", *array, 65536 // 8, 1, bpf.F_MMAPABLE),
        MapSpec("flow_filter", *array, 1 << FLOW_FILTER_BITS, 1),
        MapSpec("crc32c", *array, CRC_STEPS * 4096, 1),
        MapSpec("packet_events", bpf.MAP_PERCPU_ARRAY, 4, U64.size, len(PacketEvent)),
        MapSpec("scratch", bpf.MAP_PERCPU_ARRAY, 4, SCRATCH_SIZE, 1),
        MapSpec("agent_state", bpf.MAP_HASH, 4, AGENT_STATE_SIZE, 1),
        MapSpec("programmed", *array, PROGRAMMED.size, 1),
    )


def version_name(capacity: Capacity) -> str:
    """Name of the folder that holds maps of this layout: ``v1-5f0c21aa``."""
    digest = hashlib.sha256(repr(map_specs(capacity)).encode()).hexdigest()[:8]
    return f"v{SCHEMA_VERSION}-{digest}"
