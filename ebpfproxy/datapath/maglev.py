"""Maglev's lookup table (Eisenbud et al., "Maglev", NSDI 2016, section 3.4).

Every backend goes through all places of the table in an order of its own, which a hash of its address gives;
in turns each takes the next that is free. So each gets an equal share (or one by weight), the table is the
same on every node, and when a backend goes, hardly more than its own places change hands.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
from array import array
from collections.abc import Iterator, Sequence

#: Primes, as Cilium's option has them.
SIZES = (251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65521, 131071)
DEFAULT_SIZE = 16381


def size_for(backends: int, size: int) -> int:
    """``size``, or the next in which every backend has a place; the largest for still more."""
    return next((each for each in SIZES if each >= max(size, backends)), SIZES[-1])


def table(names: Sequence[bytes], weights: Sequence[int], size: int) -> array[int]:
    """Which of ``names`` (sorted, unique) each of ``size`` places belongs to; weights are 1 and more."""
    if not names:
        return array("I")
    order = [_order(name, size) for name in names]
    at = [offset for offset, _ in order]
    skips = [skip for _, skip in order]
    taken, found = bytearray(size), array("I", bytes(4 * size))
    for i in itertools.islice(_turns(weights), size):
        place, skip = at[i], skips[i]
        while taken[place]:
            place = (place + skip) % size
        taken[place] = 1
        found[place] = i
        at[i] = (place + skip) % size
    return found


def _turns(weights: Sequence[int]) -> Iterator[int]:
    """Whose turn it is, without end: in the first round everybody's, then by weight.

    The k-th turn after that of a backend is in round k * heaviest / weight.
    """
    heaviest = max(weights)
    if min(weights) == heaviest:
        yield from itertools.cycle(range(len(weights)))
    heap = [(0, i) for i in range(len(weights))]
    turns = [0] * len(weights)
    while True:
        i = heap[0][1]
        turns[i] += 1
        heapq.heapreplace(heap, (-(-turns[i] * heaviest // weights[i]), i))
        yield i


def _order(name: bytes, size: int) -> tuple[int, int]:
    """Where a backend begins, and by how much it goes on: a size that is prime makes it meet every place."""
    digest = hashlib.blake2b(name, digest_size=16).digest()
    return (
        int.from_bytes(digest[:8], "big") % size,
        int.from_bytes(digest[8:], "big") % (size - 1) + 1,
    )
