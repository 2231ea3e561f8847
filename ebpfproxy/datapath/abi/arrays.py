"""Arrays that programs and agent share through memory, as records: the only place that knows their offsets.

Each class is a view of a map's memory (``kernel.maps.SharedArray``), without any state of its own.
"""

from __future__ import annotations

import ctypes as ct
import struct
from array import array
from collections.abc import Iterator

from ebpfproxy.datapath.abi import layout
from ebpfproxy.services.model import Backend, BackendState

_BACKEND, _SLOT = layout.BACKEND_SIZE, layout.SLOT_SIZE
_FREE = bytes(_BACKEND)
#: The selections of both policies, as they are stored and as ranges.
_WORDS, _RANGES = struct.Struct("=QQ"), struct.Struct("=IIII")
#: Base and count; (0, 0) if empty.
Range = tuple[int, int]
_NO_LOAD = memoryview(bytes(layout.LOAD_SIZE)).cast("I")


class BackendRecords:
    """The ``backends`` map: ``struct backend`` by backend id."""

    def __init__(self, memory: memoryview, places: int) -> None:
        # A mapping ends with its page: after the last place there are zeros that belong to no place.
        self._memory = memory[: places * _BACKEND]

    def __len__(self) -> int:
        return len(self._memory) // _BACKEND

    def read(self, number: int) -> tuple[Backend, BackendState] | None:
        """Reads a record; None for an id that is free, or that the map has no place for."""
        packed = self._memory[number * _BACKEND : (number + 1) * _BACKEND]
        return layout.unpack_backend(bytes(packed)) if packed else None

    def ids(self) -> list[int]:
        """The ids that are in use. One byte tells a free place, which saves unpacking it."""
        protocols = bytes(self._memory[layout.BACKEND_PROTOCOL_OFFSET :: _BACKEND])
        return [number for number, protocol in enumerate(protocols) if protocol]

    def identities(self) -> Iterator[tuple[int, bytes]]:
        """Ids, each with what names the backend in maps of any size: address, port and protocol, packed."""
        for number in self.ids():
            yield number, bytes(self._memory[number * _BACKEND :][: layout.BACKEND_STATE_OFFSET])

    def state(self, number: int) -> int:
        """The state of a backend: a value of BackendState."""
        return self._memory[number * _BACKEND + layout.BACKEND_STATE_OFFSET]

    def set_state(self, number: int, state: BackendState) -> None:
        self._memory[number * _BACKEND + layout.BACKEND_STATE_OFFSET] = state

    def write(self, number: int, backend: Backend, state: BackendState) -> None:
        self._memory[number * _BACKEND : (number + 1) * _BACKEND] = layout.pack_backend(backend, state)

    def clear(self, number: int) -> None:
        self._memory[number * _BACKEND : (number + 1) * _BACKEND] = _FREE


class Loads:
    """The ``loads`` map: ``struct load`` by backend id, of 32-bit words that wrap.

    Programs write all words but two: the agent has ``sockets_carried`` and ``flows_corrected`` for itself.
    """

    def __init__(self, memory: memoryview, places: int) -> None:
        self._words = memory[: places * layout.LOAD_SIZE].cast("I")

    def __len__(self) -> int:
        return len(self._words) // layout.LOAD_WORDS

    def __getitem__(self, number: int) -> layout.Load:
        at = number * layout.LOAD_WORDS
        return layout.load_of(self._words[at : at + layout.LOAD_WORDS])

    def carry(self, number: int, sockets: int) -> None:
        """Counts sockets that no program counts (or, below 0, no longer)."""
        self._add(number, layout.LOAD_CARRIED, sockets)

    def correct(self, number: int, flows: int) -> None:
        """Counts flows that programs have not counted (or, below 0, did not see end)."""
        self._add(number, layout.LOAD_CORRECTED, flows)

    def _add(self, number: int, word: int, step: int) -> None:
        at = number * layout.LOAD_WORDS + word
        self._words[at] = self._words[at] + step & 0xFFFFFFFF

    def clear(self, number: int) -> None:
        self._words[number * layout.LOAD_WORDS : (number + 1) * layout.LOAD_WORDS] = _NO_LOAD

    def with_flows(self, end: int) -> Iterator[int]:
        """The ids below ``end`` for which programs have ever counted a flow."""
        begun = self._words[layout.LOAD_BEGUN : end * layout.LOAD_WORDS : layout.LOAD_WORDS]
        return (number for number, count in enumerate(begun) if count)


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

    def set_range(self, service_id: int, policy: int, used: Range) -> None:
        self._words[service_id * layout.POLICIES + policy] = layout.selection_word(*used)

    def slots(self, used: Range) -> array[int]:
        """The words of a range."""
        base, count = used
        return array("Q", bytes(self._slots[base * _SLOT : (base + count) * _SLOT]))

    def write_slots(self, base: int, words: array[int]) -> None:
        self._slots[base * _SLOT : (base + len(words)) * _SLOT] = words.tobytes()


def backend_ids(slots: array[int]) -> array[int]:
    """The backends in the words of slots, in their order, as often as they are in it."""
    ids = array("I", slots.tobytes())
    # ``union slot`` begins with the id.
    return ids[::2]
