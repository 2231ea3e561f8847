"""Ranges and ids: never handed out twice, and reused as late as possible."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpfproxy.datapath.services.ids import Ids, IdsExhaustedError
from ebpfproxy.datapath.services.ranges import Ranges, RangesExhaustedError


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 20)), max_size=80))
def test_ranges_never_overlap_and_all_come_back(steps: list[tuple[bool, int]]) -> None:
    ranges, used = Ranges(100), dict[int, int]()
    for take, n in steps:
        if take:
            try:
                base = ranges.allocate(n)
            except RangesExhaustedError:
                continue
            taken = {place for b, c in used.items() for place in range(b, b + c)}
            assert not taken & set(range(base, base + n))
            assert base + n <= 100
            used[base] = n
        elif used:
            base = sorted(used)[n % len(used)]
            ranges.release(base, used.pop(base))
        assert ranges.free == 100 - sum(used.values())
    for base, n in used.items():
        ranges.release(base, n)
    assert ranges.allocate(100) == 0, "merged to one"


@given(st.lists(st.integers(1, 10), max_size=9))
def test_adopted_ranges_are_not_handed_out(sizes: list[int]) -> None:
    used, at = [], 0
    for size in sizes:
        used.append((at, size))
        at += size + 1
    ranges = Ranges(120, used)
    while True:
        try:
            place = ranges.allocate(1)
        except RangesExhaustedError:
            break
        assert all(not base <= place < base + count for base, count in used)


def test_ranges_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="overlaps"):
        Ranges(10, [(0, 5), (4, 2)])
    with pytest.raises(ValueError, match="beyond"):
        Ranges(10, [(8, 5)])


def test_a_returned_range_rests_while_there_are_others() -> None:
    ranges = Ranges(10)
    first = ranges.allocate(2)
    ranges.release(first, 2)
    assert ranges.allocate(2) == first, "alone, it is all there is in front"
    ranges.allocate(2)
    ranges.release(first, 2)
    assert ranges.allocate(2) != first


def test_ids_are_fresh_first_and_then_those_that_rested_longest() -> None:
    ids = Ids[str](3, {"old": 1})
    assert [ids.add("a"), ids.add("b")] == [2, 0]
    with pytest.raises(IdsExhaustedError):
        ids.add("c")
    for key in ("old", "a"):
        ids.give_back(ids.forget(key))
    assert [ids.add("c"), ids.add("d")] == [1, 2]
