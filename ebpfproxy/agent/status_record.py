"""What ``ebpfproxy status`` and gauges show of the agent: gathered from its parts, written to a map."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import msgspec

import ebpfproxy
from ebpfproxy.agent import state
from ebpfproxy.agent.agent_options import AgentOptions
from ebpfproxy.agent.housekeeping import Housekeeping
from ebpfproxy.agent.node_network import NodeNetwork
from ebpfproxy.agent.programs import ProgramManager
from ebpfproxy.agent.source import Source
from ebpfproxy.agent.telemetry import Telemetry
from ebpfproxy.config.masquerade_ports import shared_remark
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.programs.devices import LOOPBACK
from ebpfproxy.datapath.services.writer import Writer
from ebpfproxy.health.node_port import NodePortHealth
from ebpfproxy.health.proxy import ProxyHealth
from ebpfproxy.health.server import HttpServer
from ebpfproxy.metrics.agent_metrics import AgentMetrics
from ebpfproxy.netlink.namespaces import netns_cookie
from ebpfproxy.services.tracker import Tracker

#: The least time between two of what happens, in seconds.
_REST = 0.25


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of the agent that are shown."""

    options: AgentOptions
    maps: MapSet
    source: Source
    tracker: Tracker
    writer: Writer
    programs: ProgramManager
    network: NodeNetwork
    housekeeping: Housekeeping
    health: ProxyHealth
    node_port_health: NodePortHealth
    metrics: AgentMetrics
    servers: list[HttpServer]
    telemetry: Telemetry
    #: The name of the local server's socket.
    socket: str


class Status:
    """Writes the record. One thread uses it."""

    def __init__(self, parts: Parts, started: float) -> None:
        """``started``: when the agent started, in Unix seconds."""
        self._parts = parts
        self._started = started
        self._last_programmed: float | None = None
        self._last_duration: float | None = None
        self._written = 0.0
        self._synced_written = False
        #: True while something is known that is not written yet.
        self.is_old = False

    def programmed(self, seconds: float) -> None:
        """Notes that the maps have just been changed, and how long that took."""
        self._last_programmed, self._last_duration = time.time(), seconds
        state.save_programmed(self._parts.maps, self._last_programmed, seconds)

    @property
    def pause(self) -> float:
        """Seconds until the state should be written."""
        return _REST if self.is_old else state.HEARTBEAT

    def write(self, *, is_idle: bool, complete: bool) -> None:
        """Writes the record a few times a second while much happens, and at once when everything is in place.

        ``is_idle``: nothing has happened since the last time. ``complete``: everything is programmed. What is
        not written at once is soon after: ``status`` must not show maps that are newer by more.
        """
        now = time.monotonic()
        if is_idle and not self.is_old and now - self._written < state.HEARTBEAT:
            return
        synced = complete and self._parts.programs.attached
        if now - self._written < _REST and synced and self._synced_written:
            self.is_old = True
            return
        self._written, self._synced_written, self.is_old = now, synced, False
        not_programmed = [str(each) for each in self._parts.writer.capacity_errors]
        self._set_gauges(len(not_programmed))
        state.save(self._parts.maps, self._state(synced, not_programmed))

    def _set_gauges(self, not_programmed: int) -> None:
        parts = self._parts
        parts.metrics.pending(*parts.tracker.pending_changes)
        parts.metrics.devices(len(parts.programs.packets.targets), len(parts.programs.failures))
        parts.metrics.without_room(not_programmed)
        parts.metrics.health_check_ports(parts.node_port_health.bound, len(parts.node_port_health.failed))

    def _state(self, synced: bool, not_programmed: list[str]) -> state.AgentState:
        parts = self._parts
        return state.AgentState(
            pid=os.getpid(),
            version=ebpfproxy.__version__,
            node=parts.options.node_name,
            source=parts.source.description,
            started=self._started,
            written=time.time(),
            heartbeat=time.monotonic(),
            synced=synced,
            healthy=parts.health.healthy,
            last_programmed=self._last_programmed,
            last_duration=self._last_duration,
            services=parts.tracker.services,
            watches=tuple(
                state.WatchState(str(s.resource), str(s.state), s.since, s.last_event, s.error)
                for s in parts.source.statuses()
            ),
            problems=(*not_programmed, *parts.programs.failures, *self._remarks(), *self._unbound()),
            devices=len(parts.programs.packets.targets),
            device_roles=tuple(self._devices()),
            netns=netns_cookie(),
            node_facts=parts.network.node_facts,
            socket=parts.socket,
            conntrack_entries=parts.housekeeping.conntrack_entries,
            conntrack_evicted=parts.housekeeping.conntrack_evicted,
            health_check_ports=parts.node_port_health.bound,
            timeouts=parts.options.timeouts,
            programs=parts.programs.loaded_with,
            telemetry=parts.telemetry.state,
        )

    def _devices(self) -> Iterator[state.DeviceState]:
        attached = self._parts.programs.packets.attached
        if LOOPBACK in self._parts.programs.packets.targets:
            is_attached = LOOPBACK.ifindex in attached
            why = "NodePorts answer on it"
            yield state.DeviceState(LOOPBACK.ifindex, LOOPBACK.name, "loopback", why, is_attached)
        for each in self._parts.network.devices:
            is_attached = each.ifindex in attached
            xdp = self._parts.programs.packets.xdp_states.get(each.ifindex, "")
            yield state.DeviceState(each.ifindex, each.name, str(each.role), each.why, is_attached, xdp)

    def _remarks(self) -> Iterator[str]:
        if self._parts.options.masquerade_ports_shared:
            yield shared_remark(self._parts.options.masquerade_ports)

    def _unbound(self) -> Iterator[str]:
        for server in self._parts.servers:
            if server.failure and server.port is None:
                yield f"{server.name}: {server.failure}"
        for port, error in self._parts.node_port_health.failed.items():
            yield f"healthCheckNodePort {port}: {error}"
