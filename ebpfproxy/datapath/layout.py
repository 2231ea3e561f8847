"""The bytes of every map: the agent's side of ``bpf/lib/types.h``.

Addresses and ports are in network byte order, all else in the host's. ``pack_*`` and ``unpack_*`` are the
only places that know the formats. Any change here or in types.h raises ``SCHEMA_VERSION``.
"""

from __future__ import annotations

import enum
import hashlib
import socket
import struct
import sys
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from ebpfproxy.datapath import bpf
from ebpfproxy.services.model import (
    Algorithm,
    Backend,
    BackendState,
    Family,
    FrontendKind,
    Policy,
    Protocol,
    ServicePortKey,
    format_endpoint,
)

SCHEMA_VERSION = 4

POLICIES = 2


class Scope(enum.IntEnum):
    INTERNAL = 0
    EXTERNAL = 1

    def __str__(self) -> str:
        return self.name.lower()


class ServiceFlags(enum.IntFlag):
    LOCAL = 1 << 0
    TWO_SCOPES = 1 << 1
    SOURCES = 1 << 2
    ADDRESS = 1 << 3
    #: The node itself answers there, such as a DNS cache: not to be translated.
    OWN = 1 << 4


class Departure(enum.IntEnum):
    """Why a backend has left a service: of an idle one connections go on."""

    GONE = 1
    IDLE = 2


class NatFlags(enum.IntFlag):
    REPLY = 1 << 0
    SOURCE = 1 << 1
    HOST = 1 << 2
    BYPASS = 1 << 3


class Seen(enum.IntFlag):
    """What both directions of a flow have shown."""

    REPLY = 1 << 0
    FIN = 1 << 1
    REPLY_FIN = 1 << 2
    RST = 1 << 3


class DeviceFlags(enum.IntFlag):
    PODS = 1 << 0
    LOCAL = 1 << 1
    #: Of the node as a whole, in the entry of no device.
    HANDOVER = 1 << 2
    WAITS = 1 << 3


class CidrFlags(enum.IntFlag):
    PODS = 1 << 0
    SERVICES = 1 << 1


class PacketEvent(enum.IntEnum):
    """What befell a packet that neither simply passed nor was translated; ``enum event`` in C."""

    NO_ENDPOINT = 0
    NO_SUCH_PORT = 1
    BACKEND_GONE = 2
    NO_LOCAL_ENDPOINT = 3
    SOURCE_RANGE = 4
    NO_SUCH_SERVICE = 5
    FRAGMENT = 6
    PORTS_TAKEN = 7
    TABLE_FULL = 8
    UNROUTABLE = 9
    HOPS = 10
    REWRITE = 11
    MARTIAN = 12
    MALFORMED = 13
    FLOWS_MADE = 14
    FLOWS_ENDED = 15

    def __str__(self) -> str:
        return self.name.lower().replace("_", "-")


#: What each reason means for the packet.
REJECTED = frozenset({PacketEvent.NO_ENDPOINT, PacketEvent.NO_SUCH_PORT, PacketEvent.BACKEND_GONE})
PASSED = frozenset({PacketEvent.MARTIAN, PacketEvent.MALFORMED})
DROPPED = frozenset(PacketEvent) - REJECTED - PASSED - {PacketEvent.FLOWS_MADE, PacketEvent.FLOWS_ENDED}


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
    #: Unconnected UDP sockets' backends whose replies are translated.
    revnat: int = 131072
    #: Conntrack entries: two for each flow, four where it is masqueraded. 170 bytes each, taken at once.
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


_SERVICE4_KEY = struct.Struct("=4s2sBB")
_SERVICE6_KEY = struct.Struct("=16s2sBB")
_SERVICE = struct.Struct("=IHBBII")
_SELECTION = struct.Struct("=II")
_SLOT = struct.Struct("=II")
_BACKEND = struct.Struct("=16s2sBBI")
_LOAD = struct.Struct("=IIIIII")
_AFFINITY_KEY = struct.Struct("=16sII")
_AFFINITY = struct.Struct("=IIQ")
_PAIR = struct.Struct("=II")
_NAME = struct.Struct("=64s64s64sBB6x")
SERVICE_STATS = struct.Struct("=QQQ")
BACKEND_STATS = struct.Struct("=Q")
U32 = struct.Struct("=I")
U64 = struct.Struct("=Q")
_FLOW = struct.Struct("=16s16sHHBBxx")
_NAT = struct.Struct("=16s16sHHIIBBHQQ")
_DEVICE = struct.Struct("=16s16sII")
_DRAINED = struct.Struct("=16s2s2x")
_SOURCE_RANGE = struct.Struct("=II16s")
_CIDR = struct.Struct("=I16s")

#: Backend id and weight, as one u64.
SLOT_SIZE = 8
BACKEND_SIZE = _BACKEND.size
#: Offsets in ``struct backend``; a place whose protocol is 0 is free.
BACKEND_PROTOCOL_OFFSET = 18
BACKEND_STATE_OFFSET = 19
#: One bit for each hash of an address, and one byte for each of a pair; see ``datapath.filter``.
ADDRESS_FILTER_BITS = 20
FLOW_FILTER_BITS = 18
CRC_STEPS = 17
#: struct scratch in conntrack.h: no one but programs reads it.
SCRATCH_SIZE = 512
#: The agent's own account of itself (JSON), for ``ebpfproxy status``.
AGENT_STATE_SIZE = 4096


def map_specs(capacity: Capacity) -> tuple[MapSpec, ...]:
    """Every map that programs and agent share, in a fixed order."""
    array = bpf.MAP_ARRAY, 4
    return (
        MapSpec(
            "services4",
            bpf.MAP_HASH,
            _SERVICE4_KEY.size,
            _SERVICE.size,
            capacity.frontends,
            bpf.F_NO_PREALLOC,
        ),
        MapSpec(
            "services6",
            bpf.MAP_HASH,
            _SERVICE6_KEY.size,
            _SERVICE.size,
            capacity.frontends,
            bpf.F_NO_PREALLOC,
        ),
        MapSpec("selections", *array, _SELECTION.size, capacity.services * POLICIES, bpf.F_MMAPABLE),
        MapSpec("slots", *array, SLOT_SIZE, capacity.slots, bpf.F_MMAPABLE),
        MapSpec("turns", *array, U64.size, capacity.services * POLICIES),
        MapSpec("members", bpf.MAP_HASH, _PAIR.size, 4, capacity.slots, bpf.F_NO_PREALLOC),
        MapSpec("affinity", bpf.MAP_LRU_HASH, _AFFINITY_KEY.size, _AFFINITY.size, capacity.affinity),
        MapSpec("loads", *array, _LOAD.size, capacity.backends, bpf.F_MMAPABLE),
        MapSpec("client_namespaces", bpf.MAP_HASH, 16, U64.size, 65536, bpf.F_NO_PREALLOC),
        MapSpec("drained", bpf.MAP_HASH, _DRAINED.size, 4, 4096, bpf.F_NO_PREALLOC),
        MapSpec("backends", *array, _BACKEND.size, capacity.backends, bpf.F_MMAPABLE),
        MapSpec("node_addresses", bpf.MAP_HASH, 16, 4, 4096, bpf.F_NO_PREALLOC),
        MapSpec("sock_revnat", bpf.MAP_LRU_HASH, 32, 20, capacity.revnat),
        MapSpec("sock_origin", bpf.MAP_HASH, 8, 44, capacity.connected, bpf.F_NO_PREALLOC),
        MapSpec("service_stats", bpf.MAP_PERCPU_ARRAY, 4, SERVICE_STATS.size, capacity.services),
        MapSpec("backend_stats", bpf.MAP_PERCPU_ARRAY, 4, BACKEND_STATS.size, capacity.backends),
        MapSpec("service_names", bpf.MAP_HASH, 4, _NAME.size, capacity.services, bpf.F_NO_PREALLOC),
        MapSpec("conntrack", bpf.MAP_LRU_HASH, _FLOW.size, _NAT.size, capacity.conntrack),
        MapSpec("epochs", *array, U64.size, capacity.services, bpf.F_MMAPABLE),
        MapSpec("departures", bpf.MAP_HASH, 8, 4, capacity.backends, bpf.F_NO_PREALLOC),
        MapSpec("fragments", bpf.MAP_LRU_HASH, 40, 4, 8192),
        MapSpec(
            "source_ranges",
            bpf.MAP_LPM_TRIE,
            _SOURCE_RANGE.size,
            4,
            capacity.source_ranges,
            bpf.F_NO_PREALLOC,
        ),
        MapSpec("cidrs", bpf.MAP_LPM_TRIE, _CIDR.size, 4, 1024, bpf.F_NO_PREALLOC),
        MapSpec("devices", bpf.MAP_HASH, 4, _DEVICE.size, 16384, bpf.F_NO_PREALLOC),
        MapSpec("address_filter", *array, (1 << ADDRESS_FILTER_BITS) // 8, 1, bpf.F_MMAPABLE),
        MapSpec("port_filter", *array, 65536 // 8, 1, bpf.F_MMAPABLE),
        MapSpec("flow_filter", *array, 1 << FLOW_FILTER_BITS, 1),
        MapSpec("crc32c", *array, CRC_STEPS * 4096, 1),
        MapSpec("packet_events", bpf.MAP_PERCPU_ARRAY, 4, U64.size, len(PacketEvent)),
        MapSpec("scratch", bpf.MAP_PERCPU_ARRAY, 4, SCRATCH_SIZE, 1),
        MapSpec("agent_state", bpf.MAP_HASH, 4, AGENT_STATE_SIZE, 1),
    )


def version_name(capacity: Capacity) -> str:
    """Name of the folder that holds maps of this layout: ``v1-5f0c21aa``."""
    digest = hashlib.sha256(repr(map_specs(capacity)).encode()).hexdigest()[:8]
    return f"v{SCHEMA_VERSION}-{digest}"


def pack_address(address: bytes) -> bytes:
    """16 bytes: IPv4 as IPv4-mapped IPv6."""
    return b"\0" * 10 + b"\xff\xff" + address if len(address) == 4 else address


def unpack_address(packed: bytes) -> bytes:
    return packed[12:] if packed[:12] == b"\0" * 10 + b"\xff\xff" else packed


def pack_service_key(address: bytes, port: int, protocol: int, scope: int) -> bytes:
    """Key of ``services4`` (4-byte address) or ``services6`` (16-byte address)."""
    key = _SERVICE4_KEY if len(address) == 4 else _SERVICE6_KEY
    return key.pack(address, port.to_bytes(2, "big"), protocol, scope)


class ServiceKey(NamedTuple):
    address: bytes
    port: int
    #: None in the entry that stands for all other ports of a cluster IP.
    protocol: Protocol | None
    scope: Scope


def unpack_service_key(packed: bytes) -> ServiceKey:
    key = _SERVICE4_KEY if len(packed) == _SERVICE4_KEY.size else _SERVICE6_KEY
    address, port, protocol, scope = key.unpack(packed)
    return ServiceKey(
        address, int.from_bytes(port, "big"), Protocol(protocol) if protocol else None, Scope(scope)
    )


def service_key_port(packed: bytes) -> int:
    """Of a packed key, for those who look at many."""
    return int.from_bytes(packed[-4:-2], "big")


class ServiceEntry(NamedTuple):
    id: int
    flags: ServiceFlags
    kind: FrontendKind
    algorithm: Algorithm
    affinity_seconds: int

    @property
    def policy(self) -> Policy:
        return Policy.LOCAL if self.flags & ServiceFlags.LOCAL else Policy.CLUSTER


def pack_service(service_id: int, flags: int, kind: int, algorithm: int, affinity_seconds: int) -> bytes:
    return _SERVICE.pack(service_id, flags, kind, algorithm, affinity_seconds, 0)


def unpack_service(packed: bytes) -> ServiceEntry:
    service_id, flags, kind, algorithm, affinity, _ = _SERVICE.unpack(packed)
    return ServiceEntry(service_id, ServiceFlags(flags), FrontendKind(kind), Algorithm(algorithm), affinity)


def with_service_flags(packed: bytes, flags: int) -> bytes:
    """With exactly these."""
    entry = unpack_service(packed)
    return pack_service(entry.id, flags, entry.kind, entry.algorithm, entry.affinity_seconds)


def asks_who(packed: bytes) -> bool:
    """Whether a packed service looks at who its client is, as in lib/algorithm.h."""
    return packed[7] >= Algorithm.DESTINATION_HASH or any(packed[8:12])


def selection_word(base: int, count: int) -> int:
    """``union selection`` as the one word that is stored at once."""
    return int.from_bytes(_SELECTION.pack(base, count), sys.byteorder)


def selection_range(word: int) -> tuple[int, int]:
    """Base and count of a selection's range of slots."""
    base, count = _SELECTION.unpack(word.to_bytes(8, sys.byteorder))
    return base, count


def pack_backend(backend: Backend, state: BackendState) -> bytes:
    return _BACKEND.pack(
        pack_address(backend.address), backend.port.to_bytes(2, "big"), backend.protocol, state, 0
    )


def unpack_backend(packed: bytes) -> tuple[Backend, BackendState] | None:
    """None for an id that nobody has."""
    address, port, protocol, state, _ = _BACKEND.unpack(packed)
    if not protocol:
        return None
    backend = Backend(unpack_address(address), int.from_bytes(port, "big"), Protocol(protocol))
    return backend, BackendState(state)


class Flow(NamedTuple):
    """``struct flow``. ``egress``: the packet as it is after this host's routing, not before."""

    source: bytes
    destination: bytes
    source_port: int
    destination_port: int
    protocol: int
    egress: bool


class Nat(NamedTuple):
    """``struct nat``. ``last`` and ``created`` are CLOCK_MONOTONIC in nanoseconds."""

    source: bytes
    destination: bytes
    source_port: int
    destination_port: int
    service_id: int
    backend_id: int
    flags: NatFlags
    seen: Seen
    last: int
    created: int


def pack_flow(flow: Flow) -> bytes:
    return _FLOW.pack(
        pack_address(flow.source),
        pack_address(flow.destination),
        socket.htons(flow.source_port),
        socket.htons(flow.destination_port),
        flow.protocol,
        flow.egress,
    )


def unpack_flow(packed: bytes) -> Flow:
    source, destination, sport, dport, protocol, stage = _FLOW.unpack(packed)
    return Flow(
        unpack_address(source),
        unpack_address(destination),
        socket.ntohs(sport),
        socket.ntohs(dport),
        protocol,
        bool(stage),
    )


def pack_nat(nat: Nat) -> bytes:
    """Of no epoch: for what is no Service's."""
    return _NAT.pack(
        pack_address(nat.source),
        pack_address(nat.destination),
        socket.htons(nat.source_port),
        socket.htons(nat.destination_port),
        nat.service_id,
        nat.backend_id,
        nat.flags,
        nat.seen,
        0,
        nat.last,
        nat.created,
    )


def unpack_nat(packed: bytes) -> Nat:
    source, destination, sport, dport, service, backend, flags, seen, _, last, created = _NAT.unpack(packed)
    return Nat(
        unpack_address(source),
        unpack_address(destination),
        socket.ntohs(sport),
        socket.ntohs(dport),
        service,
        backend,
        NatFlags(flags),
        Seen(seen),
        last,
        created,
    )


_NAT_IDS_AT, _NAT_EPOCH_AT = 36, 46
ORIGIN_IDS_AT = 36


def nat_ids(packed: bytes) -> tuple[int, int]:
    """Service id and backend id of a packed conntrack value."""
    service_id, backend_id = _PAIR.unpack_from(packed, _NAT_IDS_AT)
    return service_id, backend_id


def with_nat_ids(packed: bytes, service_id: int, backend_id: int, epoch: int) -> bytes:
    """The same value for other ids; ``epoch`` is the service's now."""
    changed = bytearray(packed)
    _PAIR.pack_into(changed, _NAT_IDS_AT, service_id, backend_id)
    changed[_NAT_EPOCH_AT : _NAT_EPOCH_AT + 2] = (epoch & 0xFFFF).to_bytes(2, sys.byteorder)
    return bytes(changed)


def partner_key(flow: bytes, nat: bytes) -> bytes:
    """The key of a packed entry's other half: what this half writes, reversed, at the other stage."""
    protocol, stage, flags = flow[36], flow[37], nat[44]
    other_stage = stage if flags & NatFlags.BYPASS else not stage
    return nat[16:32] + nat[:16] + nat[34:36] + nat[32:34] + bytes((protocol, other_stage, 0, 0))


def pack_departure(service_id: int, backend_id: int) -> bytes:
    return _PAIR.pack(service_id, backend_id)


def unpack_departure(packed: bytes) -> tuple[int, int]:
    """Service id and backend id."""
    service_id, backend_id = _PAIR.unpack(packed)
    return service_id, backend_id


def slot(backend_id: int, weight: int = 0) -> int:
    """``union slot`` as the one word that an array holds. ``weight`` only where loads are looked at."""
    return int.from_bytes(_SLOT.pack(backend_id, weight), sys.byteorder)


def slot_backend(word: int) -> int:
    backend_id, _ = _SLOT.unpack(word.to_bytes(SLOT_SIZE, sys.byteorder))
    return int(backend_id)


def slot_weight(word: int) -> int:
    _, weight = _SLOT.unpack(word.to_bytes(SLOT_SIZE, sys.byteorder))
    return int(weight)


def pack_member(selection: int, backend_id: int) -> bytes:
    """Key of ``members``; ``selection`` is an index of ``selections``."""
    return _PAIR.pack(selection, backend_id)


def unpack_member(packed: bytes) -> tuple[int, int]:
    selection, backend_id = _PAIR.unpack(packed)
    return selection, backend_id


class Load(NamedTuple):
    """``struct load``: words of 32 bits that wrap."""

    sockets: int
    sockets_carried: int
    flows_begun: int
    flows_ended: int
    flows_corrected: int

    @property
    def open_sockets(self) -> int:
        return max(0, _signed(self.sockets + self.sockets_carried))

    @property
    def open_flows(self) -> int:
        return max(0, _signed(self.flows_begun - self.flows_ended + self.flows_corrected))

    @property
    def open_now(self) -> int:
        return self.open_sockets + self.open_flows


def _signed(number: int) -> int:
    return (number + 0x80000000 & 0xFFFFFFFF) - 0x80000000


LOAD_SIZE = _LOAD.size
#: In units of 32 bits; the agent writes the carried and the corrected.
LOAD_WORDS = LOAD_SIZE // 4
LOAD_CARRIED, LOAD_BEGUN, LOAD_ENDED, LOAD_CORRECTED = 1, 2, 3, 4


def load_of(words: Sequence[int]) -> Load:
    """From the words of one ``struct load``."""
    return Load(*words[:5])


class ClientKind(enum.IntEnum):
    ADDRESS = 0
    NAMESPACE = 1


class AffinityKey(NamedTuple):
    """``client`` is an address, or a network namespace's cookie where ``kind`` says so."""

    client: bytes | int
    service_id: int
    kind: ClientKind


def unpack_affinity_key(packed: bytes) -> AffinityKey:
    client, service_id, kind = _AFFINITY_KEY.unpack(packed)
    if kind == ClientKind.NAMESPACE:
        return AffinityKey(int.from_bytes(client[:8], "big"), service_id, ClientKind.NAMESPACE)
    return AffinityKey(unpack_address(client), service_id, ClientKind.ADDRESS)


def unpack_affinity(packed: bytes) -> tuple[int, int]:
    """Backend id, and the last choice: CLOCK_MONOTONIC in nanoseconds."""
    backend_id, _, last = _AFFINITY.unpack(packed)
    return backend_id, last


def affinity_service(packed: bytes) -> int:
    """The service id in a packed key of ``affinity``."""
    return int(_AFFINITY_KEY.unpack(packed)[1])


def with_affinity_service(packed: bytes, service_id: int) -> bytes:
    return packed[:16] + U32.pack(service_id) + packed[20:]


def with_affinity_backend(packed: bytes, backend_id: int) -> bytes:
    return U32.pack(backend_id) + packed[4:]


def origin_ids(packed: bytes) -> tuple[int, int]:
    """Service id and backend id of a socket's origin."""
    service_id, backend_id = _PAIR.unpack_from(packed, ORIGIN_IDS_AT)
    return service_id, backend_id


def origin_backend(packed: bytes) -> tuple[bytes, int]:
    """Address and port that a socket was sent to."""
    return unpack_address(packed[16:32]), int.from_bytes(packed[34:36], "big")


def with_origin_ids(packed: bytes, service_id: int, backend_id: int) -> bytes:
    changed = bytearray(packed)
    _PAIR.pack_into(changed, ORIGIN_IDS_AT, service_id, backend_id)
    return bytes(changed)


def pack_drained(address: bytes, port: int) -> bytes:
    """Key of ``drained``; port 0 stands for all."""
    return _DRAINED.pack(pack_address(address), port.to_bytes(2, "big"))


def unpack_drained(packed: bytes) -> tuple[bytes, int]:
    address, port = _DRAINED.unpack(packed)
    return unpack_address(address), int.from_bytes(port, "big")


def pack_device(address4: bytes, address6: bytes, flags: int, mtu: int) -> bytes:
    """Addresses that masquerading uses; empty ones where there is none. ``mtu`` in bytes."""
    return _DEVICE.pack(pack_address(address4) if address4 else b"", address6, flags, mtu)


def with_device_flags(packed: bytes, flags: DeviceFlags) -> bytes:
    """The same entry with these besides."""
    address4, address6, before, mtu = _DEVICE.unpack(packed)
    return _DEVICE.pack(address4, address6, before | flags, mtu)


def _lpm(address: bytes, length: int) -> tuple[int, bytes]:
    """Prefix length and address of a prefix in the 16 bytes of either family."""
    return length + 8 * (16 - len(address)), pack_address(address)


def pack_source_range(service_id: int, address: bytes, length: int) -> bytes:
    bits, packed = _lpm(address, length)
    return _SOURCE_RANGE.pack(32 + bits, service_id, packed)


def source_range_service(packed: bytes) -> int:
    """The service id in a key of ``source_ranges``."""
    return int(_SOURCE_RANGE.unpack(packed)[1])


def pack_cluster_ip(address: bytes) -> tuple[bytes, bytes]:
    """Key and value of the entry that stands for all ports that a cluster IP does not have."""
    return (
        pack_service_key(address, 0, 0, Scope.INTERNAL),
        pack_service(0, ServiceFlags.ADDRESS, FrontendKind.CLUSTER_IP, 0, 0),
    )


def pack_cidr(address: bytes, length: int) -> bytes:
    return _CIDR.pack(*_lpm(address, length))


def pack_name(key: ServicePortKey) -> bytes:
    """What a service id stands for; names are DNS labels of at most 63 bytes."""
    return _NAME.pack(
        key.namespace.encode(), key.name.encode(), key.port_name.encode(), key.protocol, key.family
    )


def unpack_name(packed: bytes) -> ServicePortKey:
    namespace, name, port_name, protocol, family = _NAME.unpack(packed)
    return ServicePortKey(
        namespace.rstrip(b"\0").decode(),
        name.rstrip(b"\0").decode(),
        port_name.rstrip(b"\0").decode(),
        Protocol(protocol),
        Family(family),
    )


def format_frontend(address: bytes, port: int, protocol: Protocol | None) -> str:
    """``10.96.0.10:53/UDP`` or ``[fd00::1]:53/UDP``."""
    return f"{format_endpoint(address, port)}/{protocol.name if protocol else 'any'}"
