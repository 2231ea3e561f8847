"""What runs on this node: programs, devices, maps, and the agent's own record."""

from __future__ import annotations

import platform
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ebpfproxy.agent import state
from ebpfproxy.datapath.abi.node_layout import ACTIONS
from ebpfproxy.datapath.dump import Dump, MapFill, fill
from ebpfproxy.datapath.flows.conntrack_table import counters
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.kernel.roots import is_locked, pin_folder
from ebpfproxy.datapath.programs.attach import attachments
from ebpfproxy.datapath.programs.devices import device_attachments, directions_of, link_attachments
from ebpfproxy.datapath.programs.xdp_places import xdp_attachments
from ebpfproxy.inspection.words import age
from ebpfproxy.kube.source_status import State
from ebpfproxy.netlink.namespaces import netns_cookie
from ebpfproxy.node.roles import Role

#: The role of devices that lead to pods.
PODS = str(Role.LOCAL)
_SHOWN_DEVICES = 8
#: An agent that has written no record for so long does nothing else either.
_SILENT_SECONDS = 6 * state.HEARTBEAT


class AttachmentStatus(msgspec.Struct, frozen=True):
    hook: str
    attached: bool
    program_id: int | None


class DeviceStatus(msgspec.Struct, frozen=True):
    """A device, the directions in which our programs are attached, and its role with the reason.

    ``xdp``: the mode of its XDP program, or why it has none; empty where none is wanted.
    """

    device: str
    directions: tuple[str, ...]
    ifindex: int = 0
    role: str = ""
    why: str = ""
    xdp: str = ""


class PacketCount(msgspec.Struct, frozen=True):
    """Packets that were rejected or dropped, passed although something was wrong, or forwarded at XDP."""

    action: str
    reason: str
    packets: int


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON of ``ebpfproxy status``. The counts come from the maps."""

    kernel: str
    agent_running: bool
    #: Somebody works on the maps, but not the agent that left this record: it has ended.
    agent_ended: bool
    agent: state.AgentState | None
    healthy: bool
    #: One sentence per problem.
    problems: tuple[str, ...]
    attachments: tuple[AttachmentStatus, ...]
    devices: tuple[DeviceStatus, ...]
    packets: tuple[PacketCount, ...]
    services: int
    frontends: int
    backends: int
    maps: tuple[MapFill, ...]


def read_status(bpf_root: Path, maps: MapSet) -> Status:
    dump = Dump(maps)
    pins = pin_folder(bpf_root)
    agent = state.load_latest(pins)
    running = is_locked(bpf_root)
    ended = running and agent is not None and state.has_ended(agent)
    hooks = tuple(AttachmentStatus(a.hook, a.alive, a.program_id) for a in attachments(pins))
    devices = _devices(pins, agent)
    wanted = agent.devices if agent is not None else 0
    fills = tuple(fill(maps))
    count = {each.name: each.entries for each in fills}
    return Status(
        kernel=platform.release(),
        agent_running=running,
        agent_ended=ended,
        agent=agent,
        healthy=running
        and not ended
        and agent is not None
        and agent.healthy
        and not _silence(agent)
        and all(a.attached for a in hooks)
        and len(devices) >= wanted,
        problems=(*_agent_problems(agent, running, ended), *_problems(agent, hooks, devices)),
        attachments=hooks,
        devices=devices,
        packets=tuple(_packets(maps)),
        services=len({(name.namespace, name.name) for name in dump.names.values()}),
        frontends=dump.count_frontends(),
        backends=count["backends"],
        maps=fills,
    )


def _agent_problems(agent: state.AgentState | None, running: bool, ended: bool) -> Iterator[str]:
    if ended:
        yield (
            "the agent that left this record has ended: another one starts, or cleanup or rollback is under"
            " way; changes are not applied yet"
        )
        return
    if not running:
        yield "the agent is not running: its programs stay attached, but changes are not applied"
    if agent is None or not agent.synced:
        yield (
            "the agent has not finished its start yet" if running else "the agent has not finished its start"
        )
    elif running and not agent.healthy:
        yield "a change has waited for two sync periods to be programmed, or longer"
    if running and agent is not None and (silent := _silence(agent)):
        yield (
            f"the agent has not reported for {age(silent)}: it is starting, hangs, or gets no CPU;"
            " changes are not applied"
        )
    for watch in agent.watches if agent is not None and running else ():
        if watch.state != State.CONNECTED:
            yield f"the watch of {watch.resource} is {watch.state}: {watch.error or 'no response yet'}"


def _problems(
    agent: state.AgentState | None,
    hooks: tuple[AttachmentStatus, ...],
    devices: tuple[DeviceStatus, ...],
) -> Iterator[str]:
    if missing := [a.hook for a in hooks if not a.attached]:
        yield f"socket programs are missing: {' '.join(missing)}"
    if agent is not None and len(devices) < agent.devices:
        yield f"only {len(devices)} of {agent.devices} devices have programs"
    if half := [d.device for d in devices if is_half(d)]:
        yield f"only one direction has a program: {' '.join(half)}"
    if agent is not None:
        yield from agent.problems


def _silence(agent: state.AgentState) -> float:
    """Seconds since its last report, if these are too many."""
    silent = time.monotonic() - agent.heartbeat if agent.heartbeat else 0.0
    return silent if silent > _SILENT_SECONDS else 0.0


def is_half(device: DeviceStatus) -> bool:
    """One direction is without a program."""
    return len(device.directions) < len(directions_of(device.ifindex))


def _devices(pins: Path, agent: state.AgentState | None) -> tuple[DeviceStatus, ...]:
    """Names and indexes belong to the agent's network namespace, wherever this runs.

    In another namespace the local devices are of no use: names come from the agent's state only, and so do
    clsact filters (before Linux 6.6).
    """
    recorded = {each.ifindex: each for each in agent.device_roles} if agent is not None else {}
    is_here = agent is None or agent.netns in (0, netns_cookie())
    names = dict(socket.if_nameindex()) if is_here else {}
    names |= {index: each.name for index, each in recorded.items() if index not in names}
    found: dict[int, list[str]] = {}
    for each in device_attachments(pins) if is_here else link_attachments(pins):
        found.setdefault(each.ifindex, []).append(each.direction)
    if not found and not is_here:
        found = {index: list(directions_of(index)) for index, device in recorded.items() if device.attached}
    attached = {each.ifindex: each.state for each in xdp_attachments(pins)}
    # The record holds those that lead to pods last: of many, some are not in it.
    unknown = state.DeviceState(0, "", PODS if recorded else "", "", attached=False)
    return tuple(
        DeviceStatus(
            names.get(index, f"device {index}"),
            tuple(sorted(directions, reverse=True)),
            index,
            recorded.get(index, unknown).role,
            recorded.get(index, unknown).why,
            attached.get(index, recorded.get(index, unknown).xdp),
        )
        for index, directions in sorted(found.items())
    )


def _packets(maps: MapSet) -> Iterator[PacketCount]:
    found = counters(maps["packet_events"])
    for action, reasons in ACTIONS.items():
        for reason in sorted(reasons):
            if found[reason]:
                yield PacketCount(action, str(reason), found[reason])


def facts(status: Status, now: float) -> list[tuple[str, str]]:
    """The status in words, each with its name. ``now``: Unix seconds."""
    agent = status.agent
    found: list[tuple[str, str]] = [("health", "healthy" if status.healthy else "NOT HEALTHY")]
    found += [("problem", problem) for problem in status.problems]
    if status.packets:
        found.append(("packets", ", ".join(f"{p.packets} {p.action} ({p.reason})" for p in status.packets)))
    found.append(
        ("serving", f"{status.services} services, {status.frontends} frontends, {status.backends} backends")
    )
    if agent is None:
        found.append(("agent", "running" if status.agent_running else "never finished its start"))
    else:
        found += _agent_facts(agent, status, now)
    attached = sum(a.attached for a in status.attachments)
    found.append(("sockets", f"{attached} of {len(status.attachments)} programs"))
    found.append(("devices", _device_line(status)))
    found.append(("kernel", status.kernel))
    return found


def _agent_facts(agent: state.AgentState, status: Status, now: float) -> list[tuple[str, str]]:
    seen = f"last seen {age(now - agent.written)} ago"
    if status.agent_ended:
        is_now = f"pid {agent.pid}, ENDED, {seen}"
    elif status.agent_running:
        is_now = f"pid {agent.pid}, since {age(now - agent.started)}"
    else:
        is_now = f"STOPPED, {seen} (its programs stay attached)"
    facts = [
        ("agent", f"ebpfproxy {agent.version} on {agent.node}, {is_now}"),
        ("source", agent.source),
    ]
    if agent.last_programmed is not None:
        took = f"{(agent.last_duration or 0) * 1000:.1f} ms"
        facts.append(("last programming", f"{age(now - agent.last_programmed)} ago, took {took}"))
    if agent.telemetry is not None:
        facts += _telemetry_facts(agent.telemetry, now)
    return facts


def _telemetry_facts(telemetry: state.TelemetryState, now: float) -> Iterator[tuple[str, str]]:
    reason = f"; NOTHING IS SENT: {telemetry.error}" if telemetry.error else ""
    yield "otlp endpoint", telemetry.endpoint + reason
    if telemetry.log is not None:
        yield "otlp log", f"{_signal(telemetry.log, now)}; lines lost: {telemetry.log.lost}"
    if telemetry.metrics is not None:
        yield "otlp metrics", f"{_signal(telemetry.metrics, now)}; times missed: {telemetry.metrics.lost}"


def _signal(signal: state.SignalState, now: float) -> str:
    sent, failed = signal.last_sent, signal.last_failed
    success = f"last sent {age(now - sent)} ago" if sent is not None else "never sent"
    if failed is None:
        return success
    failure = f"{age(now - failed)} ago: {signal.error}"
    if sent is None or failed > sent:
        return f"FAILED {failure}; {success}"
    return f"{success}; last failure {failure}"


def _device_line(status: Status) -> str:
    wanted = status.agent.devices if status.agent is not None else len(status.devices)
    text = f"{len(status.devices)} of {wanted}"
    pods = [d.device for d in status.devices if d.role == PODS]
    names = " ".join(pods[:_SHOWN_DEVICES])
    if len(pods) > _SHOWN_DEVICES:
        names += " …"
    return f"{text}; {len(pods)} to pods: {names}" if pods else text
