"""``ebpfproxy affinity list|flush``."""

from __future__ import annotations

import time
from pathlib import Path

import click

from ebpfproxy.cli import completion, options
from ebpfproxy.cli.errors import one_line
from ebpfproxy.cli.option_types import ClientName, Endpoint, EndpointType, ServiceName
from ebpfproxy.cli.output import age, console, echo, emit, table
from ebpfproxy.datapath.affinity_table import NETNS, AffinityRow, affinity_rows
from ebpfproxy.datapath.dump import open_maps
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.netlink.namespaces import NO_ENTRY, may_enter, names_by_cookie
from ebpfproxy.services.values import parse_address

_service = click.option(
    "--service",
    metavar="NAMESPACE/NAME",
    type=ServiceName(),
    shell_complete=completion.services,
    help="Only clients of this Service.",
)
_client = click.option(
    "--client", metavar="ADDRESS|netns:COOKIE|NAME", type=ClientName(), help="Only this client."
)
_backend = click.option(
    "--backend",
    metavar="ADDRESS[:PORT]",
    type=EndpointType(),
    shell_complete=completion.backends,
    help="Only clients of this backend.",
)


@click.group("affinity")
def command() -> None:
    """Show and flush session affinity (sessionAffinity: ClientIP)."""


def _read(
    maps: MapSet, service: str | None, client: str | None, backend: Endpoint | None
) -> list[tuple[AffinityRow, bytes]]:
    rows = affinity_rows(maps, time.monotonic_ns(), names_by_cookie())
    nameless = any(not row.name for row, _ in rows if row.client.startswith(NETNS))
    if nameless and not may_enter():
        known = {name for row, _ in rows for name in (row.client, row.name)}
        if client is not None and client not in known and parse_address(client) is None:
            raise click.ClickException(f"which of the clients is {client} is not known: {NO_ENTRY}")
        echo(f"names of clients are missing: {NO_ENTRY}", err=True)
    return [
        (row, key)
        for row, key in rows
        if service in (None, row.service)
        and client in (None, row.client, row.name)
        and (backend is None or backend.is_of(row.backend))
    ]


@command.command("list")
@options.bpf_root
@options.output_format
@_service
@_client
@_backend
def list_clients(
    bpf_root: Path, output: str, service: str | None, client: str | None, backend: Endpoint | None
) -> None:
    """List clients, their backends, and when the affinity expires.

    A client is an address in the packet path and a network namespace, of a pod or the host, at the socket.
    """
    with one_line():
        rows = _read(open_maps(bpf_root), service, client, backend)
        emit([row for row, _ in rows], output, _print)


@command.command("flush")
@options.bpf_root
@_service
@_client
@_backend
@click.option(
    "--all", "everything", is_flag=True, help="Flush every client. Without it a filter is required."
)
def flush(
    bpf_root: Path, service: str | None, client: str | None, backend: Endpoint | None, everything: bool
) -> None:
    """Delete affinity entries: the next connection may go to another backend. Open ones are kept."""
    with one_line():
        filtered = any(each is not None for each in (service, client, backend))
        options.one_of_filters_and_all(filtered=filtered, everything=everything)
        maps = open_maps(bpf_root)
        deleted = sum(maps["affinity"].delete(key) for _, key in _read(maps, service, client, backend))
    echo(f"flushed {deleted} clients")


def _print(rows: list[AffinityRow]) -> None:
    printed = table("service", "port", "client", "name", "backend", "idle", "expires")
    for row in rows:
        printed.add_row(
            row.service,
            row.port_name,
            row.client,
            row.name or "-",
            row.backend,
            age(row.idle),
            age(row.expires),
        )
    console().print(printed)
