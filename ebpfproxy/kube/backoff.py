"""How long to wait before the next try."""

from __future__ import annotations

import random


class Backoff:
    """Doubles from ``first`` to ``most`` seconds until :meth:`reset`; half of each wait is random.

    Randomness keeps the nodes of a cluster from all asking at once when a server is back.
    """

    def __init__(self, first: float, most: float) -> None:
        self._first = first
        self._most = most
        self._step = 0.0

    def next(self) -> float:
        self._step = min(self._most, max(self._first, self._step * 2))
        return self._step * random.uniform(0.5, 1.0)  # noqa: S311 - not a secret

    def reset(self) -> None:
        self._step = 0.0
