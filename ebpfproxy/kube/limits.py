"""Limits the rate of requests by a token bucket, as client-go's flowcontrol does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class RateLimit:
    """``burst`` requests at once, ``qps`` a second in the long run. A ``qps`` of 0 or less limits nothing."""

    def __init__(
        self,
        qps: float,
        burst: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._qps, self._burst = qps, max(1, burst)
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._tokens, self._last = float(self._burst), clock()

    def wait(self) -> None:
        """Returns when the next request may go."""
        if self._qps <= 0:
            return
        with self._lock:
            now = self._clock()
            self._tokens = min(self._burst, self._tokens + (now - self._last) * self._qps) - 1
            self._last = now
            # Tokens below 0 are owed to threads that wait already.
            pause = -self._tokens / self._qps
        if pause > 0:
            self._sleep(pause)
