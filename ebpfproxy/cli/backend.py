"""``ebpfproxy backend list``."""

from __future__ import annotations

from pathlib import Path

import click

from ebpfproxy.cli import options
from ebpfproxy.cli.errors import one_line
from ebpfproxy.cli.output import console, emit_watching, table
from ebpfproxy.datapath.dump import BackendRow, Dump, open_maps


@click.group("backend")
def command() -> None:
    """Backends as the maps hold them."""


@command.command("list")
@options.bpf_root
@options.output_format
@options.watch
def list_backends(bpf_root: Path, output: str, watch: bool) -> None:
    """Every backend, its state, what this node has open to it, how often it was chosen, and by whom."""
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
