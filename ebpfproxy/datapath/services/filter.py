"""Filters that tell packet programs which packets need a look-up (``bpf/lib/filter.h``).

They have a bit for each number: of a port that is the port itself, of an address it is a hash (a Bloom filter
of one hash). They may have false positives, but no false negatives.
"""

from __future__ import annotations

import struct
from collections import Counter

from ebpfproxy.datapath.abi.layout import pack_address
from ebpfproxy.datapath.abi.schema import ADDRESS_FILTER_BITS
from ebpfproxy.datapath.kernel.maps import SharedArray

_WORDS = struct.Struct("=4I")
_GOLDEN = 0x9E3779B1
_FACTORS = (0x27D4EB2F, 0xC2B2AE35, 0x85EBCA6B, 1)
_MASK = 0xFFFFFFFF


def address_hash(address: bytes) -> int:
    """The number of an address; ``address_of_interest`` in C computes the same."""
    words: tuple[int, ...] = _WORDS.unpack(pack_address(address))
    folded = sum(word * factor for word, factor in zip(words, _FACTORS, strict=True))
    return (folded * _GOLDEN & _MASK) >> (32 - ADDRESS_FILTER_BITS)


class BitFilter:
    """Counts the users of each bit, so that one can be removed. One thread uses it."""

    def __init__(self, memory: SharedArray) -> None:
        self._memory = memory
        self._wanted: Counter[int] = Counter()

    def add(self, number: int) -> None:
        """Sets the number's bit."""
        self._wanted[number] += 1
        if self._wanted[number] == 1:
            at, bit = number >> 3, 1 << (number & 7)
            byte = self._memory.bytes[at]
            if not byte & bit:
                self._memory.bytes[at] = byte | bit
                self._memory.writes += 1

    def remove(self, number: int) -> None:
        """Undoes one :meth:`add`."""
        self._wanted[number] -= 1
        if not self._wanted[number]:
            del self._wanted[number]
            self._memory.bytes[number >> 3] &= ~(1 << (number & 7))
            self._memory.writes += 1

    def drop_leftovers(self) -> None:
        """Clears bits that an earlier agent has left."""
        wanted = bytearray(self._memory.stride)
        for number in self._wanted:
            wanted[number >> 3] |= 1 << (number & 7)
        if self._memory.bytes[: len(wanted)] != wanted:
            self._memory.bytes[: len(wanted)] = wanted
            self._memory.writes += 1
