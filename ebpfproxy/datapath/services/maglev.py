"""Maglev's lookup table (Eisenbud et al., "Maglev", NSDI 2016, section 3.4).

Every backend visits all places of the table in an order of its own, which a hash of its address gives; in
turns each takes the next free one. So each gets an equal share (or one by weight), the table is the same on
every node, and when a backend goes, few places beside its own get another backend.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Sequence

from ebpfproxy.config.datapath import MAGLEV_SIZES


def size_for(backends: int, size: int) -> int:
    """``size``, or the next larger one in which every backend has a place; at most the largest."""
    return next((each for each in MAGLEV_SIZES if each >= max(size, backends)), MAGLEV_SIZES[-1])


def table(names: Sequence[bytes], weights: Sequence[int], size: int) -> array[int]:
    """Which of ``names`` (sorted, unique) each of ``size`` places belongs to; weights are 1 and more."""
    if not names:
        return array("I")
    order = [_order(name, size) for name in names]
    at = [offset for offset, _ in order]
    skips = [skip for _, skip in order]
    taken, found = bytearray(size), array("I", bytes(4 * size))
    for i in _turns(weights, size):
        place, skip = at[i], skips[i]
        while taken[place]:
            place = (place + skip) % size
        taken[place] = 1
        found[place] = i
        at[i] = (place + skip) % size
    return found


def _turns(weights: Sequence[int], count: int) -> list[int]:
    """The first ``count`` turns: in the first round each backend has one, in later ones by weight.

    The k-th turn of a backend after that is in round k * heaviest / weight, rounded up. Backends without a
    turn in a round are not visited: if one is far heavier than all others, most rounds are like that.
    """
    heaviest, total, several = max(weights), sum(weights), len(weights)
    if min(weights) == heaviest:
        return list(itertools.islice(itertools.cycle(range(several)), count))
    rounds = -(-count * heaviest // total)
    # A number that sorts by round, then by backend.
    turns = [
        -(-k * heaviest // weight) * several + i
        for i, weight in enumerate(weights)
        for k in range(rounds * weight // heaviest + 1)
    ]
    turns.sort()
    return [turn % several for turn in turns[:count]]


def _order(name: bytes, size: int) -> tuple[int, int]:
    """A backend's first place, and its step: with a prime size it visits every place."""
    digest = hashlib.blake2b(name, digest_size=16).digest()
    return (
        int.from_bytes(digest[:8], "big") % size,
        int.from_bytes(digest[8:], "big") % (size - 1) + 1,
    )
