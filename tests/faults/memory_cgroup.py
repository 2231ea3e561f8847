"""A memory cgroup with a limit, of version 2 where its memory controller is, else of version 1."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from ebpfproxy.datapath.kernel.roots import find_cgroup_root

_V1 = Path("/sys/fs/cgroup/memory")
#: The names of the same files in both.
_LIMIT = ("memory.max", "memory.limit_in_bytes")
_USED = ("memory.current", "memory.usage_in_bytes")
_EVENTS = ("memory.events", "memory.oom_control")
_NO_LIMIT = ("max", "-1")


class MemoryCgroup:
    """What its processes allocate, and the maps that they create, is charged to it."""

    def __init__(self, name: str) -> None:
        root = find_cgroup_root()
        self._v1 = "memory" not in (root / "cgroup.controllers").read_text().split()
        if not self._v1:
            (root / "cgroup.subtree_control").write_text("+memory")
        self._folder = (_V1 if self._v1 else root) / f"ebpfproxy-{name}-{os.getpid()}"
        self._folder.mkdir()

    def _file(self, names: tuple[str, str]) -> Path:
        return self._folder / names[self._v1]

    def limit(self, size: int | None) -> None:
        """``size`` in bytes; None lifts the limit."""
        self._file(_LIMIT).write_text(str(size) if size is not None else _NO_LIMIT[self._v1])

    @property
    def used(self) -> int:
        return int(self._file(_USED).read_text())

    @property
    def kills(self) -> int:
        """How many processes the kernel has killed for the limit."""
        lines = dict(line.split() for line in self._file(_EVENTS).read_text().splitlines())
        return int(lines["oom_kill"])

    def join(self) -> None:
        (self._folder / "cgroup.procs").write_text(str(os.getpid()))

    def remove(self) -> None:
        """Waits for the last process to be gone; maps that stay are charged to the cgroup above."""
        for _ in range(100):
            with suppress(OSError):
                self._folder.rmdir()
                return
            time.sleep(0.1)
        self._folder.rmdir()
