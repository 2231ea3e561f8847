"""Decisions of the agent itself, which a program reports among those of all others (``bpf/report.c``)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ebpfproxy.datapath.abi.decision_layout import pack_socket_ended
from ebpfproxy.datapath.abi.hooks import REPORT
from ebpfproxy.datapath.abi.socket_layout import origin_cookie, origin_frontend, origin_netns, origin_use
from ebpfproxy.datapath.kernel import bpf


class DecisionReports:
    """The program of one folder. Any thread may use it; it is closed with its last user."""

    def __init__(self, programs: Path) -> None:
        """Raises BpfError where it is not pinned there."""
        self._fd = bpf.get_pinned(programs / REPORT.hooks[0].name)

    def sockets_ended(self, origins: Iterable[bytes], protocol: int) -> None:
        """Reports sockets that were closed because their backend has left, by their packed origins."""
        for origin in origins:
            packed = pack_socket_ended(
                *origin_frontend(origin),
                protocol,
                origin_use(origin),
                cookie=origin_cookie(origin),
                netns=origin_netns(origin),
            )
            bpf.prog_run(self._fd, packed)

    def __del__(self) -> None:
        os.close(self._fd)
