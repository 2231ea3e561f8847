"""The bytes of what programs remember: flows, sockets, clients that stay, and backends that have left.

As ``layout``, of which this is a part.
"""

from __future__ import annotations

import enum
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ebpfproxy.datapath.abi.layout import PAIR, U32, pack_address, unpack_address


class Departure(enum.IntEnum):
    """Why a backend has left a service: of an idle one connections go on, of an absent one for the moment."""

    GONE = 1
    IDLE = 2
    #: Its endpoint was removed a moment ago, and may come back.
    ABSENT = 3


class NatFlags(enum.IntFlag):
    REPLY = 1 << 0
    SOURCE = 1 << 1
    HOST = 1 << 2
    BYPASS = 1 << 3
    #: Of no Service (answers to this node's own flow, a host with an address of the Service network): nothing
    #: is translated, and there is no other half.
    OWN = 1 << 4
    #: The client, of the host itself, is bound to the loopback device.
    BOUND = 1 << 5


class Seen(enum.IntFlag):
    """What both directions of a flow have shown."""

    REPLY = 1 << 0
    FIN = 1 << 1
    REPLY_FIN = 1 << 2
    RST = 1 << 3


AFFINITY_KEY = struct.Struct("=16sII")
AFFINITY = struct.Struct("=IIQ")
FLOW = struct.Struct("=16s16sHHBBxx")
NAT = struct.Struct("=16s16sHHIIBBHQQII")
PEER = struct.Struct("=16s16sHHIII")
PEER_PLACES = 4
PEERS = struct.Struct(f"={PEER_PLACES * PEER.size}sII")
#: ``struct fragment``: source and destination port, and the id that all fragments of a datagram get.
FRAGMENT = struct.Struct("=HHI")
CLASH = struct.Struct("=16sHHI")
REDIRECT = struct.Struct("=16sHxxxxxxQ")


class Flow(NamedTuple):
    """``struct flow``. ``egress``: the packet as it is after this host's routing, not before."""

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


def pack_nat(nat: Nat) -> bytes:
    """Of no epoch: for what is no Service's."""
    return NAT.pack(
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
    )


def unpack_nat(packed: bytes) -> Nat:
    source, destination, sport, dport, service, backend, flags, seen, _, *rest = NAT.unpack(packed)
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


_NAT_IDS_AT, _NAT_FLAGS_AT, _NAT_EPOCH_AT = 36, 44, 46
ORIGIN_IDS_AT, _ORIGIN_NETNS_AT, ORIGIN_SIZE = 36, 44, 48


def nat_ids(packed: bytes) -> tuple[int, int]:
    """Service id and backend id of a packed conntrack value."""
    service_id, backend_id = PAIR.unpack_from(packed, _NAT_IDS_AT)
    return service_id, backend_id


def is_own(packed: bytes) -> bool:
    """Whether a packed conntrack value is of no Service."""
    return bool(packed[_NAT_FLAGS_AT] & NatFlags.OWN)


def with_nat_ids(packed: bytes, service_id: int, backend_id: int, epoch: int) -> bytes:
    """The same value for other ids; ``epoch`` is the service's now."""
    changed = bytearray(packed)
    PAIR.pack_into(changed, _NAT_IDS_AT, service_id, backend_id)
    changed[_NAT_EPOCH_AT : _NAT_EPOCH_AT + 2] = (epoch & 0xFFFF).to_bytes(2, sys.byteorder)
    return bytes(changed)


def partner_key(flow: bytes, nat: bytes) -> bytes:
    """The key of a packed entry's other half: what this half writes, reversed, at the other stage."""
    protocol, stage, flags = flow[36], flow[37], nat[44]
    other_stage = stage if flags & NatFlags.BYPASS else not stage
    return nat[16:32] + nat[:16] + nat[34:36] + nat[32:34] + bytes((protocol, other_stage, 0, 0))


def pack_departure(service_id: int, backend_id: int) -> bytes:
    return PAIR.pack(service_id, backend_id)


def unpack_departure(packed: bytes) -> tuple[int, int]:
    """Service id and backend id."""
    service_id, backend_id = PAIR.unpack(packed)
    return service_id, backend_id


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


def origin_ids(packed: bytes) -> tuple[int, int]:
    """Service id and backend id of a socket's origin."""
    service_id, backend_id = PAIR.unpack_from(packed, ORIGIN_IDS_AT)
    return service_id, backend_id


def origin_backend(packed: bytes) -> tuple[bytes, int]:
    """Address and port that a socket was sent to."""
    return unpack_address(packed[16:32]), int.from_bytes(packed[34:36], "big")


def with_origin_ids(packed: bytes, service_id: int, backend_id: int) -> bytes:
    changed = bytearray(packed)
    PAIR.pack_into(changed, ORIGIN_IDS_AT, service_id, backend_id)
    return bytes(changed)


def origin_netns(packed: bytes) -> int:
    """The lower 32 bits of the cookie of the socket's network namespace."""
    return int(U32.unpack_from(packed, _ORIGIN_NETNS_AT)[0])


# -- unconnected sockets

#: In keys of ``sock_peers`` the highest byte is a page's number, the others are the socket's cookie.
PAGE_SHIFT = 56
_PEER_PORT_AT, _PEER_IDS_AT = 32, 36
_PEERS_NETNS_AT = PEER_PLACES * PEER.size + 4


def peers_cookie(packed: bytes) -> int:
    """The socket's cookie in a key of ``sock_peers``, of whichever page."""
    return int.from_bytes(packed, sys.byteorder) & (1 << PAGE_SHIFT) - 1


def peer_ids(packed: bytes) -> Iterator[bytes]:
    """Service and backend ids of all peers of a socket, each pair packed as a key of ``departures``."""
    for at in range(0, PEER_PLACES * PEER.size, PEER.size):
        if packed[at + _PEER_PORT_AT : at + _PEER_PORT_AT + 2] != b"\0\0":
            yield packed[at + _PEER_IDS_AT : at + _PEER_IDS_AT + 8]


def peers_netns(packed: bytes) -> int:
    """As :func:`origin_netns`."""
    return int(U32.unpack_from(packed, _PEERS_NETNS_AT)[0])


def with_peer_ids(packed: bytes, change: Callable[[int, int], tuple[int, int, int]]) -> bytes:
    """The same peers with other ids: ``change`` gets a peer's service and backend, and gives their new ids
    and the service's epoch."""
    changed = bytearray(packed)
    for at in range(0, PEER_PLACES * PEER.size, PEER.size):
        service_id, backend_id = PAIR.unpack_from(changed, at + _PEER_IDS_AT)
        service_id, backend_id, epoch = change(service_id, backend_id)
        struct.pack_into("=III", changed, at + _PEER_IDS_AT, service_id, backend_id, epoch & 0xFFFFFFFF)
    return bytes(changed)


class Redirect(NamedTuple):
    """``struct redirect``: what a connected datagram socket had asked for. Ports in host byte order."""

    frontend: bytes
    frontend_port: int
    cookie: int


def pack_redirect(redirect: Redirect) -> bytes:
    return REDIRECT.pack(
        pack_address(redirect.frontend), socket.htons(redirect.frontend_port), redirect.cookie
    )


def unpack_redirect(packed: bytes) -> Redirect:
    frontend, port, cookie = REDIRECT.unpack(packed)
    return Redirect(unpack_address(frontend), socket.ntohs(port), cookie)


def origin_frontend(packed: bytes) -> tuple[bytes, int]:
    """Address and port that a socket asked for."""
    return unpack_address(packed[:16]), int.from_bytes(packed[32:34], "big")
