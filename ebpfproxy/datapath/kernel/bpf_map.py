"""One BPF map: its entries in batches, and arrays that are mapped into memory."""

from __future__ import annotations

import ctypes as ct
import itertools
import mmap
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

from ebpfproxy.datapath.abi import uapi
from ebpfproxy.datapath.abi.schema import MapSpec
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.libbpf import BpfError

#: Entries a system call, when whole maps are read.
_BATCH = 4096
#: Bytes of an array that are mapped at a time.
_WINDOW = 1 << 20
#: Bytes of an array that are compared at a time.
_COMPARED = 1 << 16
_WORD_SIZE = 8


class Map:
    """One open map, with a count of the entries that were written through it."""

    def __init__(self, fd: int, spec: MapSpec) -> None:
        self.fd = fd
        self.spec = spec
        self.writes = 0
        self._value_size = spec.value_size
        if spec.kind in (uapi.MAP_PERCPU_ARRAY, uapi.MAP_PERCPU_HASH):
            self._value_size = (spec.value_size + 7) // 8 * 8 * bpf.possible_cpus()

    def update(self, key: bytes, value: bytes) -> None:
        bpf.map_update(self.fd, key, value)
        self.writes += 1

    def add(self, key: bytes, value: bytes) -> bool:
        """Writes an entry if there is no such key; False if there is one, or no room."""
        try:
            added = bpf.map_add(self.fd, key, value)
        except BpfError as error:
            if error.errno in bpf.NO_ROOM:
                return False
            raise
        self.writes += added
        return added

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
        except BpfError as error:
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
        batch = min(_BATCH, self.spec.max_entries)
        return bpf.map_lookup_batches(self.fd, self.spec.key_size, self._value_size, batch)

    def count(self) -> int:
        """How many entries a hash holds."""
        return sum(count for _, _, count in self._batches())

    def keys(self) -> set[bytes]:
        """Every key: a tenth of the time of :meth:`items`."""
        found: set[bytes] = set()
        size = self.spec.key_size
        key = struct.Struct(f"{size}s")
        for keys, _, count in self._batches():
            found.update(itertools.chain.from_iterable(key.iter_unpack(keys[: count * size])))
        return found

    def changed(self, part: struct.Struct, seen: set[int], now: set[int]) -> Iterator[tuple[bytes, bytes]]:
        """Every entry of whose value this part is another than in a former call: of a whole map, quickly.

        ``seen`` is what that call has added to ``now``, a number for each entry. The part has to tell keys
        apart, too.
        """
        ks, vs = self.spec.key_size, self._value_size
        for keys, values, count in self._batches():
            states = list(map(hash, part.iter_unpack(values[: count * vs])))
            now.update(states)
            if seen.issuperset(states):
                continue
            for i, state in enumerate(states):
                if state not in seen:
                    yield bytes(keys[i * ks : (i + 1) * ks]), bytes(values[i * vs : (i + 1) * vs])

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Every entry."""
        ks, vs = self.spec.key_size, self._value_size
        key, value = struct.Struct(f"{ks}s"), struct.Struct(f"{vs}s")
        for keys, values, count in self._batches():
            found = zip(
                key.iter_unpack(keys[: count * ks]), value.iter_unpack(values[: count * vs]), strict=True
            )
            yield from ((each_key, each_value) for (each_key,), (each_value,) in found)

    def nonzero_items(self) -> Iterator[tuple[bytes, bytes]]:
        """Every entry of which something is not 0, quickly where most are: for arrays."""
        ks, vs = self.spec.key_size, self._value_size
        for keys, values, count in self._batches():
            if values[: count * vs] == bytes(count * vs):
                continue
            for i in range(count):
                value = bytes(values[i * vs : (i + 1) * vs])
                if value.count(0) != vs:
                    yield bytes(keys[i * ks : (i + 1) * ks]), value

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
    """An array map mapped into memory (BPF_F_MMAPABLE): stores are plain, without a system call.

    Who alone writes it keeps a copy in memory of its own (:meth:`keep`), and reads that: so it does not take
    what somebody else has stored for its own, and can tell it.
    """

    def __init__(self, fd: int, spec: MapSpec, places: int | None = None, *, is_new: bool = False) -> None:
        """``places``: how many elements are mapped, until :meth:`reach` maps more; None: all. ``is_new``:
        nobody has written anything yet.

        What is mapped counts as memory of this process.
        """
        super().__init__(fd, spec)
        # The kernel rounds an element up to 8 bytes; so must whoever maps the array.
        assert spec.value_size % 8 == 0, spec.name
        self.stride = spec.value_size
        self._kept: mmap.mmap | None = None
        self._is_new = is_new
        self._owned = self.stride
        self._step = min(places or spec.max_entries, spec.max_entries)
        self._map(self._step)

    def _map(self, places: int) -> None:
        self.memory = mmap.mmap(self.fd, -(-places * self.stride // mmap.PAGESIZE) * mmap.PAGESIZE)
        self.bytes = memoryview(self.memory)
        # Last, since other threads compare: what counts as mapped is.
        self._places = places

    def reach(self, end: int) -> bool:
        """Has at least the elements below ``end`` mapped.

        True where the memory is another now: a view of the former one is good for what it had.
        """
        if end <= self._places:
            return False
        # Not much more: what is mapped counts as memory, in use or not. To map all of it again takes less
        # than a millisecond.
        places = -(-end // self._step) * self._step
        self._map(min(places, self.spec.max_entries))
        return True

    def words(self) -> ct.Array[ct.c_uint64]:
        """The array as 64-bit words; ctypes stores each with one instruction, never torn."""
        return self._words_of(self.memory, self._places)

    def _words_of(self, memory: mmap.mmap, places: int) -> ct.Array[ct.c_uint64]:
        return (ct.c_uint64 * (self.stride * places // 8)).from_buffer(memory)

    # -- the copy of its only writer

    @property
    def is_kept(self) -> bool:
        return self._kept is not None

    @property
    def kept_size(self) -> int:
        """Bytes of the copy that are told of as one entry: of a filter, one large element, a word."""
        return self._owned if self.spec.max_entries > 1 else 8

    def keep(self, owned: int = 0) -> memoryview:
        """The copy, which is made by the first call. Whoever writes the array writes it, too.

        ``owned``: of each element the copy has only so many bytes, a multiple of 4: the others are
        programs'. 0: all.
        """
        return memoryview(self._keep(owned))

    def kept_words(self) -> ct.Array[ct.c_uint64]:
        return self._words_of(self._keep(), self.spec.max_entries)

    def _keep(self, owned: int = 0) -> mmap.mmap:
        if self._kept is None:
            self._owned = owned or self.stride
            size = self._owned * self.spec.max_entries
            # Pages that are only read take no memory in a private mapping.
            self._kept = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            # To read the zeros of a new one takes longer than all else.
            for part in () if self._is_new else self._parts():
                now = self.owned(part)
                if now.count(0) != len(now):
                    self._kept[part.start : part.stop] = now
        return self._kept

    def _parts(self) -> Iterator[slice]:
        size = self._owned * self.spec.max_entries
        step = _COMPARED // self.kept_size * self.kept_size
        return (slice(at, min(at + step, size)) for at in range(0, size, step))

    def owned(self, part: slice) -> bytes:
        """What the array has now where the copy has this part, which begins and ends with an element."""
        if self._owned == self.stride:
            return self._read(part.start, part.stop)
        first, last = part.start // self._owned, part.stop // self._owned
        elements = self._read(first * self.stride, last * self.stride)
        if elements == bytes(len(elements)):
            return bytes((last - first) * self._owned)
        words = memoryview(elements).cast("I")
        found = memoryview(bytearray((last - first) * self._owned)).cast("I")
        step, width = self.stride // 4, self._owned // 4
        for column in range(width):
            found[column::width] = words[column::step]
        return found.tobytes()

    def _read(self, at: int, end: int) -> bytes:
        """Bytes of the array, mapped or not."""
        if end <= self._places * self.stride:
            return self.memory[at:end]
        start = at - at % mmap.PAGESIZE
        with mmap.mmap(self.fd, end - start, prot=mmap.PROT_READ, offset=start) as rest:
            return rest[at - start :]

    def store(self, at: int, data: bytes) -> None:
        """Stores bytes in the copy and in the array, not as one step."""
        self._keep()[at : at + len(data)] = data
        self.bytes[at : at + len(data)] = data
        self.writes += 1

    def differing(self) -> Iterator[slice]:
        """The parts of the copy from which the array differs. Any thread may ask."""
        kept = self._keep()
        return (part for part in self._parts() if self.owned(part) != kept[part])

    def restore(self, at: int) -> None:
        """Stores the entry of the copy that begins there in the array: a word with one instruction."""
        size = self.kept_size
        if at // self._owned >= self._places:
            # What is mapped stays: whoever has a view of it is not told.
            self._restore_unmapped(at)
        elif size == _WORD_SIZE:
            self.words()[at // size] = self.kept_words()[at // size]
        else:
            to = at // size * self.stride
            self.bytes[to : to + size] = self.keep()[at : at + size]
        self.writes += 1

    def _restore_unmapped(self, at: int) -> None:
        """The same for an element that nothing leads to."""
        offset = at // self._owned * self.stride
        before = offset % mmap.PAGESIZE
        with mmap.mmap(self.fd, before + self.stride, offset=offset - before) as rest:
            rest[before : before + self._owned] = self._keep()[at : at + self._owned]

    def close(self) -> None:
        self.bytes.release()
        # The mapping is a descriptor of its own. Where a view of it is left, it goes with that.
        with suppress(BufferError):
            self.memory.close()
        super().close()


class WindowedArray(Map):
    """An array map (BPF_F_MMAPABLE) that is mapped a window at a time, and no longer than it is read."""

    def windows(self) -> Iterator[mmap.mmap]:
        """The memory, in order; a window is closed when the next is opened.

        A slice with a step of the mapping itself is copied faster than one of a memoryview.
        """
        size = -(-self.spec.value_size * self.spec.max_entries // mmap.PAGESIZE) * mmap.PAGESIZE
        for offset in range(0, size, _WINDOW):
            length = min(_WINDOW, size - offset)
            with mmap.mmap(self.fd, length, prot=mmap.PROT_READ, offset=offset) as window:
                yield window

    def read(self, first: int, count: int) -> bytes:
        """So many elements, from this one on."""
        at = first * self.spec.value_size
        start, size = at - at % mmap.PAGESIZE, count * self.spec.value_size
        with mmap.mmap(self.fd, at - start + size, prot=mmap.PROT_READ, offset=start) as window:
            return window[at - start : at - start + size]

    def count_nonzero(self, at: int) -> int:
        """How many elements have something else than 0 in the byte at this offset."""
        columns = (window[at :: self.spec.value_size] for window in self.windows())
        return sum(len(column) - column.count(0) for column in columns)


def map_of(fd: int, spec: MapSpec, places: int | None = None, *, is_new: bool = False) -> Map:
    """``places`` and ``is_new``: of SharedArray."""
    if spec.in_windows:
        return WindowedArray(fd, spec)
    return SharedArray(fd, spec, places, is_new=is_new) if spec.flags & uapi.F_MMAPABLE else Map(fd, spec)
