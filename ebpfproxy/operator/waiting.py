"""The one loop that asks again until something is so, or its time is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

#: Between two looks at the API server, and at this node itself.
API_SECONDS, NODE_SECONDS = 0.5, 0.25


class WaitError(Exception):
    """It did not happen in time; the message says what, and how long was waited."""


class Wait:
    """``for is_last in Wait(seconds, every): …`` comes round at least once, and last when time is over.

    ``seconds`` count from the making of the object; ``every`` is :data:`API_SECONDS` unless given.
    """

    def __init__(self, seconds: float, every: float | None = None) -> None:
        self.seconds, self._every = seconds, API_SECONDS if every is None else every
        self.renew()

    def renew(self) -> None:
        """The whole time once more."""
        self._deadline = time.monotonic() + self.seconds

    @property
    def left(self) -> float:
        """Seconds until time is over, below 0 afterwards."""
        return self._deadline - time.monotonic()

    def __iter__(self) -> Iterator[bool]:
        while True:
            is_last = self.left <= 0
            yield is_last
            if is_last:
                return
            time.sleep(self._every)


def until(condition: Callable[[], bool], wait: Wait, what: str) -> None:
    """Raises WaitError with ``what`` where the condition does not come true in time."""
    for _ in wait:
        if condition():
            return
    raise WaitError(f"{what} after {wait.seconds:g} s")
