"""A median, the ratio of two, and how far they can be trusted."""

from __future__ import annotations

import math
import random
import statistics
from typing import NamedTuple

RESAMPLES = 2000


class Ratio(NamedTuple):
    """``value`` with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f} {self.high:.3f}]"


def middle(values: list[float]) -> tuple[float, float, float]:
    """The median, and the order statistics that have it between them with 95 % (by the sign test)."""
    ordered = sorted(values)
    below = max(0, int((len(ordered) - 1.96 * math.sqrt(len(ordered))) / 2))
    return statistics.median(ordered), ordered[below], ordered[-1 - below]


def of_medians(measured: list[float], base: list[float]) -> Ratio:
    """Of samples taken in the same rounds: index ``i`` of both is round ``i``, and they are drawn together.

    Raises ValueError where their lengths differ, and statistics.StatisticsError where there are none.
    """
    if len(measured) != len(base):
        raise ValueError(f"{len(measured)} rounds against {len(base)}")
    draw = random.Random(0)
    rounds = range(len(base))
    found = []
    for _ in range(RESAMPLES):
        chosen = draw.choices(rounds, k=len(base)) if base else []
        found.append(_ratio([measured[i] for i in chosen], [base[i] for i in chosen]))
    found.sort()
    return Ratio(_ratio(measured, base), found[RESAMPLES // 40], found[-RESAMPLES // 40])


def _ratio(measured: list[float], base: list[float]) -> float:
    return statistics.median(measured) / statistics.median(base)
