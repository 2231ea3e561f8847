"""Programs that the agent runs itself to change records of sockets (``bpf/records.c``).

A slot of ``sock_origin`` is taken and freed by compare-and-swap, which only a program can do.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ebpfproxy.datapath.abi.hooks import RECORD_HOOKS
from ebpfproxy.datapath.kernel import bpf


class RecordPrograms:
    """The programs of one folder, which are for the maps that it is in. Close it."""

    def __init__(self, programs: Path) -> None:
        """Raises BpfError where they are not pinned there."""
        self._fds = {hook.name: bpf.get_pinned(programs / hook.name) for hook in RECORD_HOOKS}

    def forget(self, origins: Iterable[bytes]) -> int:
        """Removes connected sockets whose peer is still the same, and all records of unconnected ones.

        Returns how many had an origin.
        """
        return self._run("forget_socket", origins)

    def forget_pages(self, origins: Iterable[bytes]) -> int:
        """Removes further frontends of sockets that are closed, given as :meth:`forget` takes them.

        Returns how many entries of ``sock_peers`` there were.
        """
        return self._run("forget_pages", origins)

    def restore(self, origins: Iterable[bytes]) -> int:
        """Adds packed origins that the sockets do not have; returns how many."""
        return self._run("restore_socket", origins)

    def _run(self, name: str, origins: Iterable[bytes]) -> int:
        return sum(bpf.prog_run(self._fds[name], origin) for origin in origins)

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])
