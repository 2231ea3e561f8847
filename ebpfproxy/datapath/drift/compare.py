"""What a table should hold, compared with what it holds: pure, without access to any map."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping
from itertools import starmap
from operator import add
from typing import NamedTuple

_MASK = 0xFFFFFFFFFFFFFFFF


class Kind(enum.StrEnum):
    """How an entry differs from what the agent has written."""

    MISSING = "missing"
    FOREIGN = "foreign"
    CHANGED = "changed"


class Difference(NamedTuple):
    """An entry that differs. ``key`` is packed; of an array it is the offset in the copy, as 8 bytes.

    ``wanted`` is None for a foreign entry, ``found`` for a missing one. In an array both have as many bytes
    as an entry of the copy, and zeros stand for no entry.
    """

    map: str
    kind: Kind
    key: bytes
    wanted: bytes | None
    found: bytes | None


def digest(entries: Iterable[tuple[bytes, bytes]]) -> int:
    """A number that is the same for the same entries in any order. Others of the same sizes have another.

    Python's hash of bytes has a secret of this process, so that nobody else finds entries with the same sum.
    That of tuples is no use: it is nearly linear, and two entries that swap their values often have the same
    sum as before.
    """
    return sum(map(hash, starmap(add, entries))) & _MASK


def differences(
    name: str, wanted: Mapping[bytes, bytes], found: Iterable[tuple[bytes, bytes]]
) -> Iterator[Difference]:
    """The entries in which a map differs from what is wanted."""
    left = dict(wanted)
    for key, value in found:
        right = left.pop(key, None)
        if right is None:
            # A map that changes while it is read may give an entry twice.
            if key not in wanted:
                yield Difference(name, Kind.FOREIGN, key, None, value)
        elif right != value:
            yield Difference(name, Kind.CHANGED, key, right, value)
    for key, value in left.items():
        yield Difference(name, Kind.MISSING, key, value, None)


def differing_elements(name: str, base: int, size: int, wanted: bytes, found: bytes) -> Iterator[Difference]:
    """The elements in which parts of an array differ, of ``size`` bytes. ``base``: the parts' offset."""
    nothing = bytes(size)
    for at in range(0, len(wanted), size):
        left, right = wanted[at : at + size], found[at : at + size]
        if left == right:
            continue
        kind = Kind.CHANGED
        if left == nothing:
            kind = Kind.FOREIGN
        elif right == nothing:
            kind = Kind.MISSING
        yield Difference(name, kind, (base + at).to_bytes(8, "big"), left, right)
