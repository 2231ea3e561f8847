"""The bytes of every map: the agent's side of ``bpf/lib/types.h``.

Addresses and ports are in network byte order, all else in the host's. ``pack_*`` and ``unpack_*`` are the
only places that know the formats. Any change here or in types.h raises ``SCHEMA_VERSION``.
"""

from __future__ import annotations

import enum
import hashlib
import struct
import sys
from typing import NamedTuple

import msgspec

from ebpfproxy.datapath import bpf
from ebpfproxy.services.model import (
    Backend,
    BackendState,
    Family,
    FrontendKind,
    Policy,
    Protocol,
    ServicePortKey,
    format_endpoint,
)

SCHEMA_VERSION = 1

POLICIES = 2


class Scope(enum.IntEnum):
    INTERNAL = 0
    EXTERNAL = 1

    def __str__(self) -> str:
        return self.name.lower()


class ServiceFlags(enum.IntFlag):
    LOCAL = 1 << 0
    TWO_SCOPES = 1 << 1


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
    connected: int = 1 << 17
    #: Unconnected UDP sockets' backends whose replies are translated.
    revnat: int = 131072

    @property
    def frontends(self) -> int:
        return 2 * self.services

    @property
    def slots(self) -> int:
        return 4 * self.backends


_SERVICE4_KEY = struct.Struct("=4s2sBB")
_SERVICE6_KEY = struct.Struct("=16s2sBB")
_SERVICE = struct.Struct("=IHBBII")
_SELECTION = struct.Struct("=II")
_BACKEND = struct.Struct("=16s2sBBHH")
_NAME = struct.Struct("=64s64s64sBB6x")
SERVICE_STATS = struct.Struct("=QQQ")
BACKEND_STATS = struct.Struct("=Q")
U32 = struct.Struct("=I")

#: A backend id as u64.
SLOT_SIZE = 8
BACKEND_SIZE = _BACKEND.size
#: Offsets in ``struct backend``; a place whose protocol is 0 is free.
BACKEND_PROTOCOL_OFFSET = 18
BACKEND_STATE_OFFSET = 19
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
        MapSpec("backends", *array, _BACKEND.size, capacity.backends, bpf.F_MMAPABLE),
        MapSpec("node_addresses", bpf.MAP_HASH, 16, 4, 4096, bpf.F_NO_PREALLOC),
        MapSpec("sock_revnat", bpf.MAP_LRU_HASH, 32, 20, capacity.revnat),
        MapSpec("sock_origin", bpf.MAP_HASH, 8, 44, capacity.connected, bpf.F_NO_PREALLOC),
        MapSpec("service_stats", bpf.MAP_PERCPU_ARRAY, 4, SERVICE_STATS.size, capacity.services),
        MapSpec("backend_stats", bpf.MAP_PERCPU_ARRAY, 4, BACKEND_STATS.size, capacity.backends),
        MapSpec("service_names", bpf.MAP_HASH, 4, _NAME.size, capacity.services, bpf.F_NO_PREALLOC),
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
    protocol: Protocol
    scope: Scope


def unpack_service_key(packed: bytes) -> ServiceKey:
    key = _SERVICE4_KEY if len(packed) == _SERVICE4_KEY.size else _SERVICE6_KEY
    address, port, protocol, scope = key.unpack(packed)
    return ServiceKey(address, int.from_bytes(port, "big"), Protocol(protocol), Scope(scope))


class ServiceEntry(NamedTuple):
    id: int
    flags: ServiceFlags
    kind: FrontendKind
    algorithm: int
    affinity_seconds: int

    @property
    def policy(self) -> Policy:
        return Policy.LOCAL if self.flags & ServiceFlags.LOCAL else Policy.CLUSTER


def pack_service(service_id: int, flags: int, kind: int, algorithm: int, affinity_seconds: int) -> bytes:
    return _SERVICE.pack(service_id, flags, kind, algorithm, affinity_seconds, 0)


def unpack_service(packed: bytes) -> ServiceEntry:
    service_id, flags, kind, algorithm, affinity, _ = _SERVICE.unpack(packed)
    return ServiceEntry(service_id, ServiceFlags(flags), FrontendKind(kind), algorithm, affinity)


def selection_word(base: int, count: int) -> int:
    """``union selection`` as the one word that is stored at once."""
    return int.from_bytes(_SELECTION.pack(base, count), sys.byteorder)


def selection_range(word: int) -> tuple[int, int]:
    """Base and count of a selection's range of slots."""
    base, count = _SELECTION.unpack(word.to_bytes(8, sys.byteorder))
    return base, count


def pack_backend(backend: Backend, state: BackendState) -> bytes:
    return _BACKEND.pack(
        pack_address(backend.address), backend.port.to_bytes(2, "big"), backend.protocol, state, 1, 0
    )


def unpack_backend(packed: bytes) -> tuple[Backend, BackendState] | None:
    """None for an id that nobody has."""
    address, port, protocol, state, _weight, _ = _BACKEND.unpack(packed)
    if not protocol:
        return None
    backend = Backend(unpack_address(address), int.from_bytes(port, "big"), Protocol(protocol))
    return backend, BackendState(state)


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


def format_frontend(address: bytes, port: int, protocol: Protocol) -> str:
    """``10.96.0.10:53/UDP`` or ``[fd00::1]:53/UDP``."""
    return f"{format_endpoint(address, port)}/{protocol.name}"
