"""A memory barrier, between stores to mapped maps that programs on other CPUs may not see in another order."""

from __future__ import annotations

import ctypes as ct
import os
import platform

_NUMBERS = {"x86_64": 324, "aarch64": 283}
_NUMBER = _NUMBERS.get(platform.machine())
_GLOBAL_EXPEDITED = 2
_syscall = ct.CDLL(None).syscall


def barrier() -> None:
    """Orders what this thread has read and stored before with what it does afterwards.

    A lock would order less: on ARM, what is stored before and after it may still be swapped. The kernel executes
    a full barrier before it looks for processes that want one at once, which hardly any has asked for.
    """
    if _NUMBER is None or _syscall(_NUMBER, _GLOBAL_EXPEDITED, 0, 0):
        # The scheduler has one as well.
        os.sched_yield()
