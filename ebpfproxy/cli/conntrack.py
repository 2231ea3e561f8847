"""``ebpfproxy conntrack list|get|flush``."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import click

from ebpfproxy.agent.state import load
from ebpfproxy.cli import completion, options
from ebpfproxy.cli.errors import one_line
from ebpfproxy.cli.output import age, console, echo, emit, table
from ebpfproxy.datapath.dump import Dump, open_maps
from ebpfproxy.datapath.flows.conntrack_table import FlowRow, Timeouts, flows_of
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.services.model import Protocol


@click.group("conntrack")
def command() -> None:
    """Show and flush flows of the packet path."""


def _filters(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "--service",
            metavar="NAMESPACE/NAME",
            shell_complete=completion.services,
            help="Only flows to this Service.",
        ),
        click.option(
            "--backend",
            metavar="ADDRESS[:PORT]",
            shell_complete=completion.backends,
            help="Only flows to this backend.",
        ),
        click.option("--frontend", metavar="ADDRESS[:PORT]", help="Only flows to this frontend."),
        click.option("--client", metavar="ADDRESS[:PORT]", help="Only flows of this client."),
        click.option(
            "--protocol",
            type=click.Choice([p.name for p in Protocol], case_sensitive=False),
            help="Only flows of this protocol.",
        ),
        click.option("--state", metavar="STATE", help="Only flows in this state, such as ESTABLISHED."),
    ):
        function = option(function)
    return function


class _Filter:
    def __init__(self, **wanted: str | None) -> None:
        self.wanted = {name: text for name, text in wanted.items() if text}

    def matches(self, flow: FlowRow) -> bool:
        return all(_matches(name, text, getattr(flow, name)) for name, text in self.wanted.items())


def _matches(name: str, wanted: str, value: str) -> bool:
    """An endpoint matches by address and port, or by its address alone."""
    if name in ("backend", "frontend", "client"):
        host = value.rpartition(":")[0]
        return wanted in (value, host, host.strip("[]"))
    return wanted.lower() == value.lower()


def read(maps: MapSet, most: int | None = None) -> list[tuple[FlowRow, tuple[bytes, ...]]]:
    """Flows with the keys of their entries; of ``most`` entries, where that is given."""
    names = {number: f"{key.namespace}/{key.name}" for number, key in Dump(maps).names.items()}
    agent = load(maps)
    timeouts = agent.timeouts if agent is not None and agent.timeouts is not None else Timeouts()
    entries = list(islice(maps["conntrack"].items(), most))
    found = flows_of(entries, timeouts, time.monotonic_ns(), names)
    return sorted(found, key=lambda pair: (pair[0].service, pair[0].frontend, pair[0].client))


@command.command("list")
@options.bpf_root
@options.output_format
@_filters
def list_flows(bpf_root: Path, output: str, **wanted: str | None) -> None:
    """List flows and their translation.

    EXPIRES is the time until a flow without further packets ends.
    """
    with one_line():
        chosen = _Filter(**wanted)
        emit([flow for flow, _ in read(open_maps(bpf_root)) if chosen.matches(flow)], output, _print)


@command.command("get")
@click.argument("client", metavar="CLIENT:PORT")
@options.bpf_root
@options.output_format
def get_flow(client: str, bpf_root: Path, output: str) -> None:
    """Show the flows of one client address and port.

    CLIENT:PORT has the format of list, with an IPv6 address in brackets.
    """
    with one_line():
        found = [flow for flow, _ in read(open_maps(bpf_root)) if flow.client == client]
        if not found:
            raise click.ClickException(f"no flow of {client}")
        emit(found, output, _print)


@command.command("flush")
@options.bpf_root
@_filters
@click.option("--all", "everything", is_flag=True, help="Flush every flow. Without it a filter is required.")
def flush(bpf_root: Path, everything: bool, **wanted: str | None) -> None:
    """Delete flows; their connections break.

    A connection survives if the frontend is the backend's own address.
    """
    with one_line():
        chosen = _Filter(**wanted)
        if not chosen.wanted and not everything:
            raise click.UsageError("give a filter or --all")
        maps = open_maps(bpf_root)
        flows = [keys for flow, keys in read(maps) if everything or chosen.matches(flow)]
        deleted = sum(maps["conntrack"].delete(key) for keys in flows for key in keys)
        if everything:
            # An entry whose opposite direction was evicted belongs to no flow.
            deleted += sum(maps["conntrack"].delete(key) for key, _ in list(maps["conntrack"].items()))
    echo(f"flushed {len(flows)} flows ({deleted} entries)")


def _print(flows: list[FlowRow]) -> None:
    printed = table(
        "protocol", "state", "client", "frontend", "backend", "masqueraded as", "service", "idle", "expires"
    )
    for flow in flows:
        printed.add_row(
            flow.protocol,
            flow.state,
            flow.client,
            flow.frontend,
            flow.backend,
            flow.masquerade or (f"DSR {flow.dsr}" if flow.dsr else "-"),
            flow.service,
            age(flow.idle),
            age(flow.expires),
        )
    console().print(printed)
