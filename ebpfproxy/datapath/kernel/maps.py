"""The set of pinned maps: created once, reused by every later agent, read by every command."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from ebpfproxy.config.datapath import Capacity
from ebpfproxy.datapath.abi.arrays import BackendRecords, Loads, Selections, SweepRecord
from ebpfproxy.datapath.abi.schema import SIZED_VALUES, XDP_MAPS, MapSpec, map_specs, version_name
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.bpf_map import Map, SharedArray, map_of
from ebpfproxy.datapath.kernel.libbpf import BpfError
from ebpfproxy.datapath.kernel.pins import pin_over

#: The large arrays that an agent maps as far as its Services need them: so many elements at first.
_FIRST_PLACES = {"backends": 1 << 14, "slots": 1 << 17, "selections": 1 << 14}


class MapSet:
    """All maps of one layout, pinned in ``<folder>/<version>/maps``."""

    def __init__(self, folder: Path, maps: dict[str, Map], *, adopted: bool) -> None:
        self.folder = folder
        self.maps = maps
        #: True where any of the maps was there before.
        self.adopted = adopted

    def __getitem__(self, name: str) -> Map:
        return self.maps[name]

    def shared(self, name: str) -> SharedArray:
        found = self.maps[name]
        assert isinstance(found, SharedArray)
        return found

    def backends(self) -> BackendRecords:
        shared = self.shared("backends")
        return BackendRecords(shared.bytes, shared.spec.max_entries)

    def loads(self) -> Loads:
        shared = self.shared("backends")
        return Loads(shared.bytes, shared.spec.max_entries)

    def sweep(self) -> SweepRecord:
        return SweepRecord(self.shared("sweep").bytes)

    def selections(self) -> Selections:
        return Selections(self.shared("selections").words(), self.shared("slots").bytes)

    def close(self) -> None:
        for each in self.maps.values():
            each.close()


def open_or_create(pins: Path, capacity: Capacity, *, xdp: bool = True) -> MapSet:
    """Opens the maps of this layout below ``pins``, making those that are missing.

    ``xdp``: with room in those that only XDP programs use. Without it they have one element: another version
    that looks for their pins finds them.
    Raises BpfError where the kernel refuses (no memory, no permission).
    """
    folder = pins / version_name(capacity)
    home = folder / "maps"
    home.mkdir(parents=True, exist_ok=True)
    maps: dict[str, Map] = {}
    adopted = False
    for each in map_specs(capacity):
        spec = each._replace(max_entries=1) if each.name in XDP_MAPS and not xdp else each
        path = home / spec.name
        fd = _pinned(path, spec)
        is_new = fd is None
        if fd is None:
            fd = bpf.map_create(
                spec.kind,
                spec.name[:15],
                spec.key_size,
                spec.value_size,
                spec.max_entries,
                flags=spec.flags,
            )
            pin_over(fd, path)
        adopted |= not is_new
        maps[spec.name] = map_of(fd, spec, _FIRST_PLACES.get(spec.name), is_new=is_new)
    return MapSet(folder, maps, adopted=adopted)


def _pinned(path: Path, spec: MapSpec) -> int | None:
    """A descriptor of the map that is pinned there; None where one has to be made."""
    try:
        fd = bpf.get_pinned(path)
    except BpfError as error:
        if error.errno != errno.ENOENT:
            raise
        return None
    if spec.name in XDP_MAPS and bpf.map_info(fd).max_entries != spec.max_entries:
        os.close(fd)
        return None
    return fd


def unpinned(maps: MapSet) -> list[str]:
    """The maps that somebody has unpinned, or that have another map's pin in their place."""
    home = maps.folder / "maps"
    return [name for name, each in maps.maps.items() if not _is_pinned(each, home / name)]


def _is_pinned(each: Map, path: Path) -> bool:
    with bpf.pinned(path) as fd:
        return fd is not None and bpf.map_info(fd).id == bpf.map_info(each.fd).id


def pin_again(maps: MapSet) -> None:
    """Pins what :func:`unpinned` finds."""
    home = maps.folder / "maps"
    home.mkdir(parents=True, exist_ok=True)
    for name in unpinned(maps):
        pin_over(maps[name].fd, home / name)


def open_pinned(folder: Path) -> MapSet:
    """Opens the maps in one version's folder, however many entries they have room for, to read them.

    Those that another version of ebpfproxy has made, with other names or structs, are left out. Raises
    BpfError where one can't be opened.
    """
    specs = {spec.name: spec for spec in map_specs(Capacity())}
    maps: dict[str, Map] = {}
    try:
        for path in sorted((folder / "maps").iterdir()):
            if (spec := specs.get(path.name)) is not None and (found := _open(path, spec)) is not None:
                maps[path.name] = found
    except BaseException:
        # The page asks again and again, and each map is a descriptor and memory.
        for each in maps.values():
            each.close()
        raise
    return MapSet(folder, maps, adopted=True)


def _open(path: Path, spec: MapSpec) -> Map | None:
    """The map that is pinned there, None where it has other structs. Raises BpfError."""
    fd = bpf.get_pinned(path)
    try:
        info = bpf.map_info(fd)
        if spec.name in SIZED_VALUES:
            spec = spec._replace(value_size=info.value_size)
        if (info.key_size, info.value_size) == (spec.key_size, spec.value_size):
            return map_of(fd, spec._replace(max_entries=info.max_entries))
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None
