"""The probability that counts differ from their expectation by chance."""

from __future__ import annotations

import math
from collections.abc import Mapping

#: With this limit a test fails once in a hundred million runs of correct code.
UNLIKELY = 1e-8


def chance(counts: Mapping[str, int], shares: Mapping[str, float]) -> float:
    """Pearson's chi-squared test: the probability of a difference as large as this, or larger.

    ``shares`` need not add up to 1. Their number must be odd, so that the degrees of freedom are even and the
    distribution has a closed form.
    """
    assert len(shares) % 2, "the closed form needs an odd number"
    assert counts.keys() <= shares.keys()
    total, whole = sum(counts.values()), sum(shares.values())
    statistic = sum(
        (counts.get(name, 0) - total * share / whole) ** 2 / (total * share / whole)
        for name, share in shares.items()
    )
    half = statistic / 2
    return math.exp(-half) * sum(half**k / math.factorial(k) for k in range((len(shares) - 1) // 2))
