"""The bytes of the Services' maps: the agent's side of ``bpf/lib/service_types.h``.

Addresses and ports are in network byte order, all else in the host's. ``pack_*`` and ``unpack_*`` here, in
``flow_layout`` and ``node_layout`` are the only places that know the formats. A change of a struct that
``flows.map_migration`` copies raises ``schema.SCHEMA_VERSION``, but for a flag that older programs ignore.
"""

from __future__ import annotations

import enum
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

from ebpfproxy.services.model import (
    Algorithm,
    Backend,
    BackendState,
    Family,
    FrontendKind,
    Policy,
    Prefix,
    Protocol,
    ServicePortKey,
    format_endpoint,
)

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
    #: A process of the node answers there, such as a DNS cache: packets are not translated.
    OWN = 1 << 4
    #: The source ranges have the address by which this node itself asks.
    HOST = 1 << 5


SERVICE4_KEY = struct.Struct(">4sHBB")
SERVICE6_KEY = struct.Struct(">16sHBB")
SERVICE = struct.Struct("=IHBBII")
SELECTION = struct.Struct("=II")
_SLOT = struct.Struct("=II")
#: The first fields of ``struct backend``: a backend's name and state.
BACKEND = struct.Struct(">16sHBB")
#: The other fields.
LOAD = struct.Struct("=IQQQIIII")
PAIR = struct.Struct("=II")
NAME = struct.Struct("=64s64s64sBB6x")
REJECTIONS = struct.Struct("=QQ")
U32 = struct.Struct("=I")
U64 = struct.Struct("=Q")
DRAINED = struct.Struct(">16sH2x")
SOURCE_RANGE = struct.Struct("=II16s")
NSEC_PER_SEC = 1_000_000_000
#: This id belongs to no Service and no backend.
NOBODY = 0xFFFFFFFF
#: Backend id and weight, as one u64.
SLOT_SIZE = 8
BACKEND_SIZE = BACKEND.size + LOAD.size
#: ``struct frontend_line``, which only programs use.
FRONTEND_LINE_SIZE = 64
#: Rows of ``service_choices``; neighbouring CPUs share one.
CHOICE_ROWS = 16
#: Words of ``range_generations``, and ``random_state``: bpf/lib/service_types.h.
RANGE_GENERATIONS = 256
RANDOM_SEQUENCES = 2
#: Frontends of struct frontends_read, in the same header, and what comes before them: the generation.
FRONTENDS_READ, FRONTENDS_READ_HEADER = 80, struct.Struct("=QII")
#: Offsets in ``struct backend``; a place whose protocol is 0 is free.
BACKEND_PROTOCOL_OFFSET = 18
BACKEND_STATE_OFFSET = 19
MAPPED = b"\0" * 10 + b"\xff\xff"
#: Where the two numbers of a selection are in its word.
_BASE_SHIFT, _COUNT_SHIFT = (0, 32) if sys.byteorder == "little" else (32, 0)


def pack_address(address: bytes) -> bytes:
    """16 bytes: IPv4 as IPv4-mapped IPv6."""
    return MAPPED + address if len(address) == 4 else address


def unpack_address(packed: bytes) -> bytes:
    return packed[12:] if packed.startswith(MAPPED) else packed


def pack_service_key(address: bytes, port: int, protocol: int | None, scope: int) -> bytes:
    """Key of ``services4`` (4-byte address) or ``services6`` (16-byte address)."""
    key = SERVICE4_KEY if len(address) == 4 else SERVICE6_KEY
    return key.pack(address, port, protocol or 0, scope)


class ServiceKey(NamedTuple):
    address: bytes
    port: int
    #: None in the entry that stands for all other ports of a cluster IP.
    protocol: Protocol | None
    scope: Scope

    def __str__(self) -> str:
        return format_frontend(self.address, self.port, self.protocol)


def unpack_service_key(packed: bytes) -> ServiceKey:
    key = SERVICE4_KEY if len(packed) == SERVICE4_KEY.size else SERVICE6_KEY
    address, port, protocol, scope = key.unpack(packed)
    return ServiceKey(address, port, Protocol(protocol) if protocol else None, Scope(scope))


def key_address(packed: bytes) -> bytes:
    return packed[: 4 if len(packed) == SERVICE4_KEY.size else 16]


def without_scope(packed: bytes) -> bytes:
    """What is the same in the keys of both scopes."""
    return packed[:-1]


class ServiceEntry(NamedTuple):
    id: int
    flags: ServiceFlags
    kind: FrontendKind
    algorithm: Algorithm
    affinity_seconds: int

    @property
    def policy(self) -> Policy:
        return Policy.LOCAL if self.flags & ServiceFlags.LOCAL else Policy.CLUSTER

    @property
    def needs_client_key(self) -> bool:
        """True if the choice depends on the client, as in lib/algorithm.h."""
        return self.algorithm >= Algorithm.DESTINATION_HASH or self.affinity_seconds > 0


def pack_service(service_id: int, flags: int, kind: int, algorithm: int, affinity_seconds: int) -> bytes:
    return SERVICE.pack(service_id, flags, kind, algorithm, affinity_seconds, 0)


def unpack_service(packed: bytes) -> ServiceEntry:
    service_id, flags, kind, algorithm, affinity, _ = SERVICE.unpack(packed)
    return ServiceEntry(service_id, ServiceFlags(flags), FrontendKind(kind), Algorithm(algorithm), affinity)


def service_id(packed: bytes) -> int:
    return int(U32.unpack_from(packed)[0])


def service_flags(packed: bytes) -> int:
    return int(SERVICE.unpack(packed)[1])


def selection_word(base: int, count: int) -> int:
    """``union selection`` as the one word that is stored at once."""
    return base << _BASE_SHIFT | count << _COUNT_SHIFT


def selection_range(word: int) -> tuple[int, int]:
    """Base and count of a selection's range of slots."""
    base, count = SELECTION.unpack(word.to_bytes(8, sys.byteorder))
    return base, count


def cpus_of_a_row_shift(cpus: int) -> int:
    """How far a CPU's number is shifted to give its row of ``service_choices``, on so many possible CPUs."""
    return max(0, (cpus - 1).bit_length() - (CHOICE_ROWS - 1).bit_length())


_PROTOCOLS = {int(each): each for each in Protocol}
_STATES = {int(each): each for each in BackendState}


def pack_backend(backend: Backend, state: BackendState) -> bytes:
    """The first ``BACKEND.size`` bytes of a record."""
    return BACKEND.pack(pack_address(backend.address), backend.port, backend.protocol, state)


def pack_backends(backends: Iterable[Backend], state: BackendState) -> list[bytes]:
    """The same for many: a call of a function for each would take half of the time."""
    pack = BACKEND.pack
    return [
        pack(
            MAPPED + address if len(address := each.address) == 4 else address,
            each.port,
            each.protocol,
            state,
        )
        for each in backends
    ]


def unpack_backend(packed: bytes) -> tuple[Backend, BackendState] | None:
    """A backend and its state; None if the place is free. Raises ValueError."""
    address, port, protocol, state = BACKEND.unpack_from(packed)
    if not protocol:
        return None
    try:
        # An enum's own look-up takes five times as long.
        return Backend(unpack_address(address), port, _PROTOCOLS[protocol]), _STATES[state]
    except KeyError as error:
        raise ValueError(f"{protocol} is no protocol, or {state} no state") from error


def slot(backend_id: int, weight: int = 0) -> int:
    """``union slot`` as one word of an array. ``weight`` is set only if the algorithm compares loads."""
    return int.from_bytes(_SLOT.pack(backend_id, weight), sys.byteorder)


def slot_weight(word: int) -> int:
    """The weight in a slot's word; 0 where the algorithm does not compare loads."""
    return int(_SLOT.unpack(word.to_bytes(8, sys.byteorder))[1])


def pack_member(selection: int, backend_id: int) -> bytes:
    """Key of ``members``; ``selection`` is an index of ``selections``."""
    return PAIR.pack(selection, backend_id)


def unpack_member(packed: bytes) -> tuple[int, int]:
    selection, backend_id = PAIR.unpack(packed)
    return selection, backend_id


class Load(NamedTuple):
    """What ``struct backend`` counts. Words of 32 bits wrap."""

    sockets_closed: int
    sockets_opened: int
    flows_begun: int
    datagrams: int
    sockets_carried: int
    flows_ended: int
    flows_corrected: int

    @property
    def chosen(self) -> int:
        """Connections, flows and datagrams so far."""
        return self.sockets_opened + self.flows_begun + self.datagrams

    @property
    def open_sockets(self) -> int:
        return max(0, _signed(self.sockets_opened - self.sockets_closed + self.sockets_carried))

    @property
    def counted_flows(self) -> int:
        """Open flows as counted; below 0 if more have ended than begun."""
        return _signed(self.flows_begun - self.flows_ended + self.flows_corrected)

    @property
    def open_flows(self) -> int:
        return max(0, self.counted_flows)

    @property
    def open_now(self) -> int:
        return self.open_sockets + self.open_flows


def _signed(number: int) -> int:
    return (number + 0x80000000 & 0xFFFFFFFF) - 0x80000000


#: Offsets of the fields of LOAD in ``struct backend``.
LOAD_OFFSETS = {
    "sockets_closed": 20,
    "sockets_opened": 24,
    "flows_begun": 32,
    "datagrams": 40,
    "sockets_carried": 48,
    "flows_ended": 52,
    "flows_corrected": 56,
    "flows_seen": 60,
}
#: ``flows_seen`` has this bit where the sweep has ended flows.
FLOWS_ENDED = 1 << 31


def unpack_load(record: bytes | memoryview) -> Load:
    """Reads what a ``struct backend`` counts."""
    return Load(*LOAD.unpack_from(record, BACKEND.size)[:7])


def pack_drained(address: bytes, port: int) -> bytes:
    """Key of ``drained``; port 0 stands for all."""
    return DRAINED.pack(pack_address(address), port)


def unpack_drained(packed: bytes) -> tuple[bytes, int]:
    address, port = DRAINED.unpack(packed)
    return unpack_address(address), port


def lpm(address: bytes, length: int) -> tuple[int, bytes]:
    """Prefix length and address of a prefix in the 16 bytes of either family."""
    return length + 8 * (16 - len(address)), pack_address(address)


def unlpm(length: int, packed: bytes) -> Prefix:
    """The reverse of :func:`lpm`."""
    address = unpack_address(packed)
    if length < 8 * (16 - len(address)):
        # A prefix as short as ::/0 contains all of IPv4.
        return Prefix(packed, length)
    return Prefix(address, length - 8 * (16 - len(address)))


def pack_source_range(service_id: int, prefix: Prefix) -> bytes:
    """Key of ``source_ranges``."""
    bits, packed = lpm(*prefix)
    return SOURCE_RANGE.pack(32 + bits, service_id, packed)


def unpack_source_range(packed: bytes) -> tuple[int, Prefix]:
    """Service id and range."""
    bits, service_id, address = SOURCE_RANGE.unpack(packed)
    return service_id, unlpm(bits - 32, address)


_OTHER_PORTS = pack_service(0, ServiceFlags.ADDRESS, FrontendKind.CLUSTER_IP, 0, 0)


def pack_cluster_ip(address: bytes) -> tuple[bytes, bytes]:
    """Key and value of the entry that stands for all ports that a cluster IP does not have."""
    return pack_service_key(address, 0, 0, 0), _OTHER_PORTS


def pack_name(key: ServicePortKey) -> bytes:
    """The service port that an id stands for; its names are DNS labels of at most 63 bytes."""
    return NAME.pack(
        key.namespace.encode(), key.name.encode(), key.port_name.encode(), key.protocol, key.family
    )


def unpack_name(packed: bytes) -> ServicePortKey:
    namespace, name, port_name, protocol, family = NAME.unpack(packed)
    return ServicePortKey(
        namespace.rstrip(b"\0").decode(),
        name.rstrip(b"\0").decode(),
        port_name.rstrip(b"\0").decode(),
        Protocol(protocol),
        Family(family),
    )


# -- maps whose content may be somebody else's: what no agent writes is left out, until the agent removes it


def known_names(items: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[int, ServicePortKey]]:
    """The entries of ``service_names``: ids and what they stand for."""
    for key, value in items:
        with suppress(ValueError):
            yield U32.unpack(key)[0], unpack_name(value)


def known_services(items: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[ServiceKey, ServiceEntry]]:
    """The entries of ``services4`` or ``services6``."""
    for key, value in items:
        with suppress(ValueError):
            yield unpack_service_key(key), unpack_service(value)


def format_frontend(address: bytes, port: int, protocol: Protocol | None) -> str:
    """``10.96.0.10:53/UDP`` or ``[fd00::1]:53/UDP``."""
    return f"{format_endpoint(address, port)}/{protocol.name if protocol else 'any'}"
