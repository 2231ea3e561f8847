"""Copies flows to maps of other sizes, so that connections outlive the change.

Maps of another size are other maps (``kernel.maps``), with service and backend ids of their own. Conntrack,
records of sockets and session affinity are copied, with their ids translated by name and address: before
programs are swapped, and again while they are, for what begins meanwhile. Copying a large table takes a
second, in which connections begin: so what is copied is not looked at again unless it has changed, and
copies follow one another until one has next to nothing to do. Within the milliseconds that this last one and
the swap take, segments of connections that are not copied yet are dropped, and sent again
(``DeviceFlags.MIGRATING_FLOWS``); a datagram's flow may be lost if it begins then, and passes programs of
both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import starmap
from pathlib import Path

from ebpfproxy.datapath.abi import flow_layout, socket_layout
from ebpfproxy.datapath.abi.flow_layout import NAT_STATE, NO_USE, BackendUse, Entry, Seen
from ebpfproxy.datapath.abi.layout import NOBODY, NSEC_PER_SEC, U32, U64, known_names
from ebpfproxy.datapath.abi.schema import FLOW_MARKS, SCHEMA_VERSION
from ebpfproxy.datapath.abi.socket_layout import DATAGRAM_NOBODY
from ebpfproxy.datapath.flows.origin_table import OriginTable, each_of
from ebpfproxy.datapath.flows.record_programs import RecordPrograms
from ebpfproxy.datapath.kernel.bpf_map import Map
from ebpfproxy.datapath.kernel.libbpf import BpfError
from ebpfproxy.datapath.kernel.maps import MapSet, open_pinned
from ebpfproxy.services.model import Family, Protocol, ServicePortKey

_AS_THEY_ARE = ("fragments", "port_clashes", "sock_redirects", "mptcp_subflows")
#: All that is read here, and by ``services.former``. A change of any of their structs raises SCHEMA_VERSION.
_READ = frozenset(
    {
        *_AS_THEY_ARE,
        "affinity",
        "backends",
        "conntrack",
        "departures",
        "drained",
        "epochs",
        "flow_filter",
        "fragment_ids",
        "service_names",
        "backend_filter",
        "backend_ports",
        "selections",
        "slots",
        "sock_origin",
        "sock_origin_overflow",
        "sock_peers",
    }
)
#: A copy of so few entries takes no longer than the swap of programs.
_FEW = 64
#: Bits of an entry that are about its element.
_CLAIMS = Seen.CLAIMED | Seen.LEFT_1 | Seen.LEFT_2
#: Connections begin at any rate, and a swap cannot wait for a pause for ever.
_MOST_COPIES = 20


class _Source:
    """Maps of another size, and what has been copied from them."""

    def __init__(self, old: MapSet, new: MapSet) -> None:
        self.maps = old
        #: Ids in the new maps by those in the old ones.
        self.services, self.backends = _service_ids(old, new), _backend_ids(old, new)
        #: Keys that have been copied, or need not be, by the map's name.
        self.looked_at: dict[str, set[bytes]] = {}
        #: The same of flows, by their state then: see ``Map.changed``.
        self.flows: set[int] = set()
        #: Packed origins that have been copied, as they were written, by their identity.
        self.origins: dict[bytes, bytes] = {}

    def backend_of_socket(self, old: int) -> int:
        """The id in the new maps of a connected socket's backend."""
        if (new := self.backends.get(old)) is not None:
            return new
        known = self.maps.backends().read(old)
        is_datagram = old == DATAGRAM_NOBODY or (known and known[0].protocol is Protocol.UDP)
        return DATAGRAM_NOBODY if is_datagram else NOBODY


class MapMigration:
    """Copies what is not there yet, as often as :meth:`copy` is called. Close it.

    Entries of Services or backends without an id in the new maps are not copied. ``services.former`` names
    those that are gone, so that they have one.
    """

    def __init__(self, pins: Path, maps: MapSet, programs: RecordPrograms) -> None:
        """``programs`` are those for ``maps``."""
        self._new = maps
        self._programs = programs
        self._sources = [_Source(old, maps) for old in other_maps(pins, maps)]
        #: True as long as no program uses the new maps: this process has made them, and copies first.
        self._is_unused = not maps.adopted
        #: Conntrack entries so far.
        self.copied = 0
        for source in self._sources:
            _copy_fragment_ids(source.maps, maps)
            _merge_backends(source.maps, maps)

    @property
    def has_others(self) -> bool:
        """True if there is something to copy from."""
        return bool(self._sources)

    def copy(self) -> None:
        for source in self._sources:
            self._copy(source)
            self._copy_origins(source)

    def catch_up(self) -> None:
        """Copies flows until there are few that are new: to be called right before programs are swapped."""
        former = None
        for _ in range(_MOST_COPIES):
            before = self.copied
            for source in self._sources:
                self._copy(source)
            found = self.copied - before
            # More copies find no fewer: as many flows begin during each of them.
            if found <= _FEW or (former is not None and found >= former):
                return
            former = found

    def _copy(self, source: _Source) -> None:
        """Copies all but records of sockets."""
        old, new, entries, now = source.maps, self._new, {}, set[int]()
        epochs = new.shared("epochs").words()
        for entry in starmap(Entry, old["conntrack"].changed(NAT_STATE, source.flows, now)):
            value = entry.value
            if entry.use != NO_USE:
                service = source.services.get(entry.use.service_id)
                # Flows of DSR at the backend's node have a Service, but no backend.
                is_dsr_backend = entry.use.backend_id == NO_USE.backend_id
                backend = NO_USE.backend_id if is_dsr_backend else source.backends.get(entry.use.backend_id)
                if service is None or backend is None:
                    continue
                use = BackendUse(service, backend)
                # An epoch before the current one has the flow ask if its backend has been removed, and if
                # its frontend is its Service's still.
                value = entry.with_use(use, epochs[service] - 1)
            entries[entry.key] = value
        if entries:
            # Programs look for an entry only where the filter says so.
            _merge_filters(old, new)
            self.copied += self._put_flows(new["conntrack"], list(starmap(Entry, entries.items())))
        source.flows, self._is_unused = now, False
        self._copy_affinity(source)
        for name in _AS_THEY_ARE:
            new[name].update_many(dict(_unseen(source, new, name)))

    def _put_flows(self, flows: Map, entries: list[Entry]) -> int:
        """Returns how many were not there. A batch is faster, but replaces what programs have written."""
        if self._is_unused:
            written = {each.key: _unclaimed(each).value for each in entries}
            return len(written) - len(flows.update_many(written))
        return sum(_put_flow(flows, each) for each in entries)

    def _copy_origins(self, source: _Source) -> None:
        """A socket whose backend is gone keeps its frontend's address, and is counted for no backend.

        Traffic of its connection is still counted for its Service, if that is there. A connected datagram
        socket is redirected or closed after that: see ``flows.origins``.
        If it is an unconnected one, it still gets its replies, and chooses anew when it sends.
        """
        epochs = self._new.shared("epochs").words()
        copied = source.origins
        removed = {flow_layout.unpack_departure(key) for key, _ in source.maps["departures"].items()}

        def translate(origin: bytes) -> bytes:
            use = socket_layout.origin_use(origin)
            service = source.services.get(use.service_id, NOBODY)
            if socket_layout.is_connected(origin):
                began = 0 if service == NOBODY else socket_layout.origin_began(origin)
                now = BackendUse(service, source.backend_of_socket(use.backend_id))
                return socket_layout.with_origin_ids(origin, now, began)
            backend = source.backends.get(use.backend_id, NOBODY)
            if use in removed or NOBODY in (service, backend):
                return socket_layout.with_origin_ids(origin, NO_USE, 0)
            # An epoch before the current one has the socket ask if its backend has been removed. Programs
            # compare its frontend's Service each time.
            return socket_layout.with_origin_ids(origin, BackendUse(service, backend), epochs[service] - 1)

        there = {socket_layout.origin_identity(origin): origin for origin in _origins(source.maps)}
        # A socket that has no record in the old maps any more has been closed. A connected one that has
        # another has connected again: what it had is removed first, as a program restores no second one.
        living = {socket_layout.origin_cookie(origin) for origin in there.values()}
        over = [identity for identity in copied if identity not in there]
        closed = [copied.pop(identity) for identity in over]
        self._programs.forget(
            [
                origin
                for origin in closed
                if socket_layout.is_connected(origin) or socket_layout.origin_cookie(origin) not in living
            ]
        )
        made = {identity: translate(origin) for identity, origin in there.items() if identity not in copied}
        self._programs.restore(made.values())
        copied |= made

    def _copy_affinity(self, source: _Source) -> None:
        old, entries = source.maps["affinity"], {}
        # Its keys have ids: one of the old maps says nothing about the same one of the new maps.
        seen = source.looked_at.setdefault("affinity", set())
        for key in old.keys() - seen:
            seen.add(key)
            value = old.lookup(key)
            if value is None:
                continue
            service = source.services.get(flow_layout.affinity_service(key))
            backend = source.backends.get(flow_layout.unpack_affinity(value)[0])
            if service is not None and backend is not None:
                now = flow_layout.with_affinity_service(key, service)
                if self._new["affinity"].lookup(now) is None:
                    entries[now] = flow_layout.with_affinity_backend(value, backend)
        self._new["affinity"].update_many(entries)

    def close(self) -> None:
        while self._sources:
            self._sources.pop().maps.close()


def copy_drain_requests(pins: Path, maps: MapSet) -> None:
    """Copies drain requests to maps of this size, before anything is programmed."""
    for old in other_maps(pins, maps):
        maps["drained"].update_many(dict(_missing(old, maps, "drained")))
        old.close()


def other_maps(pins: Path, maps: MapSet) -> list[MapSet]:
    """Those of other sizes that are pinned here. Close them."""
    return [old for folder in pins.glob(f"v{SCHEMA_VERSION}-*") if (old := _other(folder, maps))]


def _other(folder: Path, maps: MapSet) -> MapSet | None:
    """The maps of another layout with the same structs, None for anything else."""
    if folder == maps.folder or not (folder / "maps").is_dir():
        return None
    try:
        old = open_pinned(folder)
    except BpfError:
        return None
    if old.maps.keys() >= _READ:
        return old
    old.close()
    return None


def _missing(old: MapSet, new: MapSet, name: str) -> Iterator[tuple[bytes, bytes]]:
    present = {key for key, _ in new[name].items()}
    return ((key, value) for key, value in old[name].items() if key not in present)


def _unseen(source: _Source, new: MapSet, name: str) -> Iterator[tuple[bytes, bytes]]:
    """The same without those that an earlier call has given."""
    old = source.maps[name]
    if name not in source.looked_at:
        seen = source.looked_at[name] = new[name].keys()
        for key, value in old.items():
            if key not in seen:
                seen.add(key)
                yield key, value
        return
    seen = source.looked_at[name]
    for key in old.keys() - seen:
        seen.add(key)
        found = old.lookup(key)
        # A program for the new maps may have made the same flow by now.
        if found is not None and new[name].lookup(key) is None:
            yield key, found


def _put_flow(flows: Map, entry: Entry) -> bool:
    """Writes an entry, unless what is there is of a later flow. True if there was none.

    Programs for the new maps may write meanwhile: only what is there now counts.
    """
    entry = _unclaimed(entry)
    if flows.add(entry.key, entry.value):
        return True
    value = flows.lookup(entry.key)
    if value is None:
        return False
    known = Entry(entry.key, value)
    if entry.created > known.created:
        flows.update_many({entry.key: entry.value})
    elif (
        entry.created == known.created
        and not known.seen & Seen.CLAIMED
        # If an agent that has copied the flow was killed, programs for the old maps have gone on since.
        and (entry.seen & ~known.seen or entry.last > known.last + NSEC_PER_SEC)
    ):
        later = known if known.last >= entry.last else entry
        flows.update_many({entry.key: later.with_seen(entry.seen | known.seen)})
    return False


def _unclaimed(entry: Entry) -> Entry:
    """Whichever program is about to replace an entry, it does so in its own map only."""
    return Entry(entry.key, entry.with_seen(entry.seen & ~_CLAIMS))


def nameless(number: int) -> ServicePortKey:
    """Stands for a Service that is gone, by its id in other maps, while its connections are copied."""
    return ServicePortKey("", f"deleted-{number}", "", Protocol.TCP, Family.IPV4)


def _service_ids(old: MapSet, new: MapSet) -> dict[int, int]:
    known = {name: number for number, name in known_names(new["service_names"].items())}
    names = dict(known_names(old["service_names"].items()))
    places = range(old["service_names"].spec.max_entries)
    return {n: known[name] for n in places if (name := names.get(n) or nameless(n)) in known}


def _backend_ids(old: MapSet, new: MapSet) -> dict[int, int]:
    known = {backend: number for number, backend in new.backends().identities()}
    return {n: known[backend] for n, backend in old.backends().identities() if backend in known}


def _origins(maps: MapSet) -> Iterator[bytes]:
    """What is recorded of sockets, as packed origins."""
    table = OriginTable(maps)
    yield from each_of(table.connected())
    yield from each_of(table.unconnected())
    for key, value in maps["sock_peers"].items():
        yield from socket_layout.peers_as_origins(key, value)


def _merge_backends(old: MapSet, new: MapSet) -> None:
    """Programs have to know the backends that sockets of the old maps are connected to."""
    for name in ("backend_filter", "backend_ports"):
        now = new.shared(name)
        for at, (word, known) in enumerate(zip(old.shared(name).words(), now.kept_words(), strict=True)):
            if word | known != known:
                now.store(at * U64.size, U64.pack(known | word))


def _copy_fragment_ids(old: MapSet, new: MapSet) -> None:
    """Continues with the higher count, so that ids of datagrams under way are not given again."""
    zero = U32.pack(0)
    before, now = old["fragment_ids"].lookup(zero), new["fragment_ids"].lookup(zero)
    if before is not None and now is not None and U64.unpack(before) > U64.unpack(now):
        new["fragment_ids"].update(zero, before)


def _merge_filters(old: MapSet, new: MapSet) -> None:
    """Adds the pairs of addresses that the old filter has.

    Programs write both filters meanwhile: each byte is a store of its own.
    """
    before, now = bytes(old.shared("flow_filter").bytes), new.shared("flow_filter")
    for place in re.finditer(rb"[^\0]", before):
        now.bytes[place.start()] = FLOW_MARKS
