"""Filters that tell packet programs which packets need a look-up (``bpf/lib/filter.h``).

They have a bit for each number: of a port that is the port itself, of an address it is a hash (a Bloom filter
of one hash). They may have false positives, but no false negatives.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable, Sequence

from ebpfproxy.datapath.abi.layout import BACKEND, pack_address
from ebpfproxy.datapath.abi.schema import ADDRESS_FILTER_BITS
from ebpfproxy.datapath.kernel.bpf_map import SharedArray

_WORDS = struct.Struct("=4I")
#: Factors of the words of an address, but for the last.
_FACTORS = _FIRST, _SECOND, _THIRD = 0x27D4EB2F, 0xC2B2AE35, 0x85EBCA6B
_GOLDEN = 0x9E3779B1
_PORT_FACTOR = 0x165667B1
_MASK = 0xFFFFFFFF
_SHIFT = 32 - ADDRESS_FILTER_BITS
#: In 64 bits: the place of the lower 32, those of the two lowest bytes, and ones in the lower half.
_LOWER, _LOWEST, _LOWER_HALF = (
    (0, (0, 1), b"\xff" * 4 + bytes(4)) if sys.byteorder == "little" else (1, (7, 6), bytes(4) + b"\xff" * 4)
)
#: From this many on, bits are set faster as one large number.
_MANY = 1 << 13


def address_hash(address: bytes) -> int:
    """The number of an address; ``address_of_interest`` in C computes the same."""
    return (_fold(pack_address(address)) * _GOLDEN & _MASK) >> _SHIFT


def backend_hashes(records: Sequence[bytes]) -> list[int]:
    """The numbers of backends, by their packed records; ``may_be_backend`` in C computes the same.

    All are computed at once, in one large number with 64 bits for each: one by one takes ten times as long.
    """
    count, size = len(records), BACKEND.size
    packed = b"".join(records)
    words = memoryview(packed).cast("I")
    step = size // words.itemsize

    def lanes(word: int) -> int:
        found = memoryview(bytearray(8 * count)).cast("I")
        found[_LOWER::2] = words[word::step]
        return int.from_bytes(found, sys.byteorder)

    ports = bytearray(8 * count)
    ports[_LOWEST[0] :: 8], ports[_LOWEST[1] :: 8] = packed[17::size], packed[16::size]
    lower = int.from_bytes(_LOWER_HALF * count, sys.byteorder)
    folded = lanes(3) + sum(lanes(word) * factor & lower for word, factor in enumerate(_FACTORS))
    folded += int.from_bytes(ports, sys.byteorder) * _PORT_FACTOR
    hashes = ((folded & lower) * _GOLDEN & lower) >> _SHIFT
    return memoryview(hashes.to_bytes(8 * count, sys.byteorder)).cast("I")[_LOWER::2].tolist()


def _fold(packed: bytes) -> int:
    first, second, third, last = _WORDS.unpack(packed)
    return int(last + third * _THIRD + second * _SECOND + first * _FIRST)


class Bits:
    """A bit for each number. One thread uses it."""

    def __init__(self, memory: SharedArray) -> None:
        self._memory = memory
        self._kept, self._shown = memory.keep(), memory.bytes

    def set(self, numbers: Iterable[int]) -> None:
        kept, shown, written = self._kept, self._shown, 0
        for number in numbers:
            at, bit = number >> 3, 1 << (number & 7)
            byte = kept[at]
            if not byte & bit:
                kept[at] = shown[at] = byte | bit
                written += 1
        self._memory.writes += written

    def set_all(self, numbers: Sequence[int]) -> None:
        """The same for many, of which most may be new."""
        if len(numbers) < _MANY:
            self.set(numbers)
            return
        size = self._memory.stride
        flags = bytearray(8 * size)
        for number in numbers:
            flags[number] = 1
        bits = int.from_bytes(self._kept[:size], "little")
        for bit in range(8):
            bits |= int.from_bytes(flags[bit::8], "little") << bit
        self._memory.store(0, bits.to_bytes(size, "little"))

    def clear(self, number: int) -> None:
        at = number >> 3
        self._kept[at] &= ~(1 << (number & 7))
        self._shown[at] = self._kept[at]
        self._memory.writes += 1

    def replace(self, numbers: Iterable[int]) -> None:
        """Sets the bits of these numbers and no others, if that makes any difference."""
        wanted = bytearray(self._memory.stride)
        for number in numbers:
            wanted[number >> 3] |= 1 << (number & 7)
        if any(memory[: len(wanted)] != wanted for memory in (self._kept, self._shown)):
            self._memory.store(0, bytes(wanted))


class BitFilter:
    """Counts the users of each bit, so that one can be removed. One thread uses it."""

    def __init__(self, memory: SharedArray) -> None:
        self._bits = Bits(memory)
        self._wanted: dict[int, int] = {}

    def add(self, number: int) -> None:
        """Sets the number's bit."""
        count = self._wanted.get(number, 0)
        self._wanted[number] = count + 1
        if not count:
            self._bits.set((number,))

    def add_all(self, numbers: Iterable[int]) -> None:
        """The same for many: those that are new get their bits together."""
        wanted, new = self._wanted, []
        for number in numbers:
            count = wanted.get(number, 0)
            wanted[number] = count + 1
            if not count:
                new.append(number)
        self._bits.set_all(new)

    def remove(self, number: int) -> None:
        """Undoes one :meth:`add`."""
        self._wanted[number] -= 1
        if not self._wanted[number]:
            del self._wanted[number]
            self._bits.clear(number)

    def drop_leftovers(self) -> None:
        """Clears bits that an earlier agent has left."""
        self._bits.replace(self._wanted)
