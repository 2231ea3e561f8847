"""What the programs of this node measure, and how it is switched on."""

from __future__ import annotations

from collections.abc import Iterator

from ebpfproxy.agent import state
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.services.measures import Measuring


def measuring(maps: MapSet) -> Measuring:
    """As the agent's record has it, which stays where the agent has ended and its programs go on."""
    record = state.load(maps)
    programs = record.programs if record is not None else None
    if programs is None:
        return Measuring()
    return Measuring(programs.measure_connections, programs.measure_traffic)


def unmeasured(found: Measuring) -> Iterator[str]:
    """What is not measured, and the option that is for it."""
    if not found.connections:
        yield "connect times and failures: measureConnections (--measure-connections)"
    if not found.traffic:
        yield "bytes: measureTraffic (--measure-traffic)"
