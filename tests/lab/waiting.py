"""Polling for conditions in tests."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

#: The time until an agent is ready, which includes compilation and is long in an emulator.
READY_SECONDS = float(os.environ.get("EBPFPROXY_LAB_SECONDS", "120"))
#: A limit for what the agent does by itself, on a busy machine. A flow without packets expires only after 30 s, which
#: would help a socket as well.
AT_ONCE = 20.0


def until(
    condition: Callable[[], object],
    what: str = "the condition did not become true",
    seconds: float = 60.0,
    *,
    every: float = 0.02,
) -> None:
    """Waits for a condition. Raises AssertionError with ``what`` after ``seconds``.

    It sleeps three times as long as the condition takes, between ``every`` and 0.5 seconds: a condition that runs a
    command would otherwise take the processor from what it waits for.
    """
    deadline = time.monotonic() + seconds
    while True:
        began = time.monotonic()
        if condition():
            return
        now = time.monotonic()
        assert now < deadline, what
        time.sleep(max(every, min(3 * (now - began), 0.5)))
