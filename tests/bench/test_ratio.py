"""Statistics of benchmark samples."""

from __future__ import annotations

import random
import statistics

import pytest

from tools.bench.ratio import middle, of_medians


def test_equal_samples_have_ratio_one_with_certainty() -> None:
    samples = [1.0, 5.0, 3.0, 2.0]
    assert of_medians(samples, samples) == (1.0, 1.0, 1.0)


def test_ratio_equals_a_constant_factor() -> None:
    assert of_medians([9.0] * 5, [10.0] * 5) == pytest.approx((0.9, 0.9, 0.9))


def test_interval_contains_the_true_ratio_and_narrows_with_the_rounds() -> None:
    draw = random.Random(1)
    widths = []
    for rounds in (10, 1000):
        base = [draw.gauss(100, 5) for _ in range(rounds)]
        measured = [draw.gauss(95, 5) for _ in range(rounds)]
        found = of_medians(measured, base)
        assert found.low <= 0.95 <= found.high
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 3


def test_numbers_of_rounds_must_match() -> None:
    with pytest.raises(ValueError, match="2 rounds against 1"):
        of_medians([1.0, 2.0], [1.0])
    with pytest.raises(statistics.StatisticsError):
        of_medians([], [])


def test_interval_contains_the_median_19_times_of_20() -> None:
    draw = random.Random(1)
    held = 0
    for _ in range(1000):
        median, low, high = middle([draw.expovariate(1) for _ in range(90)])
        assert low <= median <= high
        held += low <= 0.6931 <= high  # ln 2
    assert 930 <= held <= 980


def test_interval_of_few_samples_is_their_range() -> None:
    assert middle([3.0]) == (3.0, 3.0, 3.0)
    assert middle([3.0, 1.0]) == (2.0, 1.0, 3.0)
