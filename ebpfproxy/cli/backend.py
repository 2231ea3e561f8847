"""``ebpfproxy backend list|drain``."""

from __future__ import annotations

import time
from pathlib import Path

import click

from ebpfproxy.cli import completion, options
from ebpfproxy.cli.errors import one_line
from ebpfproxy.cli.output import console, emit_watching, table
from ebpfproxy.datapath.dump import BackendRow, Dump, open_maps
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.kernel.roots import is_locked
from ebpfproxy.datapath.services.drained import Drained
from ebpfproxy.services.model import format_endpoint
from ebpfproxy.services.values import parse_address, valid_port

#: How long a command waits for the agent to carry out an order.
_AGENT_SECONDS = 5.0


@click.group("backend")
def command() -> None:
    """Backends as the maps hold them."""


@command.command("list")
@options.bpf_root
@options.output_format
@options.watch
def list_backends(bpf_root: Path, output: str, watch: bool) -> None:
    """Every backend and its state.

    OPEN is what this node has open to it, CONNECTIONS how often it was chosen, SERVICES by whom.
    """
    with one_line():
        maps = open_maps(bpf_root)
        emit_watching(lambda: Dump(maps).backends(), output, _print, watch)


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
@click.argument("address", metavar="ADDRESS[:PORT]", shell_complete=completion.backends)
@click.option("--undo", is_flag=True, help="Let new connections go there again.")
@options.bpf_root
def drain(address: str, undo: bool, bpf_root: Path) -> None:
    """Send no new connections of this node to a backend.

    Open ones go on. It holds until it is undone or the endpoint goes, over restarts of the agent, too.
    Without a port it is about all ports of the address.
    """
    where = _parse(address)
    with one_line():
        maps = open_maps(bpf_root)
        orders = Drained(maps)
        if undo:
            if not orders.remove(*where):
                raise click.ClickException(f"{address} is not drained")
        else:
            if not _of(maps, where):
                raise click.ClickException(f"no backend {address} in {maps.folder}")
            orders.add(*where)
        if not is_locked(bpf_root):
            click.echo(f"{address}: noted; no agent runs that would do it now")
            return
        deadline = time.monotonic() + _AGENT_SECONDS
        while any((row.state == "drained") is undo for row in _of(maps, where)):
            if time.monotonic() > deadline:
                raise click.ClickException(f"{address}: noted, but the agent has not done it yet")
            time.sleep(0.05)
    click.echo(f"{address} is {'in use again' if undo else 'drained'}")


def _parse(text: str) -> tuple[bytes, int]:
    """Address and port, 0 for all. Raises BadParameter."""
    host, _, digits = text.rpartition(":") if "." in text or "]" in text else (text, "", "")
    address = parse_address((host or text).strip("[]"))
    if address is None or (host and digits and not (digits.isdigit() and valid_port(int(digits)))):
        raise click.BadParameter(f"{text!r} is neither an address nor ADDRESS:PORT")
    return address, int(digits) if host and digits else 0


def _of(maps: MapSet, where: tuple[bytes, int]) -> list[BackendRow]:
    """The rows of an address, those that are gone left out."""
    address, port = where
    text = format_endpoint(address, port).rpartition(":")
    return [
        row
        for row in Dump(maps).backends()
        if row.state != "gone"
        and row.address.rpartition(":")[0] == text[0]
        and (not port or row.address.rpartition(":")[2] == text[2])
    ]
