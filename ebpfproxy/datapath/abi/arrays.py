"""Arrays that programs and agent share through memory, as records: the only place that knows their offsets.

Each class is a view of a map's memory (``kernel.bpf_map.SharedArray``), without any state of its own.
"""

from __future__ import annotations

import ctypes as ct
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress, count
from operator import add, sub

from ebpfproxy.datapath.abi import layout
from ebpfproxy.services.model import Backend, BackendState

_BACKEND, _SLOT = layout.BACKEND_SIZE, layout.SLOT_SIZE
#: A place without a backend; its counts stay.
_FREE = bytes(layout.BACKEND.size)
_NO_LOAD = bytes(layout.LOAD.size)
#: The selections of both policies, as they are stored and as ranges.
_WORDS, _RANGES = struct.Struct("=QQ"), struct.Struct("=IIII")
_MASK, _SIGN = 0xFFFFFFFF, 0x80000000
#: The offset of the lower 32 bits in a 64-bit word.
_LOWER_HALF = 0 if sys.byteorder == "little" else 4
#: 32-bit words of both.
_RANGE = _RANGES.size // 4
_POLICIES, _selection_word = layout.POLICIES, layout.selection_word
#: Base and count; (0, 0) if empty.
Range = tuple[int, int]


class BackendRecords:
    """The ``backends`` map: ``struct backend`` by backend id.

    ``stride``: bytes from one to the next, fewer in a copy without what programs count.
    """

    def __init__(self, memory: memoryview, places: int, stride: int = _BACKEND) -> None:
        # A mapping ends with its page: after the last place there are zeros that belong to no place.
        self._memory = memory[: places * stride]
        self._stride = stride

    def __len__(self) -> int:
        return len(self._memory) // self._stride

    def read(self, number: int) -> tuple[Backend, BackendState] | None:
        """Reads a record; None for an id that is free, or that the map has no place for."""
        packed = self._memory[number * self._stride : (number + 1) * self._stride]
        try:
            return layout.unpack_backend(bytes(packed)) if packed else None
        except ValueError:  # somebody else has written there
            return None

    def ids(self) -> list[int]:
        """The ids that are in use. One byte tells a free place, which saves unpacking it."""
        protocols = bytes(self._memory[layout.BACKEND_PROTOCOL_OFFSET :: self._stride])
        return list(compress(count(), protocols))

    def identities(self) -> Iterator[tuple[int, bytes]]:
        """Ids, each with what names the backend in maps of any size: address, port and protocol, packed."""
        for number in self.ids():
            yield number, bytes(self._memory[number * self._stride :][: layout.BACKEND_STATE_OFFSET])

    def state(self, number: int) -> int:
        """The state of a backend: a value of BackendState."""
        return self._memory[number * self._stride + layout.BACKEND_STATE_OFFSET]

    def set_state(self, number: int, state: BackendState) -> None:
        self._memory[number * self._stride + layout.BACKEND_STATE_OFFSET] = state

    def write(self, number: int, backend: Backend, state: BackendState) -> None:
        at = number * self._stride
        self._memory[at : at + layout.BACKEND.size] = layout.pack_backend(backend, state)

    def write_new(self, numbers: Sequence[int], packed: Sequence[bytes]) -> None:
        """Writes packed records of backends for which nothing has been counted.

        What a killed agent may have left of counts goes before anybody can read whose they are.
        """
        nothing = bytes(self._stride - layout.BACKEND.size)
        if isinstance(numbers, range):
            at = numbers.start * self._stride
            self._memory[at : at + len(packed) * self._stride] = nothing.join((*packed, b""))
            return
        for number, each in zip(numbers, packed, strict=True):
            at = number * self._stride
            self._memory[at : at + self._stride] = each + nothing

    def clear(self, number: int) -> None:
        self._memory[number * self._stride :][: layout.BACKEND.size] = _FREE


class Loads:
    """What the ``backends`` map counts, by backend id.

    Programs write all words but two: ``flows_corrected`` is the agent's own, and ``sockets_carried`` is left
    from earlier versions, whose agents wrote it. A sweep counts in ``flows_seen``.
    """

    #: Words of 32 bits, and of 64 bits, of a record.
    _WORDS, _LONGS = _BACKEND // 4, _BACKEND // 8
    _CLOSED_AT = layout.LOAD_OFFSETS["sockets_closed"] // 4
    _BEGUN_AT = layout.LOAD_OFFSETS["flows_begun"] // 8
    _CORRECTED_AT = layout.LOAD_OFFSETS["flows_corrected"] // 4
    _SEEN_AT = layout.LOAD_OFFSETS["flows_seen"] // 4
    #: The words that say how much is open: of sockets, then of flows. The lower half of a counter is enough.
    _OPEN_AT = tuple(
        (layout.LOAD_OFFSETS[name] + _LOWER_HALF * name.endswith(("_opened", "_begun"))) // 4
        for name in (
            "sockets_opened",
            "sockets_closed",
            "sockets_carried",
            "flows_begun",
            "flows_ended",
            "flows_corrected",
        )
    )

    def __init__(self, memory: memoryview, places: int) -> None:
        self._memory = memory[: places * _BACKEND]
        self._words, self._longs = self._memory.cast("I"), self._memory.cast("Q")

    def __len__(self) -> int:
        return len(self._memory) // _BACKEND

    def __getitem__(self, number: int) -> layout.Load:
        return layout.unpack_load(self._memory[number * _BACKEND : (number + 1) * _BACKEND])

    def counted(self, end: int) -> Iterator[int]:
        """The ids below ``end`` for which anything has been counted."""
        first, last = layout.LOAD_OFFSETS["sockets_opened"] // 8, layout.LOAD_OFFSETS["sockets_carried"] // 8
        chosen = (self._longs[at : end * self._LONGS : self._LONGS].tolist() for at in range(first, last + 1))
        closed = self._words[self._CLOSED_AT : end * self._WORDS : self._WORDS].tolist()
        return compress(count(), map(any, zip(*chosen, closed, strict=True)))

    def packed(self, end: int) -> bytes:
        """All records below ``end`` as they are now: a copy for another Loads."""
        return bytes(self._memory[: end * _BACKEND])

    def is_same(self, number: int, other: Loads) -> bool:
        """True if a record is what it is in another copy."""
        at = slice(number * _BACKEND, (number + 1) * _BACKEND)
        return self._memory[at] == other._memory[at]

    def open_now(self, first: int, end: int) -> list[int]:
        """``Load.open_now`` of all these ids, a column at a time: a Load for each takes ten times as long."""
        at = slice(first * self._WORDS, end * self._WORDS)
        columns = [self._words[at][word :: self._WORDS].tolist() for word in self._OPEN_AT]
        sockets, flows = _balances(*columns[:3]), _balances(*columns[3:])
        return list(map(add, sockets, flows)) if any(flows) else sockets

    def correct(self, number: int, flows: int) -> None:
        """Counts flows that programs have not counted (or, below 0, did not see end)."""
        at = number * self._WORDS + self._CORRECTED_AT
        self._words[at] = self._words[at] + flows & _MASK

    def clear(self, number: int) -> None:
        self._memory[number * _BACKEND + layout.BACKEND.size : (number + 1) * _BACKEND] = _NO_LOAD

    def forget_seen(self, end: int) -> None:
        """For all ids below ``end``."""
        seen = self._words[self._SEEN_AT : end * self._WORDS : self._WORDS]
        seen[:] = memoryview(bytes(seen.nbytes)).cast("I")

    def seen(self, end: int) -> dict[int, int]:
        """Open flows to each backend below ``end`` of which the sweep has seen any, perhaps to end it."""
        counts = self._words[self._SEEN_AT : end * self._WORDS : self._WORDS]
        return {number: n & ~layout.FLOWS_ENDED for number, n in enumerate(counts.tolist()) if n}

    def with_flows(self, end: int) -> Iterator[int]:
        """The ids below ``end`` for which programs have ever counted a flow."""
        begun = self._longs[self._BEGUN_AT : end * self._LONGS : self._LONGS]
        return (number for number, count in enumerate(begun) if count)


def _balances(more: list[int], less: list[int], corrections: list[int]) -> list[int]:
    """What is left of each; 0 if that is below. Words of 32 bits wrap."""
    found = list(map(sub, more, less))
    if any(corrections):
        found = list(map(add, found, corrections))
    if found and (min(found) < 0 or max(found) >= _SIGN):
        words = (count & _MASK for count in found)
        found = [count if count < _SIGN else 0 for count in words]
    return found


class SweepRecord:
    """The ``sweep`` map: ``struct sweep``, how agent and ``bpf/sweep.c`` work together."""

    _LIMITS, _NUMBERS, _RESULTS = 8, struct.Struct("=2I"), struct.Struct("=5I")
    NUMBERS_AT = _LIMITS + 128 * 8
    MARK_AT = NUMBERS_AT + _NUMBERS.size
    RESULTS_AT = MARK_AT + 4

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory

    def set_limits(self, limits: Sequence[int]) -> None:
        """``limits`` are ns by protocol, ``seen`` and duration."""
        struct.pack_into("=128q", self._memory, self._LIMITS, *limits)

    def begin(self, now: int, mark: int) -> None:
        """``now`` is CLOCK_MONOTONIC in ns, ``mark`` of ``flow_filter``."""
        layout.U64.pack_into(self._memory, 0, now)
        layout.U32.pack_into(self._memory, self.MARK_AT, mark)
        self._RESULTS.pack_into(self._memory, self.RESULTS_AT, 0, 0, 0, 0, 0)

    def set_numbers(self, count: int) -> None:
        """The next runs are for so many: entries of a batch, or parts of ``flow_filter``."""
        self._NUMBERS.pack_into(self._memory, self.NUMBERS_AT, 0, count)

    @property
    def left(self) -> int:
        done, count = self._NUMBERS.unpack_from(self._memory, self.NUMBERS_AT)
        return int(count - done)

    @property
    def results(self) -> tuple[int, int, int, int, int]:
        """Entries kept and deleted; flows of IPv4, of IPv6 that ended because of removed backends; entries of
        such flows that are left to the next sweep."""
        kept, deleted, removed4, removed6, left = self._RESULTS.unpack_from(self._memory, self.RESULTS_AT)
        return kept, deleted, removed4, removed6, left


class Selections:
    """The ``selections`` and ``slots`` maps: a range of slots for each service id and policy.

    A slot is one word, of a backend id and perhaps a weight; so is a selection, of base and count.
    """

    def __init__(self, words: ct.Array[ct.c_uint64], slots: memoryview) -> None:
        """``words``: each is stored with one instruction, so that readers see the old range or the new."""
        self._words = words
        self._slots = slots

    def ranges(self, service_id: int) -> tuple[Range, Range]:
        """The slots in use, by policy."""
        first = service_id * layout.POLICIES
        # Each word is read at once, too: a command reads while the agent writes.
        words = self._words[first : first + layout.POLICIES]
        cluster, cluster_count, local, local_count = _RANGES.unpack(_WORDS.pack(*words))
        return (cluster, cluster_count), (local, local_count)

    def all_words(self) -> bytes:
        """Every range, packed: equal while no selection is another one."""
        return bytes(memoryview(self._words))

    def packed_slots(self, service_ids: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        """The slots of both policies by service id, packed: two copies serve many Services."""
        words, slots = array("I", self.all_words()), bytes(self._slots)
        for number in service_ids:
            cluster, cluster_count, local, local_count = words[number * _RANGE : (number + 1) * _RANGE]
            packed = slots[cluster * _SLOT : (cluster + cluster_count) * _SLOT]
            yield number, packed + slots[local * _SLOT : (local + local_count) * _SLOT]

    def set_range(self, service_id: int, policy: int, used: Range) -> None:
        self._words[service_id * _POLICIES + policy] = _selection_word(*used)

    def slots(self, used: Range) -> array[int]:
        """The words of a range."""
        base, count = used
        return array("Q", self._slots[base * _SLOT : (base + count) * _SLOT].tobytes())

    def write_slots(self, base: int, words: array[int]) -> None:
        self._slots[base * _SLOT : (base + len(words)) * _SLOT] = words.tobytes()


def backend_ids(slots: array[int]) -> array[int]:
    """The backends in the words of slots, in their order, as often as they are in it."""
    ids = array("I", slots.tobytes())
    # ``union slot`` begins with the id.
    return ids[::2]
