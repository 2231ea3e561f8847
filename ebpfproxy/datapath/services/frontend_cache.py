"""The cache of frontends (bpf/lib/frontend_cache.h): what ends its validity, and what fills it again.

Programs cache what they look up. A node that asks for many Services, and for each rarely, would look up most
of them after each change: so the agent reads the tables then, and has a program cache all of them.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

from ebpfproxy.datapath.abi import layout
from ebpfproxy.datapath.kernel.barrier import barrier
from ebpfproxy.datapath.kernel.maps import MapSet

#: A bit of both kinds of numbers (GENERATION_CHANGING of bpf/lib/service_types.h).
_CHANGING = 1
#: Between a key and its value in struct frontend_read of bpf/lib/service_types.h.
_RESERVED = bytes(4)


def generation(maps: MapSet) -> int:
    """What lines are valid for. It is never the same again."""
    return int(maps.shared("frontend_generation").words()[0])


@contextmanager
def changing_frontends(maps: MapSet) -> Iterator[None]:
    """Changes of the tables are within it, by the thread that writes them.

    Before them programs are told to cache nothing, and afterwards that frontends have changed. An agent that
    is killed in between leaves programs that look up everything, until the next one has started.
    """
    words = maps.shared("frontend_generation").words()
    words[0] |= _CHANGING
    barrier()
    try:
        yield
    finally:
        barrier()
        # It is random: nobody can choose a frontend for which a line that is not whole looks as if it were.
        words[0] = secrets.randbits(63) << 1


def renew_frontends(maps: MapSet) -> None:
    """Tells programs that frontends may have changed: what they have cached of the tables counts no more."""
    with changing_frontends(maps):
        pass


@contextmanager
def changing_ranges(
    maps: MapSet, service_ids: Iterable[int] = range(layout.RANGE_GENERATIONS)
) -> Iterator[None]:
    """The same for ranges of these service ids, or of all, and the thread that writes ``selections``."""
    words = maps.shared("range_generations").words()
    places = {number % layout.RANGE_GENERATIONS for number in service_ids}
    for place in places:
        words[place] |= _CHANGING
    barrier()
    try:
        yield
    finally:
        barrier()
        for place in places:
            words[place] += 1


def renew_ranges(maps: MapSet, service_ids: Iterable[int] = range(layout.RANGE_GENERATIONS)) -> None:
    """Ends the validity of what programs have cached of ranges of these ids, or of all."""
    with changing_ranges(maps, service_ids):
        pass


def frontends_to_cache(maps: MapSet) -> Iterator[tuple[bytes, int]]:
    """What the tables have, as ``RecordPrograms.cache`` takes it. Any thread may ask."""
    # It is read before what it stands for: what changes meanwhile is cached in vain.
    header = layout.FRONTENDS_READ_HEADER.pack(generation(maps), 0, 0)
    barrier()
    for name, prefix in (("services4", layout.MAPPED), ("services6", b"")):
        found = (prefix + key + _RESERVED + value for key, value in maps[name].items())
        while some := list(islice(found, layout.FRONTENDS_READ)):
            yield header + b"".join(some), len(some)
