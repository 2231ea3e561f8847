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
from ebpfproxy.cli.option_types import Endpoint, EndpointType, ServiceName
from ebpfproxy.cli.output import age, console, echo, emit, table
from ebpfproxy.datapath.dump import Dump, open_maps
from ebpfproxy.datapath.flows.conntrack_table import STATES, FlowRow, Timeouts, flows_of
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
            type=ServiceName(),
            shell_complete=completion.services,
            help="Only flows to this Service.",
        ),
        click.option(
            "--backend",
            metavar="ADDRESS[:PORT]",
            type=EndpointType(),
            shell_complete=completion.backends,
            help="Only flows to this backend.",
        ),
        click.option(
            "--frontend", metavar="ADDRESS[:PORT]", type=EndpointType(), help="Only flows to this frontend."
        ),
        click.option(
            "--client", metavar="ADDRESS[:PORT]", type=EndpointType(), help="Only flows of this client."
        ),
        click.option(
            "--protocol",
            type=click.Choice([p.name for p in Protocol], case_sensitive=False),
            help="Only flows of this protocol.",
        ),
        click.option(
            "--state",
            type=click.Choice(STATES, case_sensitive=False),
            metavar="STATE",
            help=f"Only flows in this state: {', '.join(STATES)}.",
        ),
    ):
        function = option(function)
    return function


class _Filter:
    def __init__(self, **wanted: str | Endpoint | None) -> None:
        self.wanted = {name: value for name, value in wanted.items() if value is not None}

    def matches(self, flow: FlowRow) -> bool:
        return all(_matches(value, getattr(flow, name)) for name, value in self.wanted.items())


def _matches(wanted: str | Endpoint, shown: str) -> bool:
    return wanted.is_of(shown) if isinstance(wanted, Endpoint) else wanted == shown


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
def list_flows(bpf_root: Path, output: str, **wanted: str | Endpoint | None) -> None:
    """List flows and their translation.

    EXPIRES is the time until a flow without further packets ends.
    """
    with one_line():
        chosen = _Filter(**wanted)
        emit([flow for flow, _ in read(open_maps(bpf_root)) if chosen.matches(flow)], output, _print)


@command.command("get")
@click.argument("client", metavar="CLIENT:PORT", type=EndpointType(needs_port=True))
@options.bpf_root
@options.output_format
def get_flow(client: Endpoint, bpf_root: Path, output: str) -> None:
    """Show the flows of one client address and port.

    CLIENT:PORT has the format of list, with an IPv6 address in brackets.
    """
    with one_line():
        found = [flow for flow, _ in read(open_maps(bpf_root)) if client.is_of(flow.client)]
        if not found:
            raise click.ClickException(f"no flow of {client}")
        emit(found, output, _print)


@command.command("flush")
@options.bpf_root
@_filters
@click.option("--all", "everything", is_flag=True, help="Flush every flow. Without it a filter is required.")
def flush(bpf_root: Path, everything: bool, **wanted: str | Endpoint | None) -> None:
    """Delete flows; their connections break.

    A connection survives if the frontend is the backend's own address.
    """
    with one_line():
        chosen = _Filter(**wanted)
        options.one_of_filters_and_all(filtered=bool(chosen.wanted), everything=everything)
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
