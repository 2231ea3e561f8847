"""``ebpfproxy backend list|drain``."""

from __future__ import annotations

import time
from pathlib import Path

import click

from ebpfproxy.agent.local_pages import ask_drained
from ebpfproxy.agent.local_socket import NoAgentError
from ebpfproxy.cli import completion, options
from ebpfproxy.cli.errors import one_line
from ebpfproxy.cli.option_types import Endpoint, EndpointType
from ebpfproxy.cli.output import console, echo, emit_watching, table
from ebpfproxy.datapath.dump import BackendRow, CurrentMaps, Dump, open_maps
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.kernel.roots import is_locked
from ebpfproxy.datapath.services.drained import Drained

#: How long a command waits for the agent to apply a drain request.
_AGENT_SECONDS = 5.0


@click.group("backend")
def command() -> None:
    """Show and drain backends."""


@command.command("list")
@options.bpf_root
@options.output_format
@options.watch
def list_backends(bpf_root: Path, output: str, watch: bool) -> None:
    """List backends and their state.

    OPEN counts open connections from this node, CONNECTIONS how often the backend was selected.
    """
    with one_line():
        maps = CurrentMaps(bpf_root)
        emit_watching(lambda: Dump(maps.get()).backends(), output, _print, watch)


def _print(rows: list[BackendRow]) -> None:
    printed = table("id", "address", "protocol", "state", "open", "connections", "services")
    for row in rows:
        printed.add_row(
            str(row.id),
            row.address,
            row.protocol,
            row.state,
            str(row.open),
            str(row.connections),
            ", ".join(row.services) or "none",
        )
    console().print(printed)


@command.command("drain")
@click.argument("address", metavar="ADDRESS[:PORT]", type=EndpointType(), shell_complete=completion.backends)
@click.option("--undo", is_flag=True, help="Allow new connections again.")
@options.bpf_root
def drain(address: Endpoint, undo: bool, bpf_root: Path) -> None:
    """Stop new connections from this node to a backend.

    Open connections are kept. The request outlives restarts of the agent; it ends with --undo or when the
    endpoint is deleted. Without a port it applies to all ports of the address.
    """
    with one_line():
        maps = open_maps(bpf_root)
        requests = Drained(maps)
        if undo:
            if not requests.remove(*address):
                raise click.ClickException(f"{address} is not drained")
        else:
            if not _rows(maps, address):
                raise click.ClickException(f"no backend {address} in {maps.folder}")
            requests.add(*address)
        if not is_locked(bpf_root):
            echo(f"{address}: request saved; it is applied when an agent runs")
            return
        _wait(bpf_root, requests, address, undo=undo)
        rows = _rows(maps, address)
    echo(f"{address} is {'no longer drained' if undo else 'drained'}")
    if undo and any(row.state == "drained" for row in rows):
        echo("It still gets no new connections: its weight is 0, or another request drains it")


def _wait(bpf_root: Path, requests: Drained, target: Endpoint, *, undo: bool) -> None:
    """Returns once the agent has applied the request, which its backends need not show.

    One that is not ready gets no new connections anyway, and one with weight 0 counts as drained. Raises
    ClickException.
    """
    deadline, why = time.monotonic() + _AGENT_SECONDS, ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            if (target in ask_drained(bpf_root, left)) is not undo:
                return
        except NoAgentError as error:
            why = f": {error}"
        if not undo and target not in requests.read():
            raise click.ClickException(f"{target}: its endpoint is deleted, and the request with it")
        time.sleep(0.05)
    raise click.ClickException(f"{target}: request saved, but the agent has not applied it yet{why}")


def _rows(maps: MapSet, target: Endpoint) -> list[BackendRow]:
    """The backends with this address that are not gone."""
    return [row for row in Dump(maps).backends() if row.state != "gone" and target.is_of(row.address)]
