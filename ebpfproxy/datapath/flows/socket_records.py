"""Records of sockets, one at a time: read to be compared with the sockets that there are, and removed.

Programs remove a record themselves when its socket is closed. The program that removes it, at a hook or run
by the agent, also counts the connection down.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from ebpfproxy.datapath.abi import socket_layout
from ebpfproxy.datapath.abi.layout import U64
from ebpfproxy.datapath.flows.origin_table import OriginTable, each_of
from ebpfproxy.datapath.flows.record_programs import RecordPrograms
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.bpf_map import Map
from ebpfproxy.datapath.kernel.maps import MapSet
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
    """Origins of sockets that connect() sent to a backend. ``rest`` is called between batches."""
    for origin in each_of(OriginTable(maps).connected(rest)):
        yield _record(origin, socket_layout.origin_backend(origin))


def closed(maps: MapSet, rest: Callable[[], None] = _NO_REST) -> Iterator[Record]:
    """Origins of closed TCP sockets whose connection goes on, or whose end no program saw."""
    for origin in each_of(OriginTable(maps).closed(rest)):
        yield _record(origin, socket_layout.origin_backend(origin))


def unconnected(maps: MapSet, rest: Callable[[], None] = _NO_REST) -> Iterator[Record]:
    """Origins of unconnected datagram sockets: the first frontend that each has sent to."""
    for origin in each_of(OriginTable(maps).unconnected(rest)):
        yield _record(origin, None)


def _record(origin: bytes, backend: tuple[bytes, int] | None) -> Record:
    identity, cookie = socket_layout.origin_identity(origin), socket_layout.origin_cookie(origin)
    return Record(identity, origin, cookie, socket_layout.origin_netns(origin), backend)


def pages(maps: MapSet, rest: Callable[[], None] = _NO_REST) -> Iterator[Record]:
    """Further frontends of unconnected datagram sockets; some have several records."""
    for key, value in _entries(maps["sock_peers"], rest):
        yield Record(key, value, socket_layout.peers_cookie(key), socket_layout.peers_netns(value), None)


def subflows(maps: MapSet, rest: Callable[[], None] = _NO_REST) -> Iterator[tuple[bytes, bytes]]:
    """Entries of ``mptcp_subflows`` whose subflow has no origin."""
    origins = OriginTable(maps)
    for key, value in _entries(maps["mptcp_subflows"], rest):
        (cookie,) = U64.unpack(value)
        if origins.of(cookie) is None:
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


def forget_origins(programs: RecordPrograms, records: Collection[Record]) -> int:
    """Removes origins; returns how many were there, and were still the same."""
    return programs.forget([record.value for record in records])


def forget_pages(programs: RecordPrograms, records: Collection[Record]) -> int:
    """Removes all pages of the sockets; returns how many there were."""
    return programs.forget_pages(map(socket_layout.unconnected_origin, {record.cookie for record in records}))


def forget_subflow(maps: MapSet, key: bytes, value: bytes) -> bool:
    """Deletes an entry. Returns False if an MPTCP socket of the same address has another subflow by now."""
    table = maps["mptcp_subflows"]
    return table.lookup(key) == value and table.delete(key)
