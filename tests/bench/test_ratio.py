"""What the benchmark says of its samples."""

from __future__ import annotations

import random
import statistics

import pytest

from tools.bench.ratio import of_medians


def test_the_same_samples_have_the_ratio_one_for_certain() -> None:
    samples = [1.0, 5.0, 3.0, 2.0]
    assert of_medians(samples, samples) == (1.0, 1.0, 1.0)


def test_a_constant_factor_is_found() -> None:
    assert of_medians([9.0] * 5, [10.0] * 5) == pytest.approx((0.9, 0.9, 0.9))


def test_the_interval_holds_the_true_ratio_and_narrows_with_the_rounds() -> None:
    draw = random.Random(1)
    widths = []
    for rounds in (10, 1000):
        base = [draw.gauss(100, 5) for _ in range(rounds)]
        measured = [draw.gauss(95, 5) for _ in range(rounds)]
        found = of_medians(measured, base)
        assert found.low <= 0.95 <= found.high
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 3


def test_rounds_must_match() -> None:
    with pytest.raises(ValueError, match="2 rounds against 1"):
        of_medians([1.0, 2.0], [1.0])
    with pytest.raises(statistics.StatisticsError):
        of_medians([], [])
