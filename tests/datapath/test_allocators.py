"""Allocation of ranges and ids, which are never allocated twice and reused as late as possible."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpfproxy.datapath.services.ids import Ids, IdsExhaustedError
from ebpfproxy.datapath.services.ranges import Ranges, RangesExhaustedError


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 20)), max_size=80))
def test_ranges_never_overlap_and_are_all_released(steps: list[tuple[bool, int]]) -> None:
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
    assert ranges.allocate(100) == 0, "free ranges are merged"


@given(st.lists(st.integers(1, 10), max_size=9))
def test_adopted_ranges_are_not_allocated(sizes: list[int]) -> None:
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


def test_invalid_ranges_are_rejected() -> None:
    with pytest.raises(ValueError, match="overlaps"):
        Ranges(10, [(0, 5), (4, 2)])
    with pytest.raises(ValueError, match="beyond"):
        Ranges(10, [(8, 5)])


def test_released_range_is_reused_last() -> None:
    ranges = Ranges(10)
    first = ranges.allocate(2)
    ranges.release(first, 2)
    assert ranges.allocate(2) == first, "it is the first free range"
    ranges.allocate(2)
    ranges.release(first, 2)
    assert ranges.allocate(2) != first


def test_unused_ids_come_first_and_then_the_least_recently_released() -> None:
    ids = Ids[str](3, {"old": 1})
    assert [ids.add("a"), ids.add("b")] == [2, 0]
    with pytest.raises(IdsExhaustedError):
        ids.add("c")
    for key in ("old", "a"):
        ids.give_back(ids.forget(key))
    assert [ids.add("c"), ids.add("d")] == [1, 2]


def test_ids_for_several_keys_are_for_all_or_none() -> None:
    ids: Ids[str] = Ids(4)
    assert list(ids.add_all("abc")) == [0, 1, 2]
    ids.give_back(ids.forget("b"))
    with pytest.raises(IdsExhaustedError):
        ids.add_all("def")
    assert [ids.get(each) for each in "abcdef"] == [0, None, 2, None, None, None]
    assert list(ids.add_all("de")) == [3, 1]
    assert [ids.get(each) for each in "de"] == [3, 1]


def test_keys_without_an_id_get_the_next_ones_in_a_row() -> None:
    ids = Ids[str](6, {"b": 1})
    assert ids.has_fresh(4)
    assert not ids.has_fresh(5)
    assert ids.add_missing("abacb") == (2, ["a", "c"])
    assert [ids.get(each) for each in "abc"] == [2, 1, 3]
    assert ids.add_missing("cab") == (4, [])
    assert [ids.add("d"), ids.add("e"), ids.add("f")] == [4, 5, 0]


def test_an_id_that_is_held_waits_for_its_turn() -> None:
    ids: Ids[str] = Ids(3)
    assert [ids.add(each, {1}) for each in "ab"] == [0, 2]
    # None is left but that.
    assert ids.add("c", {1}) == 1
    for each in "abc":
        ids.give_back(ids.forget(each))
    assert [ids.add(each, {0}) for each in "abc"] == [2, 1, 0]
    with pytest.raises(IdsExhaustedError):
        ids.add("d", {0})
