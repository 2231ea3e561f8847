"""The bytes of what programs remember of sockets: their frontend, and their backend.

The conventions are those of ``layout``.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

from ebpfproxy.datapath.abi.flow_layout import BackendUse
from ebpfproxy.datapath.abi.layout import NOBODY, PAIR, U32, pack_address, unpack_address

PEER = struct.Struct("=16s16sHHIII")
ORIGIN = struct.Struct(f"=Q{PEER.size}sII")
PEER_PLACES = 4
PEERS = struct.Struct(f"={PEER_PLACES * PEER.size}sII")
REDIRECT = struct.Struct("=16sHxxxxxxQ")

#: The backend id of a connected datagram socket whose backend has none. NOBODY would not tell the protocol,
#: which a record has by its backend only.
DATAGRAM_NOBODY = NOBODY - 1

# -- the first frontend of a socket

#: Keys of origins and of ``sock_peers`` are the socket's cookie, but for the highest byte: a kind, or a page.
COOKIE_BITS = 56


class OriginKind(IntEnum):
    """``enum origin_kind``: what a slot of ``sock_origin`` has; 0 for a free one."""

    RESERVED = 1
    CONNECTED = 2
    UNCONNECTED = 3
    CLOSED = 4


ORIGIN_KIND_AT = 7 if sys.byteorder == "little" else 0
ORIGIN_IDS_AT, _ORIGIN_NETNS_AT = 44, 56
_ORIGIN_IDS = struct.Struct("=44xII12x")
#: The frontend's port, which is 0 where the socket's program has dropped the peer, and the ids.
_ORIGIN_PEER = struct.Struct("=40xHxxII12x")


_ORIGIN_FRONTEND = struct.Struct("=8x16s16x2sxxII12x")


def origin_uses(origins: bytes) -> Iterator[tuple[int, int]]:
    """Service id and backend id of each of the packed origins; each pair equals a BackendUse."""
    return _ORIGIN_IDS.iter_unpack(origins)


def origin_frontends(origins: bytes) -> Iterator[tuple[bytes, bytes, int, int]]:
    """Address and port that sockets asked for, both as they are packed, with the same ids."""
    return _ORIGIN_FRONTEND.iter_unpack(origins)


def unconnected_uses(origins: bytes) -> Iterator[tuple[int, int]]:
    """The same of unconnected sockets, without peers that were dropped."""
    return ((service, backend) for port, service, backend in _ORIGIN_PEER.iter_unpack(origins) if port)


def split_origins(origins: bytes) -> Iterator[bytes]:
    return (origins[at : at + ORIGIN.size] for at in range(0, len(origins), ORIGIN.size))


def origin_cookie(packed: bytes) -> int:
    """The socket's cookie, without its highest byte."""
    return int.from_bytes(packed[:8], sys.byteorder) & (1 << COOKIE_BITS) - 1


def origin_key(cookie: int, kind: OriginKind) -> bytes:
    return (cookie | kind << COOKIE_BITS).to_bytes(8, sys.byteorder)


def unconnected_origin(cookie: int) -> bytes:
    """A packed origin that names an unconnected socket, and no peer."""
    return origin_key(cookie, OriginKind.UNCONNECTED).ljust(ORIGIN.size, b"\0")


def origin_use(packed: bytes) -> BackendUse:
    return BackendUse(*PAIR.unpack_from(packed, ORIGIN_IDS_AT))


def origin_backend(packed: bytes) -> tuple[bytes, int]:
    """Address and port that a socket was sent to."""
    return unpack_address(packed[24:40]), int.from_bytes(packed[42:44], "big")


def origin_frontend(packed: bytes) -> tuple[bytes, int]:
    """Address and port that a socket asked for; port 0 while its program writes the origin."""
    return unpack_address(packed[8:24]), int.from_bytes(packed[40:42], "big")


def is_connected(packed: bytes) -> bool:
    return packed[ORIGIN_KIND_AT] == OriginKind.CONNECTED


def origin_identity(packed: bytes) -> bytes:
    """What distinguishes an origin from the socket's others, and earlier ones: its key, and its addresses."""
    return packed[:ORIGIN_IDS_AT]


def origin_began(packed: bytes) -> int:
    """When a TCP socket began to connect, as programs have it; 0 where none of them follows it."""
    return int(U32.unpack_from(packed, ORIGIN_IDS_AT + PAIR.size)[0])


def with_origin_ids(packed: bytes, use: BackendUse, epoch: int) -> bytes:
    """The same origin with other ids; ``epoch``: or, of a TCP socket, when it began."""
    changed = bytearray(packed)
    struct.pack_into("=III", changed, ORIGIN_IDS_AT, *use, epoch & 0xFFFFFFFF)
    return bytes(changed)


def origin_netns(packed: bytes) -> int:
    """The lower 32 bits of the cookie of the socket's network namespace."""
    return int(U32.unpack_from(packed, _ORIGIN_NETNS_AT)[0])


# -- further frontends of unconnected sockets

#: ``struct peer``: the frontend's port, which is 0 in a free place, and the ids.
_PEER_IDS = struct.Struct("=32xHxxII4x")
_PEERS_NETNS_AT = PEER_PLACES * PEER.size + 4


def peers_cookie(packed: bytes) -> int:
    """The socket's cookie in a key of ``sock_peers``, of whichever page."""
    return int.from_bytes(packed, sys.byteorder) & (1 << COOKIE_BITS) - 1


def peer_uses(values: memoryview, count: int) -> Iterator[tuple[int, int]]:
    """Service id and backend id of all peers of the sockets in a batch; each pair equals a BackendUse."""
    for start in range(0, count * PEERS.size, PEERS.size):
        for port, service_id, backend_id in _PEER_IDS.iter_unpack(
            values[start : start + PEER_PLACES * PEER.size]
        ):
            if port:
                yield service_id, backend_id


def peers_netns(packed: bytes) -> int:
    """The same as :func:`origin_netns`."""
    return int(U32.unpack_from(packed, _PEERS_NETNS_AT)[0])


def peers_as_origins(key: bytes, value: bytes) -> Iterator[bytes]:
    """The peers in an entry of ``sock_peers``, each as the packed origin that a socket's first one is."""
    head = origin_key(peers_cookie(key), OriginKind.UNCONNECTED)
    tail = ORIGIN.pack(0, bytes(PEER.size), peers_netns(value), 0)[_ORIGIN_NETNS_AT:]
    for at in range(0, PEER_PLACES * PEER.size, PEER.size):
        origin = head + value[at : at + PEER.size] + tail
        if origin_frontend(origin)[1]:
            yield origin


# -- connected datagram sockets whose backend is gone


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
