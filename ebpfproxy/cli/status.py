"""``ebpfproxy status``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from ebpfproxy.agent import state
from ebpfproxy.cli import options
from ebpfproxy.cli.errors import one_line
from ebpfproxy.cli.output import age, console, emit_watching, table
from ebpfproxy.datapath.dump import CurrentMaps, MapFill
from ebpfproxy.inspection.status import PODS, DeviceStatus, Status, facts, is_half, read_status

#: A map is shown once this share of its entries is in use.
_FILLING = 0.75


@click.command("status")
@options.bpf_root
@options.output_format
@options.watch
@click.option(
    "-v", "--verbose", is_flag=True, help="Show all devices and maps, also pods' and nearly empty ones."
)
def command(bpf_root: Path, output: str, watch: bool, verbose: bool) -> None:
    """Show what runs on this node: health, problems, programs, devices, watches, and maps that fill up.

    It reads the kernel and the pinned maps, so that it also works while the agent is stopped. What it shows
    does not change the exit code: that is the answer of `ebpfproxy check`.
    """
    with one_line():
        maps = CurrentMaps(bpf_root)
        emit_watching(
            lambda: read_status(bpf_root, maps.get()), output, lambda status: _print(status, verbose), watch
        )


def _print(status: Status, verbose: bool) -> None:
    agent, now = status.agent, time.time()
    out = console()
    for name, value in facts(status, now):
        out.print(f"{name + ':':<18}{value}")
    shown = [d for d in status.devices if verbose or d.role not in ("", PODS)]
    if shown:
        out.print()
        out.print(_devices_table(shown))
    if agent is not None and agent.watches and status.agent_running and not status.agent_ended:
        out.print()
        out.print(_watches(agent, now))
    filling = [each for each in status.maps if verbose or each.entries >= _FILLING * each.capacity]
    if filling:
        out.print()
        out.print(_maps(filling))


def _devices_table(devices: list[DeviceStatus]) -> Any:
    has_xdp = any(each.xdp for each in devices)
    printed = table("device", "role", "reason", *["XDP"] * has_xdp)
    for each in devices:
        half = f" (ONE DIRECTION: {each.directions[0]})" if is_half(each) else ""
        printed.add_row(each.device + half, each.role or "unknown", each.why, *[each.xdp] * has_xdp)
    return printed


def _watches(agent: state.AgentState, now: float) -> Any:
    printed = table("watch", "state", "since", "last data", "error")
    for watch in agent.watches:
        last = age(now - watch.last_event) if watch.last_event else "never"
        printed.add_row(watch.resource, watch.state, age(now - watch.since), last, watch.error or "")
    return printed


def _maps(fills: list[MapFill]) -> Any:
    printed = table("map", "entries", "capacity", "full")
    for each in fills:
        share = f"{each.entries / each.capacity:.1%}"
        printed.add_row(each.name, str(each.entries), str(each.capacity), share)
    return printed
