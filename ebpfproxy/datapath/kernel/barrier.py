"""A memory barrier, for stores to mapped maps that programs on other CPUs must see in their order."""

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

    A lock would order less: on ARM, what is stored before and after it may still be swapped. membarrier(2) is
    a full barrier of this CPU, and of those that run a process which has asked for it; hardly any has.
    """
    if _NUMBER is None or _syscall(_NUMBER, _GLOBAL_EXPEDITED, 0, 0):
        # The scheduler has one as well.
        os.sched_yield()
