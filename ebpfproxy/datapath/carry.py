"""Carrying flows over to maps of other sizes, so that connections outlive the change.

Maps of another size are other maps (``datapath.maps``), with service and backend ids of their own. What
programs have noted in the old ones is copied: conntrack with its ids translated by name and address, sockets'
origins as they are. It is done before programs are swapped, and once more after, for what began meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ebpfproxy.datapath import layout
from ebpfproxy.datapath.attach import LINKS
from ebpfproxy.datapath.bpf import BpfError
from ebpfproxy.datapath.layout import SCHEMA_VERSION, U32
from ebpfproxy.datapath.maps import MapSet, open_pinned

_AS_THEY_ARE = ("sock_origin", "sock_revnat", "fragments")


def carry_over(pins: Path, maps: MapSet) -> int:
    """Copies what is not there yet from maps of the same schema; returns the number of conntrack entries.

    Entries of Services or backends that are no more stay behind.
    """
    copied = 0
    for folder in pins.glob(f"v{SCHEMA_VERSION}-*"):
        if folder == maps.folder or folder.name == LINKS or not (folder / "maps").is_dir():
            continue
        try:
            old = open_pinned(folder)
        except (BpfError, ValueError):
            continue
        try:
            copied += _carry(old, maps)
        finally:
            old.close()
    return copied


def _carry(old: MapSet, new: MapSet) -> int:
    if any(old.maps.keys() ^ new.maps.keys()):
        return 0
    for name in _AS_THEY_ARE:
        new[name].update_many(dict(_missing(old, new, name)))
    services, backends = _service_ids(old, new), _backend_ids(old, new)
    entries = {}
    for key, value in _missing(old, new, "conntrack"):
        ids = layout.nat_ids(value)
        service, backend = services.get(ids[0]), backends.get(ids[1])
        if service is not None and backend is not None:
            epoch = new.shared("epochs").words()[service]
            entries[key] = layout.with_nat_ids(value, service, backend, epoch)
    new["conntrack"].update_many(entries)
    _merge_filters(old, new)
    return len(entries)


def _missing(old: MapSet, new: MapSet, name: str) -> Iterator[tuple[bytes, bytes]]:
    present = {key for key, _ in new[name].items()}
    return ((key, value) for key, value in old[name].items() if key not in present)


def _service_ids(old: MapSet, new: MapSet) -> dict[int, int]:
    known = {value: U32.unpack(key)[0] for key, value in new["service_names"].items()}
    return {U32.unpack(key)[0]: known[value] for key, value in old["service_names"].items() if value in known}


def _backend_ids(old: MapSet, new: MapSet) -> dict[int, int]:
    known = {backend: number for number, backend in _backends(new)}
    return {number: known[backend] for number, backend in _backends(old) if backend in known}


def _backends(maps: MapSet) -> Iterator[tuple[int, bytes]]:
    """Ids and identities: address, port and protocol as packed."""
    shared = maps.shared("backends")
    size = layout.BACKEND_STATE_OFFSET
    for number in range(shared.spec.max_entries):
        start = number * shared.stride
        if shared.bytes[start + layout.BACKEND_PROTOCOL_OFFSET]:
            yield number, bytes(shared.bytes[start : start + size])


def _merge_filters(old: MapSet, new: MapSet) -> None:
    """A pair of addresses that either has noted is noted."""
    zero = U32.pack(0)
    before, now = old["flow_filter"].lookup(zero), new["flow_filter"].lookup(zero)
    if before is not None and now is not None and any(before):
        either = int.from_bytes(before, "little") | int.from_bytes(now, "little")
        new["flow_filter"].update(zero, either.to_bytes(len(now), "little"))
