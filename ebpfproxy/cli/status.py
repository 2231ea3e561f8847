"""``ebpfproxy status``."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

import click
import msgspec

from ebpfproxy import state
from ebpfproxy.cli import options
from ebpfproxy.cli.errors import one_line
from ebpfproxy.cli.output import age, console, emit_watching, table
from ebpfproxy.datapath.attach import attachments
from ebpfproxy.datapath.dump import Dump, MapFill, fill, open_maps
from ebpfproxy.datapath.maps import MapSet
from ebpfproxy.datapath.roots import is_locked, pin_folder


class AttachmentStatus(msgspec.Struct, frozen=True):
    hook: str
    attached: bool
    program_id: int | None


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON of ``ebpfproxy status``. Counts are of what the maps hold."""

    kernel: str
    agent_running: bool
    agent: state.AgentState | None
    healthy: bool
    attachments: tuple[AttachmentStatus, ...]
    services: int
    frontends: int
    backends: int
    maps: tuple[MapFill, ...]


def read_status(bpf_root: Path, maps: MapSet) -> Status:
    dump = Dump(maps)
    agent = state.load(maps)
    running = is_locked(bpf_root)
    hooks = tuple(AttachmentStatus(a.hook, a.alive, a.program_id) for a in attachments(pin_folder(bpf_root)))
    fills = tuple(fill(maps))
    count = {each.name: each.entries for each in fills}
    return Status(
        kernel=platform.release(),
        agent_running=running,
        agent=agent,
        healthy=running and agent is not None and agent.healthy and all(a.attached for a in hooks),
        attachments=hooks,
        services=len({(name.namespace, name.name) for name in dump.names.values()}),
        frontends=len({(k.address, k.port, k.protocol) for k, _ in dump.entries()}),
        backends=count["backends"],
        maps=fills,
    )


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
    text = f"{len(attached)} of {len(status.attachments)}: {' '.join(attached)}"
    facts.append(("attached", text + (f"; MISSING {' '.join(missing)}" if missing else "")))
    facts.append(
        ("serving", f"{status.services} services, {status.frontends} frontends, {status.backends} backends")
    )
    facts.append(("health", "healthy" if status.healthy else "NOT HEALTHY"))
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
