"""Copies flows to maps of other sizes, so that connections outlive the change.

Maps of another size are other maps (``kernel.maps``), with service and backend ids of their own. Conntrack,
records of sockets and session affinity are copied, with their ids translated by name and address: once before
programs are swapped, and again while they are, for what begins meanwhile. A connection may still be lost if
its first packets pass programs of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ebpfproxy.datapath.abi import flow_layout, socket_layout
from ebpfproxy.datapath.abi.flow_layout import NO_USE, BackendUse, Entry
from ebpfproxy.datapath.abi.layout import U32, U64
from ebpfproxy.datapath.abi.schema import SCHEMA_VERSION
from ebpfproxy.datapath.kernel.bpf import BpfError
from ebpfproxy.datapath.kernel.maps import MapSet, open_pinned

_AS_THEY_ARE = ("fragments", "port_clashes", "sock_redirects", "mptcp_subflows")
#: This id is never given out.
_NOTHING = 0xFFFFFFFF


class MapMigration:
    """Copies what is not there yet, as often as :meth:`copy` is called. Close it.

    Entries of Services or backends that are gone are not copied.
    """

    def __init__(self, pins: Path, maps: MapSet) -> None:
        self._new = maps
        self._old = _others(pins, maps)
        self._ids = [(_service_ids(old, maps), _backend_ids(old, maps)) for old in self._old]
        #: Origins, and peers of unconnected sockets, that have been copied, as they were written.
        self._origins: list[dict[bytes, bytes]] = [{} for _ in self._old]
        self._peers: list[dict[bytes, bytes]] = [{} for _ in self._old]
        #: Conntrack entries so far.
        self.copied = 0
        for old in self._old:
            _copy_fragment_ids(old, maps)

    def copy(self) -> None:
        each = zip(self._old, self._ids, self._origins, self._peers, strict=True)
        for old, (services, backends), origins, peers in each:
            self._copy(old, services, backends)
            self._copy_origins(old, services, backends, origins)
            self._copy_peers(old, services, backends, peers)

    def _copy(self, old: MapSet, services: dict[int, int], backends: dict[int, int]) -> None:
        new, entries = self._new, {}
        epochs = new.shared("epochs").words()
        for key, value in _missing(old, new, "conntrack"):
            entry = Entry(key, value)
            if entry.use == NO_USE:
                entries[key] = value
                continue
            service, backend = services.get(entry.use.service_id), backends.get(entry.use.backend_id)
            if service is not None and backend is not None:
                entries[key] = entry.with_use(BackendUse(service, backend), epochs[service])
        if entries:
            # Programs look for an entry only where the filter says so.
            _merge_filters(old, new)
            new["conntrack"].update_many(entries)
        self.copied += len(entries)
        self._copy_affinity(old, services, backends)
        for name in _AS_THEY_ARE:
            new[name].update_many(dict(_missing(old, new, name)))

    def _copy_origins(
        self, old: MapSet, services: dict[int, int], backends: dict[int, int], copied: dict[bytes, bytes]
    ) -> None:
        """A socket whose backend is gone keeps its frontend's address; it is counted for no backend."""

        def translate(value: bytes) -> bytes:
            service, backend = socket_layout.origin_use(value)
            use = BackendUse(services.get(service, _NOTHING), backends.get(backend, _NOTHING))
            return socket_layout.with_origin_use(value, use)

        for value, number in self._copy_sockets(old, "sock_origin", copied, translate):
            self._carry(value, number)

    def _copy_peers(
        self, old: MapSet, services: dict[int, int], backends: dict[int, int], copied: dict[bytes, bytes]
    ) -> None:
        """A socket whose backend is gone still gets its replies, and chooses anew when it sends."""
        epochs = self._new.shared("epochs").words()
        removed = {flow_layout.unpack_departure(key) for key, _ in old["departures"].items()}

        def change(service: int, backend: int) -> tuple[int, int, int]:
            is_removed = (service, backend) in removed
            if is_removed or service not in services or backend not in backends:
                return _NOTHING, _NOTHING, 0
            return services[service], backends[backend], epochs[services[service]]

        for _ in self._copy_sockets(
            old, "sock_peers", copied, lambda value: socket_layout.with_peer_ids(value, change)
        ):
            pass

    def _copy_sockets(
        self, old: MapSet, name: str, copied: dict[bytes, bytes], translate: Callable[[bytes], bytes]
    ) -> Iterator[tuple[bytes, int]]:
        """Yields what has been copied, with 1, and what has been deleted again, with -1.

        What has been copied and is in one of the maps only belongs to a socket that has been closed.
        """
        table = self._new[name]
        there = dict(old[name].items())
        present = dict(table.items())
        entries = {
            key: translate(value) for key, value in there.items() if key not in present and key not in copied
        }
        refused = set(table.update_many(entries))
        for key, value in entries.items():
            if key not in refused:
                copied[key] = value
                yield value, 1
        for key in [key for key in copied if key not in there]:
            value = copied.pop(key)
            if present.get(key) == value and table.delete(key):
                yield value, -1

    def _carry(self, origin: bytes, number: int) -> None:
        _, backend = socket_layout.origin_use(origin)
        if backend != _NOTHING:
            self._new.loads().carry(backend, number)

    def _copy_affinity(self, old: MapSet, services: dict[int, int], backends: dict[int, int]) -> None:
        entries = {}
        for key, value in _missing(old, self._new, "affinity"):
            service = services.get(flow_layout.affinity_service(key))
            backend = backends.get(flow_layout.unpack_affinity(value)[0])
            if service is not None and backend is not None:
                entries[flow_layout.with_affinity_service(key, service)] = flow_layout.with_affinity_backend(
                    value, backend
                )
        self._new["affinity"].update_many(entries)

    def close(self) -> None:
        while self._old:
            self._old.pop().close()


def copy_drain_requests(pins: Path, maps: MapSet) -> None:
    """Copies drain requests to maps of this size, before anything is programmed."""
    for old in _others(pins, maps):
        maps["drained"].update_many(dict(_missing(old, maps, "drained")))
        old.close()


def _others(pins: Path, maps: MapSet) -> list[MapSet]:
    return [old for folder in pins.glob(f"v{SCHEMA_VERSION}-*") if (old := _other(folder, maps))]


def _other(folder: Path, maps: MapSet) -> MapSet | None:
    """The maps of another layout with the same structs, None for anything else."""
    if folder == maps.folder or not (folder / "maps").is_dir():
        return None
    try:
        old = open_pinned(folder)
    except (BpfError, ValueError):
        return None
    if old.maps.keys() == maps.maps.keys():
        return old
    old.close()
    return None


def _missing(old: MapSet, new: MapSet, name: str) -> Iterator[tuple[bytes, bytes]]:
    present = {key for key, _ in new[name].items()}
    return ((key, value) for key, value in old[name].items() if key not in present)


def _service_ids(old: MapSet, new: MapSet) -> dict[int, int]:
    known = {value: U32.unpack(key)[0] for key, value in new["service_names"].items()}
    return {U32.unpack(key)[0]: known[value] for key, value in old["service_names"].items() if value in known}


def _backend_ids(old: MapSet, new: MapSet) -> dict[int, int]:
    known = {backend: number for number, backend in new.backends().identities()}
    return {n: known[backend] for n, backend in old.backends().identities() if backend in known}


def _copy_fragment_ids(old: MapSet, new: MapSet) -> None:
    """Continues with the higher count, so that ids of datagrams under way are not given again."""
    zero = U32.pack(0)
    before, now = old["fragment_ids"].lookup(zero), new["fragment_ids"].lookup(zero)
    if before is not None and now is not None and U64.unpack(before) > U64.unpack(now):
        new["fragment_ids"].update(zero, before)


def _merge_filters(old: MapSet, new: MapSet) -> None:
    """Adds the pairs of addresses that the old filter has."""
    zero = U32.pack(0)
    before, now = old["flow_filter"].lookup(zero), new["flow_filter"].lookup(zero)
    if before is not None and now is not None and any(before):
        either = int.from_bytes(before, "little") | int.from_bytes(now, "little")
        new["flow_filter"].update(zero, either.to_bytes(len(now), "little"))
