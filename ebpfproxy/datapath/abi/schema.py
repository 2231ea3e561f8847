"""Which maps there are, of which kind and size."""

from __future__ import annotations

import hashlib
import struct
from typing import NamedTuple

from ebpfproxy.config.datapath import MEASURED, Capacity
from ebpfproxy.datapath.abi import uapi
from ebpfproxy.datapath.abi.decision_layout import DECISION_STATE, POD_NAME, TRACING
from ebpfproxy.datapath.abi.flow_layout import (
    AFFINITY,
    AFFINITY_KEY,
    CLASH,
    FLOW,
    FLOW_HOP_SIZE,
    FLOW_SLOT,
    FRAGMENT,
    NAT,
    SWEEP,
)
from ebpfproxy.datapath.abi.layout import (
    BACKEND_SIZE,
    CHOICE_ROWS,
    DRAINED,
    FRONTEND_LINE_SIZE,
    NAME,
    PAIR,
    POLICIES,
    RANDOM_SEQUENCES,
    RANGE_GENERATIONS,
    REJECTIONS,
    SELECTION,
    SERVICE,
    SERVICE4_KEY,
    SERVICE6_KEY,
    SLOT_SIZE,
    SOURCE_RANGE,
    U64,
)
from ebpfproxy.datapath.abi.measure_layout import CONNECT_FAILURES, CONNECTS, TRAFFIC
from ebpfproxy.datapath.abi.node_layout import CIDR, DEVICE, UNALLOCATED, XDP_DEVICE, PacketEvent
from ebpfproxy.datapath.abi.socket_layout import ORIGIN, PEERS, REDIRECT

SCHEMA_VERSION = 6


class MapSpec(NamedTuple):
    name: str
    kind: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int = 0
    #: Read through short mappings of a part: all of it would count as memory of each process that reads it.
    in_windows: bool = False


#: One bit for each hash of an address, and one byte for each of a pair; see ``datapath.services.filter``.
ADDRESS_FILTER_BITS = 20
FLOW_FILTER_BITS = 18
#: A byte of flow_filter that programs have set, see bpf/lib/filter.h.
FLOW_MARKS = 3
#: One bit for each /20 of IPv4 and each hash of an IPv6 /64; see ``datapath.node.service_cidrs``.
CIDR_FILTER_BITS = 20
CRC_STEPS = 17
#: Open MPTCP sockets that asked for a Service. Those beyond are served, and their records are swept.
MPTCP_SOCKETS = 1 << 16
#: Places of the ``next_hops`` map, by a hash: NEXT_HOP_BITS in bpf/lib/next_hop.h.
NEXT_HOPS = 1024
#: The most slots of ``flow_cache``: bpf/lib/flow_cache.h takes so many bits of a hash.
FLOW_SLOTS = 1 << 21
#: Groups of flows: FLOW_GROUP_BITS in bpf/lib/flow_cache.h. ``flow_tags`` has a time of each before the tags.
FLOW_GROUPS = 1 << 10
#: Entries of conntrack that a sweep reads at once: few enough to stay in a CPU's own cache.
SWEEP_BATCH = 1024
#: A run of a program of bpf/sweep.c is for so many entries, or bytes of ``flow_filter``.
ENTRIES_OF_A_RUN = 6
BYTES_OF_A_RUN = 128 * 8
#: Among up to so many slots programs look for the least loaded backend; the compiler is told.
SEARCHED_SLOTS = 16
#: struct scratch in bpf/lib/scratch.h: no one but programs reads it.
SCRATCH_SIZE = 688
#: When the maps were last changed (Unix seconds), and how long that took (seconds).
PROGRAMMED = struct.Struct("=dd")
#: The agent's own account of itself (JSON), for ``ebpfproxy status``.
AGENT_STATE_SIZE = 16384
#: Bytes of the ring of decisions: of 100 ms of 64 CPUs at their default rate. A power of two.
DECISION_RING = 1 << 20


def _hash(name: str, key: int, value: int, entries: int) -> MapSpec:
    return MapSpec(name, uapi.MAP_HASH, key, value, entries, uapi.F_NO_PREALLOC)


def _trie(name: str, key: int, value: int, entries: int) -> MapSpec:
    return MapSpec(name, uapi.MAP_LPM_TRIE, key, value, entries, uapi.F_NO_PREALLOC)


def _lru(name: str, key: int, value: int, entries: int) -> MapSpec:
    return MapSpec(name, uapi.MAP_LRU_HASH, key, value, entries)


def _array(name: str, value: int, entries: int, flags: int = 0) -> MapSpec:
    return MapSpec(name, uapi.MAP_ARRAY, 4, value, entries, flags)


def _shared(name: str, value: int, entries: int) -> MapSpec:
    """An array in memory that agent and programs share."""
    return _array(name, value, entries, uapi.F_MMAPABLE)


def _socket_slots(sockets: int) -> MapSpec:
    """A socket's slot is given by the lower bits of its cookie, so their number is a power of two."""
    slots = 1 << max(sockets - 1, 1).bit_length()
    return MapSpec("sock_origin", uapi.MAP_ARRAY, 4, ORIGIN.size, slots, uapi.F_MMAPABLE, in_windows=True)


def flow_slots(conntrack: int) -> int:
    """Few flows have many packets. Bits of a hash give a flow's slot, so their number is a power of two."""
    return 1 << max(min(conntrack // 8, FLOW_SLOTS).bit_length() - 1, 0)


def _flow_slots(name: str, value: int, conntrack: int) -> MapSpec:
    """Mapped nowhere; in an array that could be, elements begin with a line of a CPU's cache."""
    return MapSpec(name, uapi.MAP_ARRAY, 4, value, flow_slots(conntrack), uapi.F_MMAPABLE, in_windows=True)


def _choices(services: int) -> MapSpec:
    """See ``datapath.services.counters``."""
    count = CHOICE_ROWS * services
    return MapSpec("service_choices", uapi.MAP_ARRAY, 4, U64.size, count, uapi.F_MMAPABLE, in_windows=True)


def _frontend_lines(frontends: int) -> MapSpec:
    """A line is given by a hash, so their number is a power of two. Only programs look at them."""
    lines = 1 << max(min(frontends // 2, 1 << 16) - 1, 1).bit_length()
    return MapSpec(
        "frontend_cache", uapi.MAP_ARRAY, 4, FRONTEND_LINE_SIZE, lines, uapi.F_MMAPABLE, in_windows=True
    )


def _per_cpu(name: str, value: int, entries: int) -> MapSpec:
    return MapSpec(name, uapi.MAP_PERCPU_ARRAY, 4, value, entries)


def map_specs(capacity: Capacity) -> tuple[MapSpec, ...]:
    """Every map that programs and agent share, in a fixed order."""
    return (
        _hash("services4", SERVICE4_KEY.size, SERVICE.size, capacity.frontends),
        _hash("services6", SERVICE6_KEY.size, SERVICE.size, capacity.frontends),
        _frontend_lines(capacity.frontends),
        _shared("frontend_generation", U64.size, 1),
        _shared("range_generations", U64.size * RANGE_GENERATIONS, 1),
        _shared("selections", SELECTION.size, capacity.services * POLICIES),
        _shared("slots", SLOT_SIZE, capacity.slots),
        _array("turns", U64.size, capacity.services * POLICIES),
        _per_cpu("random_state", U64.size, RANDOM_SEQUENCES),
        _hash("members", PAIR.size, 4, capacity.slots),
        _lru("affinity", AFFINITY_KEY.size, AFFINITY.size, capacity.affinity),
        _hash("client_namespaces", 16, U64.size, 65536),
        _hash("drained", DRAINED.size, 4, 4096),
        _shared("backends", BACKEND_SIZE, capacity.backends),
        _hash("node_addresses", 16, 4, 4096),
        _hash("sock_peers", 8, PEERS.size, capacity.unconnected),
        _lru("port_clashes", CLASH.size, 4, 4096),
        _socket_slots(capacity.connected),
        _hash("sock_origin_overflow", 8, ORIGIN.size, capacity.connected),
        _hash("mptcp_subflows", U64.size, U64.size, MPTCP_SOCKETS),
        _hash("sock_redirects", FLOW.size, REDIRECT.size, capacity.connected),
        _choices(capacity.services),
        _shared("service_rejections", REJECTIONS.size, capacity.services),
        _hash("service_names", 4, NAME.size, capacity.services),
        _lru("conntrack", FLOW.size, NAT.size, capacity.conntrack),
        _flow_slots("flow_cache", FLOW_SLOT.size, capacity.conntrack),
        _flow_slots("flow_hops", FLOW_HOP_SIZE, capacity.conntrack),
        _array("flow_tags", 4 * FLOW_GROUPS + 2 * flow_slots(capacity.conntrack), 1),
        _shared("epochs", U64.size, capacity.services),
        _hash("departures", 8, 4, capacity.backends),
        _lru("fragments", 40, FRAGMENT.size, 8192),
        _array("fragment_ids", U64.size, 1),
        _array("next_hops", U64.size, NEXT_HOPS),
        _array("icmp_bucket", U64.size, 1),
        _trie("source_ranges", SOURCE_RANGE.size, 4, capacity.source_ranges),
        _trie("cidrs", CIDR.size, 4, 65536),
        _shared("cidr_filter", (1 << CIDR_FILTER_BITS) // 8, 1),
        _per_cpu("unallocated", U64.size, len(UNALLOCATED)),
        _hash("devices", 4, DEVICE.size, 16384),
        _hash("xdp_devices", 4, XDP_DEVICE.size, 1024),
        _shared("address_filter", (1 << ADDRESS_FILTER_BITS) // 8, 1),
        _shared("port_filter", 65536 // 8, 1),
        _shared("backend_filter", (1 << ADDRESS_FILTER_BITS) // 8, 1),
        _shared("backend_ports", 65536 // 8, 1),
        _shared("flow_filter", 1 << FLOW_FILTER_BITS, 1),
        _shared("sweep", SWEEP.size, 1),
        _shared("sweep_keys", FLOW.size, SWEEP_BATCH),
        _shared("sweep_values", NAT.size, SWEEP_BATCH),
        _array("crc32c", CRC_STEPS * 4096, 1),
        _per_cpu("packet_events", U64.size, len(PacketEvent)),
        _per_cpu("scratch", SCRATCH_SIZE, 1),
        MapSpec("agent_state", uapi.MAP_HASH, 4, AGENT_STATE_SIZE, 1),
        _array("programmed", PROGRAMMED.size, 1),
        MapSpec("decisions", uapi.MAP_RINGBUF, 0, 0, DECISION_RING),
        _per_cpu("decision_state", DECISION_STATE.size, 1),
        _shared("tracing", TRACING.size, 1),
        _hash("traced_services", 4, 4, capacity.services),
        _hash("connects", 4, CONNECTS.size, MEASURED),
        _array("no_connects", CONNECTS.size, 1),
        _hash("connect_failures", PAIR.size, CONNECT_FAILURES.size, MEASURED),
        MapSpec("service_traffic", uapi.MAP_PERCPU_HASH, 4, TRAFFIC.size, MEASURED, uapi.F_NO_PREALLOC),
        _hash("pod_names", 16, POD_NAME.size, capacity.backends),
    )


#: Only XDP programs use these.
XDP_MAPS = frozenset({"flow_hops"})
#: The size of a value depends on the capacity, as the number of entries does in others.
SIZED_VALUES = frozenset({"flow_tags"})
#: Programs refer to maps by these names. Sizes are not part of what is compiled.
MAP_NAMES = tuple(sorted(spec.name for spec in map_specs(Capacity())))


def version_name(capacity: Capacity) -> str:
    """Name of the folder that holds maps of this layout: ``v1-5f0c21aa``."""
    digest = hashlib.sha256(repr(map_specs(capacity)).encode()).hexdigest()[:8]
    return f"v{SCHEMA_VERSION}-{digest}"
