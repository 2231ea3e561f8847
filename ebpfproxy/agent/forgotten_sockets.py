"""Removes records of sockets that were closed, or connected to something else, unseen by any program.

Programs see the end of applications' sockets only. They do not see it of the kernel's own (NFS, SMB, Ceph),
nor of one that was closed while the maps were copied; nor do they see that a socket was disconnected, or
could not reach what it asked for last. Such a record would stay, and its connection would be counted, for
ever.

So records are compared with the sockets that sock_diag lists. A record is removed once its socket was missing
twice in a row: between its hook and its connection a socket may be missing once. A socket counts as missing
only if its network namespace can be listed or is gone; records of namespaces that cannot be found stay.
"""

from __future__ import annotations

import errno
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path

from ebpfproxy.datapath.flows import socket_records
from ebpfproxy.datapath.flows.record_programs import RecordPrograms
from ebpfproxy.datapath.flows.socket_records import Record
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.logs import get_logger
from ebpfproxy.netlink.namespace_ids import NamespaceIds
from ebpfproxy.netlink.namespaces import OWN, cookie_of, namespaces, netlink_in
from ebpfproxy.netlink.sock_diag import Connected, Peer, sockets_in
from ebpfproxy.services.model import Protocol

log = get_logger(__name__)

_NETLINK_ROUTE = 0
_UDPLITE = 136
#: How many records are compared at a time: this bounds the memory it takes.
_AT_ONCE = 1 << 16


class ForgottenSockets:
    """Compares records with sockets. One thread uses it."""

    def __init__(self, maps: MapSet, *, measures_traffic: bool) -> None:
        self._maps = maps
        self._measures_traffic = measures_traffic
        #: Programs of an earlier agent may have left records of closed sockets, until a sweep finds none.
        self._may_have_closed = True
        #: Keys and values of records whose socket was missing at the previous sweep, by kind.
        self._missing: dict[str, dict[bytes, bytes]] = {}
        #: Ids of the namespaces that have been seen, by the lower half of their cookie.
        self._known: dict[int, int] = {}
        #: These three are the running sweep's: paths of namespaces that can be listed, namespaces that are
        #: gone, and namespaces of records.
        self._paths: dict[int, Path] = {}
        self._gone: set[int] = set()
        self._asked: set[int] = set()

    def sweep(self, programs: RecordPrograms) -> Mapping[str, int]:
        """Removes records whose socket was missing at the previous sweep, too; returns how many, by map.

        It takes long if there are many, and should run in a thread of its own.
        """
        self._look_around()
        maps = self._maps
        removed: Counter[str] = Counter()
        # Pages are removed first: the program that forgets an unconnected socket would take them with it.
        removed["sock_peers"] = socket_records.forget_pages(
            programs, self._forgotten("pages", socket_records.pages(maps, _rest))
        )
        for kind, records in (
            ("connected", socket_records.connected(maps, _rest)),
            ("closed", self._closed()),
            ("unconnected", socket_records.unconnected(maps, _rest)),
        ):
            removed["sock_origin"] += socket_records.forget_origins(programs, self._forgotten(kind, records))
        removed["mptcp_subflows"] = self._sweep_subflows()
        for netns in self._gone - self._asked:
            del self._known[netns]
        return removed

    def _closed(self) -> Iterator[Record]:
        if self._may_have_closed:
            self._may_have_closed = self._measures_traffic
            for record in socket_records.closed(self._maps, _rest):
                self._may_have_closed = True
                yield record

    def _forgotten(self, kind: str, records: Iterator[Record]) -> list[Record]:
        """Those of the records whose socket is missing, and was at the previous sweep."""
        missing, forgotten = {}, []
        known = self._missing.get(kind, {})
        while some := list(islice(records, _AT_ONCE)):
            for record in self._without_socket(some):
                if known.get(record.key) == record.value:
                    forgotten.append(record)
                else:
                    missing[record.key] = record.value
        self._missing[kind] = missing
        return forgotten

    def _sweep_subflows(self) -> int:
        missing, removed = {}, 0
        known = self._missing.get("subflows", {})
        for key, value in socket_records.subflows(self._maps, _rest):
            if known.get(key) != value:
                missing[key] = value
            else:
                removed += socket_records.forget_subflow(self._maps, key, value)
        self._missing["subflows"] = missing
        return removed

    # -- namespaces

    def _look_around(self) -> None:
        """Finds the namespaces that can be listed now, and those of earlier sweeps that are gone."""
        self._paths.clear()
        self._asked.clear()
        self._gone = set()
        try:
            with NamespaceIds() as ids:
                for path in namespaces():
                    # It may be gone by now.
                    with suppress(OSError):
                        self._see(path, ids)
                living = ids.all()
        except OSError as error:
            log.warning(
                "failed to list network namespaces, keeping records of unknown ones", error=str(error)
            )
            return
        # The id of a namespace that is gone may be another's by now.
        holders = {self._known[netns]: netns for netns in self._paths if netns in self._known}
        self._gone = {
            netns
            for netns, number in self._known.items()
            if number not in living or holders.get(number, netns) != netns
        }

    def _see(self, path: Path, ids: NamespaceIds) -> None:
        with netlink_in(path, _NETLINK_ROUTE) as probe:
            netns = cookie_of(probe) & 0xFFFFFFFF
        self._paths[netns] = path
        if path != OWN and (number := ids.id_of(path)) is not None:
            self._known[netns] = number

    # -- sockets

    def _without_socket(self, records: Iterable[Record]) -> Iterator[Record]:
        by_netns: dict[int, list[Record]] = {}
        for record in records:
            by_netns.setdefault(record.netns, []).append(record)
        self._asked |= by_netns.keys()
        for netns, mine in by_netns.items():
            path = self._paths.get(netns)
            if path is None:
                if netns in self._gone:
                    yield from mine
                continue
            try:
                found = self._sockets_of(path, mine)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ESRCH, errno.EINVAL):
                    log.warning(
                        "failed to list sockets of a network namespace, keeping its records",
                        namespace=str(path),
                        error=str(error),
                    )
                continue
            for record in mine:
                socket = found.get(record.cookie)
                if socket is None or record.backend not in (None, (socket.peer.address, socket.peer.port)):
                    yield record

    def _sockets_of(self, path: Path, records: list[Record]) -> dict[int, Connected]:
        """The sockets that are there, by cookie. Either all records are of connected sockets, or none is."""
        wanted: dict[int, dict[int, Record]] = {}
        peers: dict[int, set[Peer]] = {}
        for record in records:
            if record.backend is None:
                protocols: tuple[int, ...] = (Protocol.UDP, _UDPLITE)
            else:
                backend = socket_records.backend_of(self._maps, record)
                protocols = (backend.protocol,) if backend else (Protocol.TCP, Protocol.UDP)
            for protocol in protocols:
                wanted.setdefault(protocol, {})[record.cookie] = record
                if record.backend is not None:
                    peers.setdefault(protocol, set()).add(Peer(*record.backend, protocol))
        found: dict[int, Connected] = {}
        for protocol, cookies in wanted.items():
            try:
                found |= sockets_in(path, protocol, cookies.keys(), peers.get(protocol))
            except OSError as error:
                # Newer kernels have no UDP-Lite.
                if protocol != _UDPLITE or error.errno != errno.ENOENT:
                    raise
        return found


def _rest() -> None:
    time.sleep(0)
