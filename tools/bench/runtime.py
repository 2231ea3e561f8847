"""Run time of BPF programs by the kernel's own clock: it counts runs and nanoseconds while statistics are on."""

from __future__ import annotations

import ctypes as ct
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

_STATS_RUN_TIME = 0  # enum bpf_stats_type


class Runs(NamedTuple):
    """How often a program has run, and for how many nanoseconds."""

    times: int
    nanoseconds: int

    def since(self, before: Runs) -> Runs:
        return Runs(self.times - before.times, self.nanoseconds - before.nanoseconds)


@contextmanager
def run_statistics() -> Iterator[None]:
    """The kernel counts runs and their time as long as the descriptor is open: to the end, however it comes.

    What ``kernel.bpf_stats_enabled`` says is left alone.
    """
    fd = ct.CDLL("libbpf.so.1", use_errno=True).bpf_enable_stats(_STATS_RUN_TIME)
    if fd < 0:
        raise OSError(ct.get_errno(), "BPF_ENABLE_STATS")
    try:
        yield
    finally:
        os.close(fd)


def runs(program: int) -> Runs:
    """What the kernel has counted of the program of a descriptor of this process."""
    lines = Path(f"/proc/self/fdinfo/{program}").read_text().splitlines()
    found = dict(line.split(":\t") for line in lines)
    return Runs(int(found["run_cnt"]), int(found["run_time_ns"]))
