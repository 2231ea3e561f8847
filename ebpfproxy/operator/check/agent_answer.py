"""Asks this node's agent to compare at once: it alone knows what follows from the API."""

from __future__ import annotations

import time

from ebpfproxy.agent import check_record
from ebpfproxy.agent.check_record import Report, Request
from ebpfproxy.datapath.kernel.maps import MapSet

_POLL_SECONDS = 0.05


def ask(maps: MapSet, *, repair: bool, seconds: float) -> Report | None:
    """The agent's answer; None if there is none within ``seconds``."""
    serial = time.time_ns()
    check_record.ask(maps, Request(serial, repair))
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        report = check_record.answered(maps)
        if report is not None and report.serial == serial:
            return report
        time.sleep(_POLL_SECONDS)
    return None
