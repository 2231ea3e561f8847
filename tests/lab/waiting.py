"""Waiting for what a test needs, and no longer."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(
    condition: Callable[[], object],
    what: str = "it did not happen",
    seconds: float = 60.0,
    *,
    every: float = 0.02,
) -> None:
    """Raises AssertionError with ``what`` where it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(every)
