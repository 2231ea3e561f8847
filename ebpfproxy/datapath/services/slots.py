"""The contents of a selection's slots, by algorithm, so that programs have little to compute.

Without weights each backend has one slot. If loads decide, the slot has the weight. Maglev has its table. In
all other cases a backend has as many slots as its weight says, spread evenly: taken in turn they are a smooth
weighted round robin; taken at random or by a hash they are the weighted version of that.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from ebpfproxy.datapath.abi import layout
from ebpfproxy.datapath.abi.schema import SEARCHED_SLOTS
from ebpfproxy.datapath.services import maglev
from ebpfproxy.services.model import Algorithm, Backend

#: Weights that would need more slots are approximated (but each backend has one).
MOST_SLOTS = 1 << 17
#: An enumeration looks for each of its members anew (until Python 3.12), which takes longer than a call.
_MAGLEV = Algorithm.MAGLEV


class Source(NamedTuple):
    """What slots are made from; the fields are the arguments of :func:`slots_of`."""

    algorithm: Algorithm
    backends: Sequence[Backend]
    ids: array[int]
    weights: Sequence[int] | None
    table_size: int

    @property
    def fingerprint(self) -> int | None:
        """A hash of slots that take long to make, so that the same are not made again; None for others."""
        if not self.weights and self.algorithm is not _MAGLEV:
            return None
        return hash((self.algorithm, self.table_size, self.ids.tobytes(), tuple(self.weights or ())))

    @property
    def size(self) -> int:
        """How many slots a table that takes long to make has; 0 elsewhere."""
        if self.algorithm is not _MAGLEV or len(self.ids) < 2:
            return 0
        return maglev.size_for(len(self.ids), self.table_size)

    def slots(self) -> array[int]:
        return slots_of(*self)


def slots_of(
    algorithm: Algorithm,
    backends: Sequence[Backend],
    ids: array[int],
    weights: Sequence[int] | None,
    table_size: int,
) -> array[int]:
    """The slots' words. ``backends`` are sorted, ``ids`` and ``weights`` in their order; weights from 1."""
    if algorithm is _MAGLEV and len(ids) > 1:
        names = [b.address + b.port.to_bytes(2, "big") + bytes((b.protocol,)) for b in backends]
        size = maglev.size_for(len(names), table_size)
        return array("Q", map(ids.__getitem__, maglev.table(names, weights or [1] * len(names), size)))
    if not weights or min(weights) == max(weights):
        return ids
    if algorithm.looks_at_loads:
        weighted = array("Q", map(layout.slot, ids, weights))
        if len(ids) <= SEARCHED_SLOTS:
            return weighted
        # Two are drawn by chance: by weight, or a heavy one would hardly ever be among them.
        ids = weighted
    return array("Q", map(ids.__getitem__, spread(shares(weights))))


def shares(weights: Sequence[int]) -> list[int]:
    """How many slots each has: the weights in lowest terms, or nearly so if those were too many."""
    divisor = math.gcd(*weights)
    lowest = [weight // divisor for weight in weights]
    most = max(MOST_SLOTS, 4 * len(weights))
    total = sum(lowest)
    if total <= most:
        return lowest
    return [max(1, round(weight * most / total)) for weight in lowest]


def spread(counts: Sequence[int]) -> list[int]:
    """Indexes, each as often as its count says, and as evenly as can be."""
    places = [((2 * n + 1) / count, i) for i, count in enumerate(counts) for n in range(count)]
    places.sort()
    return [i for _, i in places]
