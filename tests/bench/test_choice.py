"""Pairs that the benchmark of algorithms compares."""

from __future__ import annotations

from tools.bench.choice import RANDOM, RANDOM_MANY, SERVICES, WAYS, Way


def test_every_algorithm_is_compared_with_random_choice_among_as_many_backends_on_the_node() -> None:
    assert {way.base.service for way in WAYS} == {RANDOM, RANDOM_MANY}
    for way in WAYS:
        assert way.base in WAYS
        assert way.base.table_size == way.table_size
        assert way.base.service.backends == way.service.backends or way.service is RANDOM_MANY


def test_every_service_is_measured() -> None:
    assert {way.service for way in WAYS} == set(SERVICES)
    assert Way(131071, RANDOM).base == Way(131071, RANDOM)
