"""Which maps there are, of which kind and size."""

from __future__ import annotations

import hashlib
import struct
from typing import NamedTuple

from ebpfproxy.config.datapath import Capacity
from ebpfproxy.datapath.abi import uapi
from ebpfproxy.datapath.abi.flow_layout import (
    AFFINITY,
    AFFINITY_KEY,
    CLASH,
    FLOW,
    FRAGMENT,
    NAT,
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
from ebpfproxy.datapath.abi.socket_layout import ORIGIN, PEERS, REDIRECT

SCHEMA_VERSION = 4


class MapSpec(NamedTuple):
    name: str
    kind: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int = 0


#: One bit for each hash of an address, and one byte for each of a pair; see ``datapath.services.filter``.
ADDRESS_FILTER_BITS = 20
FLOW_FILTER_BITS = 18
#: One bit for each /20 of IPv4 and each hash of an IPv6 /64; see ``datapath.node.service_cidrs``.
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
    array = uapi.MAP_ARRAY, 4
    return (
        MapSpec(
            "services4",
            uapi.MAP_HASH,
            SERVICE4_KEY.size,
            SERVICE.size,
            capacity.frontends,
            uapi.F_NO_PREALLOC,
        ),
        MapSpec(
            "services6",
            uapi.MAP_HASH,
            SERVICE6_KEY.size,
            SERVICE.size,
            capacity.frontends,
            uapi.F_NO_PREALLOC,
        ),
        MapSpec("selections", *array, SELECTION.size, capacity.services * POLICIES, uapi.F_MMAPABLE),
        MapSpec("slots", *array, SLOT_SIZE, capacity.slots, uapi.F_MMAPABLE),
        MapSpec("turns", *array, U64.size, capacity.services * POLICIES),
        MapSpec("members", uapi.MAP_HASH, PAIR.size, 4, capacity.slots, uapi.F_NO_PREALLOC),
        MapSpec("affinity", uapi.MAP_LRU_HASH, AFFINITY_KEY.size, AFFINITY.size, capacity.affinity),
        MapSpec("loads", *array, LOAD.size, capacity.backends, uapi.F_MMAPABLE),
        MapSpec("client_namespaces", uapi.MAP_HASH, 16, U64.size, 65536, uapi.F_NO_PREALLOC),
        MapSpec("drained", uapi.MAP_HASH, DRAINED.size, 4, 4096, uapi.F_NO_PREALLOC),
        MapSpec("backends", *array, BACKEND.size, capacity.backends, uapi.F_MMAPABLE),
        MapSpec("node_addresses", uapi.MAP_HASH, 16, 4, 4096, uapi.F_NO_PREALLOC),
        MapSpec("sock_peers", uapi.MAP_HASH, 8, PEERS.size, capacity.unconnected, uapi.F_NO_PREALLOC),
        MapSpec("port_clashes", uapi.MAP_LRU_HASH, CLASH.size, 4, 4096),
        MapSpec("sock_origin", uapi.MAP_HASH, 8, ORIGIN.size, capacity.connected, uapi.F_NO_PREALLOC),
        MapSpec("mptcp_subflows", uapi.MAP_HASH, U64.size, U64.size, MPTCP_SOCKETS, uapi.F_NO_PREALLOC),
        MapSpec(
            "sock_redirects", uapi.MAP_HASH, FLOW.size, REDIRECT.size, capacity.connected, uapi.F_NO_PREALLOC
        ),
        MapSpec("service_stats", uapi.MAP_PERCPU_ARRAY, 4, SERVICE_STATS.size, capacity.services),
        MapSpec("backend_stats", uapi.MAP_PERCPU_ARRAY, 4, BACKEND_STATS.size, capacity.backends),
        MapSpec("service_names", uapi.MAP_HASH, 4, NAME.size, capacity.services, uapi.F_NO_PREALLOC),
        MapSpec("conntrack", uapi.MAP_LRU_HASH, FLOW.size, NAT.size, capacity.conntrack),
        MapSpec("epochs", *array, U64.size, capacity.services, uapi.F_MMAPABLE),
        MapSpec("departures", uapi.MAP_HASH, 8, 4, capacity.backends, uapi.F_NO_PREALLOC),
        MapSpec("fragments", uapi.MAP_LRU_HASH, 40, FRAGMENT.size, 8192),
        MapSpec("fragment_ids", *array, U64.size, 1),
        MapSpec(
            "source_ranges",
            uapi.MAP_LPM_TRIE,
            SOURCE_RANGE.size,
            4,
            capacity.source_ranges,
            uapi.F_NO_PREALLOC,
        ),
        MapSpec("cidrs", uapi.MAP_LPM_TRIE, CIDR.size, 4, 65536, uapi.F_NO_PREALLOC),
        MapSpec("cidr_filter", *array, (1 << CIDR_FILTER_BITS) // 8, 1, uapi.F_MMAPABLE),
        MapSpec("unallocated", uapi.MAP_PERCPU_ARRAY, 4, U64.size, len(UNALLOCATED)),
        MapSpec("devices", uapi.MAP_HASH, 4, DEVICE.size, 16384, uapi.F_NO_PREALLOC),
        MapSpec("address_filter", *array, (1 << ADDRESS_FILTER_BITS) // 8, 1, uapi.F_MMAPABLE),
        MapSpec("port_filter", *array, 65536 // 8, 1, uapi.F_MMAPABLE),
        MapSpec("flow_filter", *array, 1 << FLOW_FILTER_BITS, 1),
        MapSpec("crc32c", *array, CRC_STEPS * 4096, 1),
        MapSpec("packet_events", uapi.MAP_PERCPU_ARRAY, 4, U64.size, len(PacketEvent)),
        MapSpec("scratch", uapi.MAP_PERCPU_ARRAY, 4, SCRATCH_SIZE, 1),
        MapSpec("agent_state", uapi.MAP_HASH, 4, AGENT_STATE_SIZE, 1),
        MapSpec("programmed", *array, PROGRAMMED.size, 1),
    )


def version_name(capacity: Capacity) -> str:
    """Name of the folder that holds maps of this layout: ``v1-5f0c21aa``."""
    digest = hashlib.sha256(repr(map_specs(capacity)).encode()).hexdigest()[:8]
    return f"v{SCHEMA_VERSION}-{digest}"
