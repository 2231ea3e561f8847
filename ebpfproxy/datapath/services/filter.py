"""Filters that tell packet programs which packets need a look-up (``bpf/lib/filter.h``).

They have a bit for each number: of a port that is the port itself, of an address it is a hash (a Bloom filter
of one hash). They may have false positives, but no false negatives.
"""

from __future__ import annotations

import struct
from collections import Counter

from ebpfproxy.datapath.abi.layout import pack_address
from ebpfproxy.datapath.abi.schema import ADDRESS_FILTER_BITS
from ebpfproxy.datapath.kernel.bpf_map import SharedArray

_WORDS = struct.Struct("=4I")
_GOLDEN = 0x9E3779B1
_PORT_FACTOR = 0x165667B1
_MASK = 0xFFFFFFFF


def address_hash(address: bytes) -> int:
    """The number of an address; ``address_of_interest`` in C computes the same."""
    return (_fold(address) * _GOLDEN & _MASK) >> (32 - ADDRESS_FILTER_BITS)


def backend_hash(address: bytes, port: int) -> int:
    """The number of a backend; ``may_be_backend`` in C computes the same."""
    return ((_fold(address) + port * _PORT_FACTOR) * _GOLDEN & _MASK) >> (32 - ADDRESS_FILTER_BITS)


def _fold(address: bytes) -> int:
    first, second, third, last = _WORDS.unpack(pack_address(address))
    return int(last + third * 0x85EBCA6B + second * 0xC2B2AE35 + first * 0x27D4EB2F)


def set_bit(memory: SharedArray, number: int) -> None:
    at, bit = number >> 3, 1 << (number & 7)
    byte = memory.keep()[at]
    if not byte & bit:
        memory.store(at, bytes((byte | bit,)))


class BitFilter:
    """Counts the users of each bit, so that one can be removed. One thread uses it."""

    def __init__(self, memory: SharedArray) -> None:
        self._memory = memory
        memory.keep()
        self._wanted: Counter[int] = Counter()

    def add(self, number: int) -> None:
        """Sets the number's bit."""
        self._wanted[number] += 1
        if self._wanted[number] == 1:
            set_bit(self._memory, number)

    def remove(self, number: int) -> None:
        """Undoes one :meth:`add`."""
        self._wanted[number] -= 1
        if not self._wanted[number]:
            del self._wanted[number]
            byte = self._memory.keep()[number >> 3]
            self._memory.store(number >> 3, bytes((byte & ~(1 << (number & 7)),)))

    def drop_leftovers(self) -> None:
        """Clears bits that an earlier agent has left."""
        wanted = bytearray(self._memory.stride)
        for number in self._wanted:
            wanted[number >> 3] |= 1 << (number & 7)
        if any(memory[: len(wanted)] != wanted for memory in (self._memory.keep(), self._memory.bytes)):
            self._memory.store(0, bytes(wanted))
