"""The bytes of what programs remember of flows: conntrack, session affinity, backends that were removed.

The conventions are those of ``layout``.
"""

from __future__ import annotations

import enum
import socket
import struct
import sys
from collections.abc import Iterator
from typing import NamedTuple

from ebpfproxy.datapath.abi.layout import NOBODY, PAIR, U32, U64, pack_address, unpack_address


class RemovalReason(enum.IntEnum):
    """Why a service port lost a backend. Connections to an idle one go on; to an absent one, for a moment."""

    GONE = 1
    IDLE = 2
    #: Its endpoint was removed a moment ago, and may come back.
    ABSENT = 3


class NatFlags(enum.IntFlag):
    REPLY = 1 << 0
    SOURCE = 1 << 1
    HOST = 1 << 2
    BYPASS = 1 << 3
    #: The flow is no Service's (replies to this node's own flow, a host with an address of the Service
    #: network): nothing is translated, and there is no other half.
    OWN = 1 << 4
    #: This host is the client, and bound to the loopback device.
    BOUND = 1 << 5
    #: The client is another, and its replies may need the frontend's route.
    ROUTED = BOUND
    #: Replies do not pass this node: DSR.
    DSR = 1 << 6
    #: The option of DSR had the frontend: what comes in is translated already.
    DSR_BACKEND = 1 << 7


class Seen(enum.IntFlag):
    """What programs have seen of a flow, in either direction."""

    REPLY = 1 << 0
    FIN = 1 << 1
    REPLY_FIN = 1 << 2
    RST = 1 << 3
    #: A program replaces or deletes the entry just now.
    CLAIMED = 1 << 4
    #: A sweep has found it claimed.
    LEFT_1 = 1 << 5
    LEFT_2 = 1 << 6
    #: The flow has a masquerade, with entries of its own.
    MASKED = 1 << 7


AFFINITY_KEY = struct.Struct("=16sII")
AFFINITY = struct.Struct("=IIQ")
FLOW = struct.Struct("=16s16sHHBBxx")
NAT = struct.Struct("=16s16sHHIIBBHQQIIQ")
#: ``struct flow_slot``: a key and a value of ``conntrack``, and a sum. No one but programs reads it.
FLOW_SLOT = struct.Struct(f"={FLOW.size}x{NAT.size}xQ")
#: ``struct flow_hop``: no one but programs reads it.
FLOW_HOP_SIZE = 64
#: ``struct fragment``: source and destination port, and the id that all fragments of a datagram get.
FRAGMENT = struct.Struct("=HHI")
CLASH = struct.Struct("=16sHHI")
#: ``struct sweep``: the time, time-outs, runs, results, and what the program alone uses.
SWEEP = struct.Struct("=Q128q8I40x40x40x80x80x")


class Flow(NamedTuple):
    """``struct flow``, the key of ``conntrack``. Ports in host byte order.

    ``egress``: the packet as it is after this host's routing, not before.
    """

    source: bytes
    destination: bytes
    source_port: int
    destination_port: int
    protocol: int
    egress: bool


class Nat(NamedTuple):
    """``struct nat``. ``last`` and ``created`` are CLOCK_MONOTONIC in nanoseconds.

    ``end`` and ``acked`` are TCP sequence numbers of this direction, both 0 where they are unknown: where its
    data ends, and what it has acknowledged.
    """

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
    end: int = 0
    acked: int = 0


def pack_flow(flow: Flow) -> bytes:
    return FLOW.pack(
        pack_address(flow.source),
        pack_address(flow.destination),
        socket.htons(flow.source_port),
        socket.htons(flow.destination_port),
        flow.protocol,
        flow.egress,
    )


def unpack_flow(packed: bytes) -> Flow:
    source, destination, sport, dport, protocol, stage = FLOW.unpack(packed)
    return Flow(
        unpack_address(source),
        unpack_address(destination),
        socket.ntohs(sport),
        socket.ntohs(dport),
        protocol,
        bool(stage),
    )


_CHECKED_KEY = struct.Struct("=5Q")
_CHECKED_VALUE = struct.Struct("=5QIBxxx8xQ")
_KEY_FACTORS = (0x1B873593, 0x2C1B3C6D, 0x297A2D39, 0x3C6EF363, 0x5BD1E995)
#: The last are of the backend's id, the flags and ``created``.
_VALUE_FACTORS = (0x64E6D7B3, 0x6B43A9B5, 0x7FEB352D, 0x52DCE729, 0x38495AB5, 1 << 8, 1, 0x45D9F3B1)


def with_check(key: bytes, value: bytes | bytearray) -> bytes:
    """The value with the sum by which programs know that they have read the key's own entry.

    ``check_of()`` in entry.h computes the same.
    """
    words = (*_CHECKED_KEY.unpack(key), *_CHECKED_VALUE.unpack_from(value))
    check = sum(word * factor for word, factor in zip(words, _KEY_FACTORS + _VALUE_FACTORS, strict=True))
    return bytes(value[: -U64.size]) + U64.pack(check & 0xFFFFFFFFFFFFFFFF)


def pack_nat(key: bytes, nat: Nat) -> bytes:
    """Packs an entry of no Service for its key: its epoch is 0."""
    value = NAT.pack(
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
        nat.end,
        nat.acked,
        0,
    )
    return with_check(key, value)


def unpack_nat(packed: bytes) -> Nat:
    source, destination, sport, dport, service, backend, flags, seen, _, *rest, _ = NAT.unpack(packed)
    return Nat(
        unpack_address(source),
        unpack_address(destination),
        socket.ntohs(sport),
        socket.ntohs(dport),
        service,
        backend,
        NatFlags(flags),
        Seen(seen),
        *rest,
    )


class BackendUse(NamedTuple):
    """A service port's use of a backend: flows, sockets and ``departures`` have both ids."""

    service_id: int
    backend_id: int


#: What entries of no Service and no backend have.
NO_USE = BackendUse(NOBODY, NOBODY)


_FLOW_PROTOCOL_AT, _FLOW_STAGE_AT = 36, 37
NAT_IDS_AT, _NAT_FLAGS_AT, _NAT_SEEN_AT, _NAT_EPOCH_AT, _NAT_LAST_AT, _NAT_CREATED_AT = (
    36,
    44,
    45,
    46,
    48,
    56,
)
#: What of an entry is another when its flow ends, or its key has another flow: ``seen`` and ``check``, which
#: sums up the key, too.
NAT_STATE = struct.Struct(f"={_NAT_SEEN_AT}xB{NAT.size - _NAT_SEEN_AT - 1 - U64.size}xQ")
_EGRESS = b"\1\0\0"
_BYPASS = int(NatFlags.BYPASS)


_NAT_IDS = struct.Struct(f"={NAT_IDS_AT}xII{NAT.size - NAT_IDS_AT - PAIR.size}x")


def nat_uses(values: memoryview) -> Iterator[tuple[int, int]]:
    """Service id and backend id of each of the packed values of ``conntrack``; a pair equals a BackendUse."""
    return _NAT_IDS.iter_unpack(values)


class Entry(NamedTuple):
    """An entry of ``conntrack`` as it lies in the map, with those fields that a sweep of very many needs.

    :attr:`flow` and :attr:`nat` have all of them. ``flags`` and ``seen`` are NatFlags and Seen as integers;
    times are CLOCK_MONOTONIC in nanoseconds.
    """

    key: bytes
    value: bytes

    @property
    def flow(self) -> Flow:
        return unpack_flow(self.key)

    @property
    def nat(self) -> Nat:
        return unpack_nat(self.value)

    @property
    def protocol(self) -> int:
        return self.key[_FLOW_PROTOCOL_AT]

    @property
    def source(self) -> bytes:
        return unpack_address(self.key[:16])

    @property
    def use(self) -> BackendUse:
        return BackendUse(*PAIR.unpack_from(self.value, NAT_IDS_AT))

    @property
    def flags(self) -> int:
        return self.value[_NAT_FLAGS_AT]

    @property
    def seen(self) -> int:
        return self.value[_NAT_SEEN_AT]

    @property
    def last(self) -> int:
        return int(U64.unpack_from(self.value, _NAT_LAST_AT)[0])

    @property
    def created(self) -> int:
        return int(U64.unpack_from(self.value, _NAT_CREATED_AT)[0])

    @property
    def partner(self) -> bytes:
        """The key of the other half: what this half writes, reversed, at the other stage."""
        key, value = self
        stage = key[_FLOW_STAGE_AT]
        other_stage = stage if value[_NAT_FLAGS_AT] & _BYPASS else not stage
        other = bytes((key[_FLOW_PROTOCOL_AT], other_stage, 0, 0))
        return value[16:32] + value[:16] + value[34:36] + value[32:34] + other

    def with_seen(self, seen: int) -> bytes:
        """The value with these bits of Seen."""
        changed = bytearray(self.value)
        changed[_NAT_SEEN_AT] = seen
        return bytes(changed)

    def with_use(self, use: BackendUse, epoch: int) -> bytes:
        """The value with other ids; ``epoch`` is the service's now."""
        changed = bytearray(self.value)
        PAIR.pack_into(changed, NAT_IDS_AT, *use)
        changed[_NAT_EPOCH_AT : _NAT_EPOCH_AT + 2] = (epoch & 0xFFFF).to_bytes(2, sys.byteorder)
        return with_check(self.key, changed)


def reversed_at_egress(key: bytes) -> bytes:
    """The packed flow of the other direction, where it leaves this host.

    A flow's reply direction has it by the key of its masquerade's original direction, and the reverse.
    """
    protocol = key[_FLOW_PROTOCOL_AT : _FLOW_PROTOCOL_AT + 1]
    return key[16:32] + key[:16] + key[34:36] + key[32:34] + protocol + _EGRESS


def pack_departure(use: BackendUse) -> bytes:
    """Key of ``departures``."""
    return PAIR.pack(*use)


def unpack_departure(packed: bytes) -> BackendUse:
    return BackendUse(*PAIR.unpack(packed))


class ClientKind(enum.IntEnum):
    ADDRESS = 0
    NAMESPACE = 1


class AffinityKey(NamedTuple):
    """``client`` is an address, or a network namespace's cookie where ``kind`` says so."""

    client: bytes | int
    service_id: int
    kind: ClientKind


def unpack_affinity_key(packed: bytes) -> AffinityKey:
    client, service_id, kind = AFFINITY_KEY.unpack(packed)
    if kind == ClientKind.NAMESPACE:
        return AffinityKey(int.from_bytes(client[:8], "big"), service_id, ClientKind.NAMESPACE)
    return AffinityKey(unpack_address(client), service_id, ClientKind.ADDRESS)


def pack_affinity_key(key: AffinityKey) -> bytes:
    client = key.client.to_bytes(8, "big") if isinstance(key.client, int) else pack_address(key.client)
    return AFFINITY_KEY.pack(client, key.service_id, key.kind)


def unpack_affinity(packed: bytes) -> tuple[int, int]:
    """Backend id, and the last choice: CLOCK_MONOTONIC in nanoseconds."""
    backend_id, _, last = AFFINITY.unpack(packed)
    return backend_id, last


def affinity_service(packed: bytes) -> int:
    """The service id in a packed key of ``affinity``."""
    return int(AFFINITY_KEY.unpack(packed)[1])


def with_affinity_service(packed: bytes, service_id: int) -> bytes:
    return packed[:16] + U32.pack(service_id) + packed[20:]


def with_affinity_backend(packed: bytes, backend_id: int) -> bytes:
    return U32.pack(backend_id) + packed[4:]
