"""The set of pinned maps: created once, reused by every later agent, read by every command."""

from __future__ import annotations

import ctypes as ct
import errno
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ebpfproxy.config.datapath import Capacity
from ebpfproxy.datapath.abi import uapi
from ebpfproxy.datapath.abi.arrays import BackendRecords, Loads, Selections
from ebpfproxy.datapath.abi.schema import MapSpec, map_specs, version_name
from ebpfproxy.datapath.kernel import bpf

#: Entries a system call, when whole maps are read.
_BATCH = 4096


class Map:
    """One open map, with a count of the entries that were written through it."""

    def __init__(self, fd: int, spec: MapSpec) -> None:
        self.fd = fd
        self.spec = spec
        self.writes = 0
        self._value_size = spec.value_size
        if spec.kind == uapi.MAP_PERCPU_ARRAY:
            self._value_size = (spec.value_size + 7) // 8 * 8 * bpf.possible_cpus()

    @property
    def zero(self) -> bytes:
        """A value of zeros, for all CPUs of a per-CPU map."""
        return bytes(self._value_size)

    def update(self, key: bytes, value: bytes) -> None:
        bpf.map_update(self.fd, key, value)
        self.writes += 1

    def update_many(self, entries: Mapping[bytes, bytes]) -> list[bytes]:
        """Writes entries in one system call; returns the keys for which there was no room."""
        if not entries:
            return []
        keys = list(entries)
        done = bpf.map_update_batch(self.fd, b"".join(keys), b"".join(entries.values()), len(keys))
        self.writes += done
        # The batch ends at the first that does not fit; others may replace what is there.
        return [key for key in keys[done:] if not self._fits(key, entries[key])]

    def _fits(self, key: bytes, value: bytes) -> bool:
        try:
            self.update(key, value)
        except bpf.BpfError as error:
            if error.errno in bpf.NO_ROOM:
                return False
            raise
        return True

    def bring(self, wanted: Mapping[bytes, bytes]) -> list[bytes]:
        """Makes a hash or a trie hold exactly this, writing only differences; the keys without room."""
        present = dict(self.items())
        for key in present.keys() - wanted.keys():
            self.delete(key)
        return self.update_many({key: value for key, value in wanted.items() if present.get(key) != value})

    def delete(self, key: bytes) -> bool:
        found = bpf.map_delete(self.fd, key)
        self.writes += found
        return found

    def delete_many(self, keys: Sequence[bytes]) -> int:
        """Deletes entries in few system calls; returns how many were there."""
        deleted = 0
        while keys:
            done = bpf.map_delete_batch(self.fd, b"".join(keys), len(keys))
            deleted += done
            # The batch ends at a key that is not there.
            keys = keys[done + 1 :]
        self.writes += deleted
        return deleted

    def lookup(self, key: bytes) -> bytes | None:
        return bpf.map_lookup(self.fd, key, self._value_size)

    def _batches(self) -> Iterator[tuple[memoryview, memoryview, int]]:
        return bpf.map_lookup_batches(self.fd, self.spec.key_size, self._value_size, _BATCH)

    def count(self) -> int:
        """How many entries a hash holds."""
        return sum(count for _, _, count in self._batches())

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Every entry of a hash."""
        ks, vs = self.spec.key_size, self._value_size
        for keys, values, count in self._batches():
            for i in range(count):
                yield bytes(keys[i * ks : (i + 1) * ks]), bytes(values[i * vs : (i + 1) * vs])

    def nonzero_counters(self) -> Iterator[tuple[int, list[int]]]:
        """Indexes of a per-CPU array of 64-bit counters, with sums over all CPUs, unless all are zero."""
        fields = self.spec.value_size // 8
        words = self._value_size // 8
        zero = bytes(self._value_size)
        base = 0
        for _, values, count in self._batches():
            if values[: count * self._value_size] != bytes(count * self._value_size):
                for i in range(count):
                    value = values[i * self._value_size : (i + 1) * self._value_size]
                    if value != zero:
                        counters = value.cast("Q")
                        yield base + i, [sum(counters[f:words:fields]) for f in range(fields)]
            base += count

    def close(self) -> None:
        os.close(self.fd)


class SharedArray(Map):
    """An array map mapped into memory (BPF_F_MMAPABLE): stores are plain, without a system call."""

    def __init__(self, fd: int, spec: MapSpec) -> None:
        super().__init__(fd, spec)
        # The kernel rounds an element up to 8 bytes; so must whoever maps the array.
        assert spec.value_size % 8 == 0, spec.name
        stride = spec.value_size
        size = -(-stride * spec.max_entries // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mmap.mmap(fd, size)
        self.bytes = memoryview(self._memory)
        self.stride = stride

    def words(self) -> ct.Array[ct.c_uint64]:
        """The array as 64-bit words; ctypes stores each with one instruction, never torn."""
        return (ct.c_uint64 * (self.stride * self.spec.max_entries // 8)).from_buffer(self._memory)

    def close(self) -> None:
        self.bytes.release()
        super().close()


def _wrap(fd: int, spec: MapSpec) -> Map:
    return SharedArray(fd, spec) if spec.flags & uapi.F_MMAPABLE else Map(fd, spec)


class MapSet:
    """All maps of one layout, pinned in ``<folder>/<version>/maps``."""

    def __init__(self, folder: Path, maps: dict[str, Map], *, adopted: bool) -> None:
        self.folder = folder
        self.maps = maps
        #: True where the maps were there before.
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
        shared = self.shared("loads")
        return Loads(shared.bytes, shared.spec.max_entries)

    def selections(self) -> Selections:
        return Selections(self.shared("selections").words(), self.shared("slots").bytes)

    def close(self) -> None:
        for each in self.maps.values():
            each.close()


def open_or_create(pins: Path, capacity: Capacity) -> MapSet:
    """Opens the maps of this layout below ``pins``, making those that are missing.

    Raises BpfError where the kernel refuses (no memory, no permission).
    """
    folder = pins / version_name(capacity)
    home = folder / "maps"
    home.mkdir(parents=True, exist_ok=True)
    maps: dict[str, Map] = {}
    adopted = True
    for spec in map_specs(capacity):
        path = home / spec.name
        try:
            fd = bpf.get_pinned(path)
        except bpf.BpfError as error:
            if error.errno != errno.ENOENT:
                raise
            adopted = False
            fd = bpf.map_create(
                spec.kind,
                spec.name[:15],
                spec.key_size,
                spec.value_size,
                spec.max_entries,
                flags=spec.flags,
            )
            bpf.pin(fd, path)
        maps[spec.name] = _wrap(fd, spec)
    return MapSet(folder, maps, adopted=adopted)


def open_pinned(folder: Path) -> MapSet:
    """Opens the maps in one version's folder as they are, whatever their sizes, to read them.

    Raises BpfError where one can't be opened and ValueError for one of an unknown name.
    """
    specs = {spec.name: spec for spec in map_specs(Capacity())}
    maps: dict[str, Map] = {}
    for path in sorted((folder / "maps").iterdir()):
        fd = bpf.get_pinned(path)
        if path.name not in specs:
            os.close(fd)
            raise ValueError(f"{path}: not a map of schema {folder.name}")
        info = bpf.map_info(fd)
        maps[path.name] = _wrap(fd, specs[path.name]._replace(max_entries=info.max_entries))
    return MapSet(folder, maps, adopted=True)
