"""What the benchmark of algorithms says of its samples, and whom it compares with whom."""

from __future__ import annotations

import random

from tools.bench.choice import RANDOM, RANDOM_MANY, SERVICES, WAYS, Way, middle


def test_the_interval_of_the_median_holds_it_19_times_of_20() -> None:
    draw = random.Random(1)
    held = 0
    for _ in range(1000):
        median, low, high = middle([draw.expovariate(1) for _ in range(90)])
        assert low <= median <= high
        held += low <= 0.6931 <= high  # ln 2
    assert 930 <= held <= 980


def test_few_samples_have_an_interval_of_all() -> None:
    assert middle([3.0]) == (3.0, 3.0, 3.0)
    assert middle([3.0, 1.0]) == (2.0, 1.0, 3.0)


def test_each_is_compared_with_random_choice_among_as_many_on_the_same_node() -> None:
    assert {way.base.service for way in WAYS} == {RANDOM, RANDOM_MANY}
    for way in WAYS:
        assert way.base in WAYS
        assert way.base.table_size == way.table_size
        assert way.base.service.backends == way.service.backends or way.service is RANDOM_MANY


def test_every_service_is_measured() -> None:
    assert {way.service for way in WAYS} == set(SERVICES)
    assert Way(131071, RANDOM).base == Way(131071, RANDOM)
