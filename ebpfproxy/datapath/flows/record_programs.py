"""Programs that the agent runs itself, on records of sockets and cached frontends (``bpf/records.c``).

A slot of ``sock_origin`` is taken and freed by compare-and-swap, which only a program can do.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from ebpfproxy.datapath.abi.hooks import RECORD_HOOKS
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.libbpf import BpfError


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

    def cache(self, frontends: Iterable[tuple[bytes, int]]) -> None:
        """Caches frontends, given as ``services.frontend_cache.frontends_to_cache()`` returns them."""
        for packet, count in frontends:
            # Signals end runs early. What is cached already is passed over the second time.
            while True:
                try:
                    bpf.prog_run(self._fds["cache_frontend"], packet, count)
                    break
                except BpfError as error:
                    if error.errno != errno.EINTR:
                        raise

    def _run(self, name: str, origins: Iterable[bytes]) -> int:
        return sum(bpf.prog_run(self._fds[name], origin) for origin in origins)

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])
