"""Records of sockets, one at a time: read to be compared with the sockets that there are, and deleted.

Programs delete a record themselves when its socket is closed. The one that deletes it, program or agent, also
counts the connection down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from ebpfproxy.datapath.abi import socket_layout
from ebpfproxy.datapath.abi.layout import U64
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.maps import Map, MapSet
from ebpfproxy.services.model import Backend

SOCKET_MAPS = ("sock_origin", "sock_peers", "mptcp_subflows")
#: Entries a system call. Small: a batch in Python holds up the reconciler's thread.
_BATCH = 512
_NO_REST: Callable[[], None] = lambda: None  # noqa: E731


class Record(NamedTuple):
    """``key`` and ``value`` as packed; ``netns`` is the lower half of the namespace's cookie.

    ``backend`` is None for a socket that is not connected.
    """

    key: bytes
    value: bytes
    cookie: int
    netns: int
    backend: tuple[bytes, int] | None


def connected(maps: MapSet, rest: Callable[[], None] = _NO_REST) -> Iterator[Record]:
    """Records of sockets that connect() sent to a backend. ``rest`` is called between batches."""
    for key, value in _entries(maps["sock_origin"], rest):
        (cookie,) = U64.unpack(key)
        yield Record(
            key, value, cookie, socket_layout.origin_netns(value), socket_layout.origin_backend(value)
        )


def unconnected(maps: MapSet, rest: Callable[[], None] = _NO_REST) -> Iterator[Record]:
    """Records of unconnected datagram sockets that have sent to frontends; some have several records."""
    for key, value in _entries(maps["sock_peers"], rest):
        yield Record(key, value, socket_layout.peers_cookie(key), socket_layout.peers_netns(value), None)


def subflows(maps: MapSet, rest: Callable[[], None] = _NO_REST) -> Iterator[tuple[bytes, bytes]]:
    """Entries of ``mptcp_subflows`` whose subflow has no record."""
    origins = maps["sock_origin"]
    for key, value in _entries(maps["mptcp_subflows"], rest):
        if origins.lookup(value) is None:
            yield key, value


def _entries(table: Map, rest: Callable[[], None]) -> Iterator[tuple[bytes, bytes]]:
    key_size, value_size = table.spec.key_size, table.spec.value_size
    for keys, values, count in bpf.map_lookup_batches(table.fd, key_size, value_size, _BATCH):
        for i in range(count):
            yield (
                bytes(keys[i * key_size : (i + 1) * key_size]),
                bytes(values[i * value_size : (i + 1) * value_size]),
            )
        rest()


def backend_of(maps: MapSet, record: Record) -> Backend | None:
    """The backend with its protocol; None if its id is another's by now, or counts for none."""
    _, number = socket_layout.origin_use(record.value)
    known = maps.backends().read(number)
    return known[0] if known and (known[0].address, known[0].port) == record.backend else None


def forget_connected(maps: MapSet, record: Record) -> bool:
    """Deletes a record. Returns False if it is gone, or if its socket has another one by now."""
    origins = maps["sock_origin"]
    found = bpf.map_take(origins.fd, record.key, origins.spec.value_size)
    if found is None:
        return False
    if found != record.value and bpf.map_add(origins.fd, record.key, found):
        return False
    _, number = socket_layout.origin_use(found)
    loads = maps.loads()
    if number < len(loads):
        loads.carry(number, -1)
    return True


def forget_unconnected(maps: MapSet, record: Record) -> bool:
    return maps["sock_peers"].delete(record.key)


def forget_subflow(maps: MapSet, key: bytes, value: bytes) -> bool:
    """Deletes an entry. Returns False if an MPTCP socket of the same address has another subflow by now."""
    table = maps["mptcp_subflows"]
    return table.lookup(key) == value and table.delete(key)
