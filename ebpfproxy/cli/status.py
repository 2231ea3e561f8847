"""``ebpfproxy status``."""

from __future__ import annotations

import platform
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec

from ebpfproxy import state
from ebpfproxy.cli import options
from ebpfproxy.cli.errors import one_line
from ebpfproxy.cli.output import age, console, emit_watching, table
from ebpfproxy.datapath.attach import attachments
from ebpfproxy.datapath.conntrack import counters
from ebpfproxy.datapath.devices import device_attachments
from ebpfproxy.datapath.dump import Dump, MapFill, fill, open_maps
from ebpfproxy.datapath.maps import MapSet
from ebpfproxy.datapath.node_layout import DROPPED, PASSED, REJECTED
from ebpfproxy.datapath.roots import is_locked, pin_folder

_SHOWN_DEVICES = 8


class AttachmentStatus(msgspec.Struct, frozen=True):
    hook: str
    attached: bool
    program_id: int | None


class DeviceStatus(msgspec.Struct, frozen=True):
    """A device and the directions in which packets pass our programs."""

    device: str
    directions: tuple[str, ...]


class PacketCount(msgspec.Struct, frozen=True):
    """Packets that were neither simply passed nor translated."""

    action: str
    reason: str
    packets: int


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON of ``ebpfproxy status``. Counts are of what the maps hold."""

    kernel: str
    agent_running: bool
    agent: state.AgentState | None
    healthy: bool
    attachments: tuple[AttachmentStatus, ...]
    devices: tuple[DeviceStatus, ...]
    packets: tuple[PacketCount, ...]
    services: int
    frontends: int
    backends: int
    maps: tuple[MapFill, ...]


def read_status(bpf_root: Path, maps: MapSet) -> Status:
    dump = Dump(maps)
    agent = state.load_latest(pin_folder(bpf_root))
    running = is_locked(bpf_root)
    hooks = tuple(AttachmentStatus(a.hook, a.alive, a.program_id) for a in attachments(pin_folder(bpf_root)))
    devices = _devices(bpf_root)
    wanted = agent.devices if agent is not None else 0
    fills = tuple(fill(maps))
    count = {each.name: each.entries for each in fills}
    return Status(
        kernel=platform.release(),
        agent_running=running,
        agent=agent,
        healthy=running
        and agent is not None
        and agent.healthy
        and all(a.attached for a in hooks)
        and len(devices) >= wanted,
        attachments=hooks,
        devices=devices,
        packets=tuple(_packets(maps)),
        services=len({(name.namespace, name.name) for name in dump.names.values()}),
        frontends=len({(k.address, k.port, k.protocol) for k, _ in dump.entries()}),
        backends=count["backends"],
        maps=fills,
    )


def _devices(bpf_root: Path) -> tuple[DeviceStatus, ...]:
    names = dict(socket.if_nameindex())
    found: dict[int, list[str]] = {}
    for each in device_attachments(pin_folder(bpf_root)):
        found.setdefault(each.ifindex, []).append(each.direction)
    return tuple(
        DeviceStatus(names.get(index, f"device {index}"), tuple(sorted(directions, reverse=True)))
        for index, directions in sorted(found.items())
    )


def _packets(maps: MapSet) -> Iterator[PacketCount]:
    found = counters(maps["packet_events"])
    for action, reasons in (("rejected", REJECTED), ("dropped", DROPPED), ("passed", PASSED)):
        for reason in sorted(reasons):
            if found[reason]:
                yield PacketCount(action, str(reason), found[reason])


@click.command("status")
@options.bpf_root
@options.output_format
@options.watch
def command(bpf_root: Path, output: str, watch: bool) -> None:
    """What runs on this node: kernel, attachments, maps, watches, last programming, health.

    Read from the kernel and the pinned maps, so it works with the agent stopped, too.
    """
    with one_line():
        maps = open_maps(bpf_root)
        emit_watching(lambda: read_status(bpf_root, maps), output, _print, watch)


def _print(status: Status) -> None:
    agent, now = status.agent, time.time()
    facts: list[tuple[str, str]] = [("kernel", status.kernel)]
    if agent is None:
        facts.append(("agent", "running" if status.agent_running else "never ran to the end of its start"))
    else:
        facts += _agent_facts(agent, status.agent_running, now)
    attached = [a.hook for a in status.attachments if a.attached]
    missing = [a.hook for a in status.attachments if not a.attached]
    parts = [" ".join(attached)] * bool(attached) + [f"MISSING {' '.join(missing)}"] * bool(missing)
    facts.append(("sockets", f"{len(attached)} of {len(status.attachments)}: {'; '.join(parts)}"))
    facts.append(("devices", _device_line(status)))
    facts.append(
        ("serving", f"{status.services} services, {status.frontends} frontends, {status.backends} backends")
    )
    facts.append(("health", "healthy" if status.healthy else "NOT HEALTHY"))
    if status.packets:
        facts.append(("packets", ", ".join(f"{p.packets} {p.action} ({p.reason})" for p in status.packets)))
    out = console()
    for name, value in facts:
        out.print(f"{name + ':':<18}{value}")
    if agent is not None and agent.watches:
        out.print()
        out.print(_watches(agent, now))
    out.print()
    out.print(_maps(status.maps))


def _agent_facts(agent: state.AgentState, running: bool, now: float) -> list[tuple[str, str]]:
    since = f"pid {agent.pid}, since {age(now - agent.started)}"
    stopped = f"STOPPED, last seen {age(now - agent.written)} ago (what it programmed stays in force)"
    facts = [
        ("agent", f"ebpfproxy {agent.version} on {agent.node}, {since if running else stopped}"),
        ("source", agent.source),
    ]
    if agent.last_programmed is not None:
        took = f"{(agent.last_duration or 0) * 1000:.1f} ms"
        facts.append(("last programming", f"{age(now - agent.last_programmed)} ago, took {took}"))
    return facts + [("problem", problem) for problem in agent.problems]


def _device_line(status: Status) -> str:
    names = [d.device for d in status.devices]
    shown = " ".join(names[:_SHOWN_DEVICES]) + (" …" if len(names) > _SHOWN_DEVICES else "")
    wanted = status.agent.devices if status.agent is not None else len(names)
    half = [d.device for d in status.devices if len(d.directions) < 2]
    text = f"{len(names)} of {wanted}: {shown}"
    return text + (f"; HALF ATTACHED {' '.join(half)}" if half else "")


def _watches(agent: state.AgentState, now: float) -> Any:
    printed = table("watch", "state", "since", "last data", "error")
    for watch in agent.watches:
        last = age(now - watch.last_event) if watch.last_event else "never"
        printed.add_row(watch.resource, watch.state, age(now - watch.since), last, watch.error or "")
    return printed


def _maps(fills: tuple[MapFill, ...]) -> Any:
    printed = table("map", "entries", "capacity", "full")
    for each in fills:
        share = f"{each.entries / each.capacity:.1%}"
        printed.add_row(each.name, str(each.entries), str(each.capacity), share)
    return printed
