"""The writer ends the validity of what programs have cached, also if it is killed within a change."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

from ebpfproxy.datapath.abi.arrays import Selections
from tests.datapath.writing import Bench, port

pytestmark = pytest.mark.root


def test_ranges_that_programs_have_cached_are_not_used_again_while_they_may_be_read(bench: Bench) -> None:
    """They count no more once the range is free; a start waits for programs that an agent's kill left with some."""
    writer = bench.empty()
    assert bench.maps is not None
    writer.apply([port("a", [1])])
    writer.apply([port("a", [2])])
    retired, words = writer.take_retired(), bench.maps.shared("range_generations").words()
    (number,) = retired.selected
    before, free = words[number], writer.free_slots
    assert before & 1 == 0
    writer.reclaim(retired)
    assert words[number] == before + 2
    assert writer.free_slots > free
    seen: list[int] = []
    with patch.object(bench.grace, "wait", side_effect=lambda: seen.append(1)):
        del words
        bench.reopen()
        assert seen == [1]
        bench.empty()
        assert seen == [1]


def test_kill_between_store_and_renewal_leaves_lines_that_do_not_count(bench: Bench) -> None:
    writer = bench.empty()
    writer.apply([port("a", [1])], complete=True)
    assert bench.maps is not None
    frontends = bench.maps.shared("frontend_generation").words()
    ranges = bench.maps.shared("range_generations").words()
    assert not any(word & 1 for word in (*frontends, *ranges))
    number = bench.service_ids[port("a", [1]).key]
    seen: list[tuple[str, int, int]] = []

    def look(name: str) -> None:
        seen.append((name, frontends[0] & 1, ranges[number] & 1))

    table, delete = bench.maps["services4"], bench.maps["services4"].delete
    store = Selections.set_range

    def deleted(key: bytes) -> None:
        delete(key)
        look("delete")

    def stored(*args: Any) -> None:
        store(*args)
        look("store")

    with patch.object(table, "delete", deleted), patch.object(Selections, "set_range", stored):
        writer.apply([port("a", [2])])
        writer.apply([], complete=True)
    # The entry for all other ports of a cluster IP is deleted, too, which nobody caches.
    assert (
        {("store", 0, 1), ("delete", 1, 0)}
        <= set(seen)
        <= {("store", 0, 1), ("delete", 1, 0), ("delete", 0, 0)}
    )
    assert not any(word & 1 for word in (*frontends, *ranges))
