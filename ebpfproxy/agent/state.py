"""The agent's account of itself, kept in a pinned map for ``ebpfproxy status`` to read at any time."""

from __future__ import annotations

import socket
from pathlib import Path

import msgspec

from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.abi.schema import AGENT_STATE_SIZE, PROGRAMMED
from ebpfproxy.datapath.flows.conntrack_table import Timeouts
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.programs.loader import Options
from ebpfproxy.netlink.namespaces import socket_with_cookie
from ebpfproxy.node.facts import NodeFacts
from ebpfproxy.node.roles import Role

#: How often the agent writes the record when nothing happens, in seconds.
HEARTBEAT = 5.0
_ERROR_LENGTH = 300
_LAST_ROLE = str(Role.LOCAL)


class WatchState(msgspec.Struct, frozen=True):
    """One watch. Times are Unix seconds."""

    resource: str
    state: str
    since: float
    last_event: float | None = None
    error: str | None = None


class DeviceState(msgspec.Struct, frozen=True):
    """A device that packet programs should be attached to, its role, and the reason for that.

    ``xdp``: the mode of its XDP program, or why it has none; empty where none is wanted.
    """

    ifindex: int
    name: str
    role: str
    why: str
    attached: bool
    xdp: str = ""


class SignalState(msgspec.Struct, frozen=True):
    """What becomes of the log, or of metrics, on the way to a collector. Times are Unix seconds."""

    last_sent: float | None = None
    last_failed: float | None = None
    #: Why it failed then.
    error: str = ""
    #: Log lines that were lost, or how often metrics were not sent.
    lost: int = 0


class TelemetryState(msgspec.Struct, frozen=True):
    """What is sent to a collector (``otlpEndpoint``).

    ``error``: why nothing is sent at all; then neither signal has a state.
    """

    endpoint: str
    error: str = ""
    log: SignalState | None = None
    metrics: SignalState | None = None


class AgentState(msgspec.Struct, frozen=True, kw_only=True):
    """Times are Unix seconds, durations seconds."""

    pid: int
    version: str
    node: str
    source: str
    started: float
    written: float
    #: CLOCK_MONOTONIC then, which nobody sets; 0 of a version that does not say it.
    heartbeat: float = 0.0
    synced: bool = False
    healthy: bool = False
    last_programmed: float | None = None
    last_duration: float | None = None
    services: int = 0
    watches: tuple[WatchState, ...] = ()
    problems: tuple[str, ...] = ()
    #: How many devices packet programs should be attached to.
    devices: int = 0
    #: Those that fit into the record; devices of pods come last.
    device_roles: tuple[DeviceState, ...] = ()
    #: The cookie of the agent's network namespace, in which indexes of devices mean something.
    netns: int = 0
    #: Facts of the Node object, with which the next agent starts.
    node_facts: NodeFacts = NodeFacts()
    #: The name of the socket at which it answers commands (``agent.local_socket``).
    socket: str = ""
    conntrack_entries: int = 0
    conntrack_evicted: int = 0
    health_check_ports: int = 0
    timeouts: Timeouts | None = None
    #: What the programs are compiled for.
    programs: Options | None = None
    #: None without ``otlpEndpoint``.
    telemetry: TelemetryState | None = None


_RECORD = msgspec.json.Decoder(AgentState)


def save(maps: MapSet, state: AgentState) -> None:
    """Replaces the whole record in one step; long error texts are cut, so that it always fits."""
    watches = tuple(
        msgspec.structs.replace(w, error=w.error[:_ERROR_LENGTH]) if w.error else w for w in state.watches
    )
    problems = tuple(p[:_ERROR_LENGTH] for p in state.problems[:5])
    telemetry = _cut(state.telemetry) if state.telemetry is not None else None
    kept = msgspec.structs.replace(
        state, watches=watches, problems=problems, telemetry=telemetry, device_roles=()
    )
    room = AGENT_STATE_SIZE - len(msgspec.json.encode(kept))
    devices = []
    for each in sorted(state.device_roles, key=lambda d: (d.role == _LAST_ROLE, d.ifindex)):
        room -= len(msgspec.json.encode(each)) + 1
        if room < 0:
            break
        devices.append(each)
    encoded = msgspec.json.encode(msgspec.structs.replace(kept, device_roles=tuple(devices)))
    maps["agent_state"].update(U32.pack(0), encoded.ljust(AGENT_STATE_SIZE, b"\0"))


def _cut(state: TelemetryState) -> TelemetryState:
    log, metrics = (
        msgspec.structs.replace(signal, error=signal.error[:_ERROR_LENGTH]) if signal is not None else None
        for signal in (state.log, state.metrics)
    )
    return TelemetryState(state.endpoint[:_ERROR_LENGTH], state.error[:_ERROR_LENGTH], log, metrics)


def save_programmed(maps: MapSet, when: float, seconds: float) -> None:
    """Called for every change of the maps, for which :func:`save` would take too long."""
    maps["programmed"].update(U32.pack(0), PROGRAMMED.pack(when, seconds))


def load(maps: MapSet) -> AgentState | None:
    """The record of the last agent on these maps; None if there is none that this version can read."""
    programmed = maps.maps.get("programmed")
    return _decode(
        maps["agent_state"].lookup(U32.pack(0)),
        programmed.lookup(U32.pack(0)) if programmed is not None else None,
    )


def load_latest(pins: Path) -> AgentState | None:
    """The latest record of all: an agent with other map sizes has maps of its own, unused at first."""
    found = (
        _decode(_stored(path, AGENT_STATE_SIZE), _stored(path.with_name("programmed"), PROGRAMMED.size))
        for path in pins.glob("v*-*/maps/agent_state")
    )
    records = [record for record in found if record is not None]
    if all(record.heartbeat for record in records):
        return max(records, key=lambda record: record.heartbeat, default=None)
    return max(records, key=lambda record: record.written, default=None)


def has_ended(record: AgentState) -> bool:
    """True where nobody listens at the agent's socket any more, which its process keeps to its end.

    Between two agents the record is that of the one before. False also where this cannot be found out.
    """
    if not record.socket:
        return False
    found = socket_with_cookie(record.netns, socket.AF_UNIX, socket.SOCK_STREAM)
    if found is None:
        return False
    with found:
        found.setblocking(False)
        try:
            found.connect(f"\0{record.socket}")
        except ConnectionRefusedError:
            return True
        except OSError:
            # More are waiting than it has room for.
            return False
    return False


def _stored(path: Path, size: int) -> bytes | None:
    """Reads a pinned record; None for another schema's, and for one that is deleted at this moment."""
    with bpf.pinned(path) as fd:
        if fd is None or bpf.map_info(fd).value_size != size:
            return None
        return bpf.map_lookup(fd, U32.pack(0), size)


def _decode(stored: bytes | None, programmed: bytes | None) -> AgentState | None:
    if stored is None:
        return None
    try:
        found = _RECORD.decode(stored.rstrip(b"\0"))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    when, seconds = PROGRAMMED.unpack(programmed) if programmed is not None else (0.0, 0.0)
    if when <= max(found.started, found.last_programmed or 0.0):
        return found
    return msgspec.structs.replace(found, last_programmed=when, last_duration=seconds)
