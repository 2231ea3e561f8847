"""Slots follow weights, are spread evenly, and depend on the algorithm."""

from __future__ import annotations

import itertools
import math
from array import array
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpfproxy.config.datapath import MAGLEV_SIZES
from ebpfproxy.datapath.abi.schema import SEARCHED_SLOTS
from ebpfproxy.datapath.services.slots import MOST_SLOTS, shares, slots_of, spread
from ebpfproxy.services.model import Algorithm, Backend, Protocol
from tests.datapath.writing import slot_backend, slot_weight

TABLE = MAGLEV_SIZES[0]
MANY = SEARCHED_SLOTS + 3
#: Algorithms for which the weight is the number of slots of a backend, for any number of backends.
IN_SLOTS = [a for a in Algorithm if not a.looks_at_loads and a is not Algorithm.MAGLEV]
BY_LOAD = [a for a in Algorithm if a.looks_at_loads]

counts = st.lists(st.integers(1, 30), min_size=1, max_size=12)


def backends(number: int) -> list[Backend]:
    return [Backend(bytes([10, 0, n >> 8, n & 255]), 80, Protocol.TCP) for n in range(number)]


def ids(number: int) -> array[int]:
    """Returns ids in descending order, as ids have no order in use."""
    return array("Q", (10000 - 7 * n for n in range(number)))


def made(algorithm: Algorithm, number: int, weights: list[int] | None) -> array[int]:
    return slots_of(algorithm, backends(number), ids(number), weights, TABLE)


# -- shares


@given(st.lists(st.integers(1, 65535), min_size=1, max_size=40), st.integers(1, 50))
def test_shares_are_weights_in_lowest_terms(weights: list[int], factor: int) -> None:
    found = shares(weights)
    assert shares([factor * weight for weight in weights]) == found
    if sum(weights) <= MOST_SLOTS:
        divisor = math.gcd(*weights)
        assert [divisor * share for share in found] == weights
        assert math.gcd(*found) == 1


@given(st.lists(st.integers(1, 65535), min_size=3, max_size=200))
def test_shares_of_weights_that_exceed_the_slots_are_approximate(weights: list[int]) -> None:
    """Each share is rounded to an integer of at least 1, so that the sum is close to MOST_SLOTS."""
    weights = [*weights, 65521, 65535, 65534]
    found = shares(weights)
    assert sum(weights) // math.gcd(*weights) > MOST_SLOTS
    for weight, share in zip(weights, found, strict=True):
        exact = weight * MOST_SLOTS / sum(weights)
        assert share == 1 or abs(share - exact) <= 0.5
        assert share >= 1
    assert abs(sum(found) - MOST_SLOTS) <= len(weights)


def test_smallest_weight_of_many_has_a_slot() -> None:
    few = shares([1] + [65535] * 100)
    assert few[0] == 1
    assert sum(few) <= MOST_SLOTS + 101
    many = shares([65535] * 1000 + [1] * 49000)
    assert min(many) == 1
    assert sum(many) <= 5 * 50000


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1], [1]),
        ([65535], [1]),
        ([65535, 65535], [1, 1]),
        ([10, 20, 30], [1, 2, 3]),
        ([3, 5], [3, 5]),
        ([65535, 1], [65535, 1]),
    ],
)
def test_small_weights_are_exact(weights: list[int], expected: list[int]) -> None:
    assert shares(weights) == expected


# -- spread


@given(counts)
def test_each_cycle_has_as_many_places_as_the_count(counts: list[int]) -> None:
    """As many successive choices as there are places follow the weights exactly, from any start."""
    found = spread(counts)
    wanted = dict(enumerate(counts))
    for start in range(len(found)):
        assert Counter(found[start:] + found[:start]) == wanted
    for start in (0, len(found) // 2, len(found) - 1):
        window = list(itertools.islice(itertools.cycle(found), start, start + 3 * len(found)))
        assert Counter(window) == {i: 3 * count for i, count in wanted.items()}


@given(counts)
def test_places_within_a_cycle_follow_the_share(counts: list[int]) -> None:
    """After any number of choices the difference to the exact share is at most half a choice and half a weighted round."""
    found = spread(counts)
    for i, count in enumerate(counts):
        part = count / len(found)
        bound = 0.5 + len(counts) * part / 2 + 1e-9
        done = 0
        for turn, each in enumerate(found, 1):
            done += each == i
            assert abs(done - turn * part) <= bound


@given(st.integers(1, 30), st.integers(1, 30))
def test_equal_counts_are_round_robin(number: int, count: int) -> None:
    assert spread([count] * number) == [*range(number)] * count


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([], []),
        ([1], [0]),
        ([2, 1], [0, 1, 0]),
        ([3, 1], [0, 0, 1, 0]),
        ([4, 2, 1], [0, 1, 0, 2, 0, 1, 0]),
        ([1, 5], [1, 1, 0, 1, 1, 1]),
    ],
)
def test_places_of_one_backend_are_spread(counts: list[int], expected: list[int]) -> None:
    assert spread(counts) == expected


# -- slots_of


@pytest.mark.parametrize("algorithm", Algorithm)
@pytest.mark.parametrize("weights", [None, []])
def test_no_backends_have_no_slots(algorithm: Algorithm, weights: list[int] | None) -> None:
    assert made(algorithm, 0, weights) == array("Q")


@pytest.mark.parametrize("algorithm", Algorithm)
@pytest.mark.parametrize("weights", [None, [1], [65535]])
def test_one_backend_has_one_slot(algorithm: Algorithm, weights: list[int] | None) -> None:
    assert made(algorithm, 1, weights) == ids(1)


@pytest.mark.parametrize("algorithm", [*IN_SLOTS, *BY_LOAD])
@pytest.mark.parametrize("number", [2, MANY])
@pytest.mark.parametrize("weight", [None, 1, 5, 65535])
def test_without_weights_or_with_equal_ones_each_has_a_slot(
    algorithm: Algorithm, number: int, weight: int | None
) -> None:
    """Weight 0 in a slot means no weight."""
    assert made(algorithm, number, None if weight is None else [weight] * number) == ids(number)


@pytest.mark.parametrize("algorithm", IN_SLOTS)
@given(weights=st.lists(st.sampled_from([1, 2, 4, 6, 100]), min_size=2, max_size=20))
def test_weight_is_the_number_of_slots(algorithm: Algorithm, weights: list[int]) -> None:
    found = Counter(made(algorithm, len(weights), weights))
    divisor = math.gcd(*weights)
    assert found == {
        number: weight // divisor for number, weight in zip(ids(len(weights)), weights, strict=True)
    }


@pytest.mark.parametrize("algorithm", BY_LOAD)
def test_slots_of_few_backends_selected_by_load_hold_the_weight(algorithm: Algorithm) -> None:
    weights = [1, 65535, 7, *[1] * (SEARCHED_SLOTS - 4), 2]
    assert len(weights) == SEARCHED_SLOTS
    found = made(algorithm, len(weights), weights)
    assert [slot_backend(word) for word in found] == ids(len(weights)).tolist()
    assert [slot_weight(word) for word in found] == weights


@pytest.mark.parametrize("algorithm", BY_LOAD)
def test_slots_of_many_backends_selected_by_load_are_weighted(
    algorithm: Algorithm,
) -> None:
    """Their slots hold the weight, which decides between two candidates."""
    weights = [20, *range(2, 2 * MANY, 2)]
    found = made(algorithm, len(weights), weights)
    by_backend = Counter(slot_backend(word) for word in found)
    assert by_backend == {
        number: weight // 2 for number, weight in zip(ids(len(weights)), weights, strict=True)
    }
    wanted = dict(zip(ids(len(weights)), weights, strict=True))
    assert all(slot_weight(word) == wanted[slot_backend(word)] for word in found)


@pytest.mark.parametrize("weights", [None, [1, 1, 1], [5, 5, 5]])
def test_maglev_has_a_table_with_equal_shares(weights: list[int] | None) -> None:
    found = made(Algorithm.MAGLEV, 3, weights)
    assert sorted(Counter(found).values()) == [83, 84, 84]
    assert set(found) == set(ids(3))


def test_maglev_has_a_table_with_shares_by_weight() -> None:
    found = Counter(made(Algorithm.MAGLEV, 3, [1, 2, 7]))
    for number, weight in zip(ids(3), (1, 2, 7), strict=True):
        assert found[number] == pytest.approx(TABLE * weight / 10, abs=1 + 3 * weight / 10)


def test_maglev_table_grows_with_the_backends() -> None:
    assert len(made(Algorithm.MAGLEV, TABLE, None)) == TABLE
    assert len(made(Algorithm.MAGLEV, TABLE + 1, None)) == MAGLEV_SIZES[1]
    assert set(made(Algorithm.MAGLEV, TABLE + 1, None)) == set(ids(TABLE + 1))


@pytest.mark.parametrize("algorithm", Algorithm)
@pytest.mark.parametrize("weights", [None, [1] * MANY, [*range(1, MANY + 1)]])
def test_slots_are_equal_on_every_call(algorithm: Algorithm, weights: list[int] | None) -> None:
    assert made(algorithm, MANY, weights) == made(algorithm, MANY, weights)
