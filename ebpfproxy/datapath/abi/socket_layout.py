"""The bytes of what programs remember of sockets: their frontend, and their backend.

The conventions are those of ``layout``.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ebpfproxy.datapath.abi.flow_layout import BackendUse
from ebpfproxy.datapath.abi.layout import PAIR, U32, U64, pack_address, unpack_address

ORIGIN = struct.Struct("=16s16sHHIII")
PEER = struct.Struct("=16s16sHHIII")
PEER_PLACES = 4
PEERS = struct.Struct(f"={PEER_PLACES * PEER.size}sII")
REDIRECT = struct.Struct("=16sHxxxxxxQ")

# -- connected sockets

_ORIGIN_IDS_AT, _ORIGIN_NETNS_AT = 36, 44
_ORIGIN_IDS = struct.Struct("=36xII4x")


def origin_use(packed: bytes) -> BackendUse:
    return BackendUse(*PAIR.unpack_from(packed, _ORIGIN_IDS_AT))


def origin_uses(values: memoryview, count: int) -> Iterator[tuple[int, int]]:
    """Service id and backend id of each origin in a batch; each pair equals a BackendUse."""
    return _ORIGIN_IDS.iter_unpack(values[: count * ORIGIN.size])


def origin_at(keys: memoryview, values: memoryview, place: int) -> tuple[int, bytes]:
    """A socket's cookie, and its packed origin, of a batch of ``sock_origin``."""
    (cookie,) = U64.unpack_from(keys, place * U64.size)
    return cookie, bytes(values[place * ORIGIN.size : (place + 1) * ORIGIN.size])


def origin_backend(packed: bytes) -> tuple[bytes, int]:
    """Address and port that a socket was sent to."""
    return unpack_address(packed[16:32]), int.from_bytes(packed[34:36], "big")


def origin_frontend(packed: bytes) -> tuple[bytes, int]:
    """Address and port that a socket asked for."""
    return unpack_address(packed[:16]), int.from_bytes(packed[32:34], "big")


def with_origin_use(packed: bytes, use: BackendUse) -> bytes:
    """The same origin with other ids."""
    changed = bytearray(packed)
    PAIR.pack_into(changed, _ORIGIN_IDS_AT, *use)
    return bytes(changed)


def origin_netns(packed: bytes) -> int:
    """The lower 32 bits of the cookie of the socket's network namespace."""
    return int(U32.unpack_from(packed, _ORIGIN_NETNS_AT)[0])


# -- unconnected sockets

#: In keys of ``sock_peers`` the highest byte is a page's number, the others are the socket's cookie.
PAGE_SHIFT = 56
_PEER_IDS_AT = 36
#: ``struct peer``: the frontend's port, which is 0 in a free place, and the ids.
_PEER_IDS = struct.Struct("=32xHxxII4x")
_PEERS_NETNS_AT = PEER_PLACES * PEER.size + 4


def peers_cookie(packed: bytes) -> int:
    """The socket's cookie in a key of ``sock_peers``, of whichever page."""
    return int.from_bytes(packed, sys.byteorder) & (1 << PAGE_SHIFT) - 1


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


def with_peer_ids(packed: bytes, change: Callable[[int, int], tuple[int, int, int]]) -> bytes:
    """The same peers with other ids.

    ``change`` gets a peer's service id and backend id, and returns the new ones and the service's epoch.
    """
    changed = bytearray(packed)
    for at in range(0, PEER_PLACES * PEER.size, PEER.size):
        service_id, backend_id = PAIR.unpack_from(changed, at + _PEER_IDS_AT)
        service_id, backend_id, epoch = change(service_id, backend_id)
        struct.pack_into("=III", changed, at + _PEER_IDS_AT, service_id, backend_id, epoch & 0xFFFFFFFF)
    return bytes(changed)


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
