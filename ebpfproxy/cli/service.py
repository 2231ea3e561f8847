"""``ebpfproxy service list|get``."""

from __future__ import annotations

from pathlib import Path

import click

from ebpfproxy.cli import completion, options
from ebpfproxy.cli.errors import one_line
from ebpfproxy.cli.output import console, emit_watching, table
from ebpfproxy.datapath.dump import CurrentMaps, Dump, FrontendRow

_SHOWN_BACKENDS = 4


@click.group("service")
def command() -> None:
    """Show Services as they are in the maps."""


@command.command("list")
@options.bpf_root
@options.output_format
@options.watch
@options.namespace
def list_services(bpf_root: Path, output: str, watch: bool, namespace: str | None) -> None:
    """List frontends with the backends that new connections get."""
    options.one_service(namespace, None)
    with one_line():
        maps = CurrentMaps(bpf_root)

        def read() -> list[FrontendRow]:
            rows = Dump(maps.get()).frontends()
            return [row for row in rows if namespace in (None, row.namespace)]

        emit_watching(read, output, _print_list, watch)


@command.command("get")
@click.argument("service", metavar="[NAMESPACE/]NAME", shell_complete=completion.services)
@options.bpf_root
@options.output_format
@options.watch
def get_service(service: str, bpf_root: Path, output: str, watch: bool) -> None:
    """Show the frontends of one Service with all backends. The default namespace is "default"."""
    full = service if options.has_namespace("[NAMESPACE/]NAME", service) else f"default/{service}"
    namespace, _, name = full.partition("/")
    with one_line():
        maps = CurrentMaps(bpf_root)

        def read() -> list[FrontendRow]:
            return [r for r in Dump(maps.get()).frontends() if (r.namespace, r.name) == (namespace, name)]

        if not read() and not watch:
            raise click.ClickException(f"no frontend of a Service {namespace}/{name} in {maps.get().folder}")
        emit_watching(read, output, _print_all, watch)


def _print_list(rows: list[FrontendRow]) -> None:
    _print(rows, _SHOWN_BACKENDS)


def _print_all(rows: list[FrontendRow]) -> None:
    _print(rows, None)


def _print(rows: list[FrontendRow], most: int | None) -> None:
    printed = table(
        "namespace", "name", "port", "type", "scope", "frontend", "algorithm", "affinity", "backends"
    )
    for row in rows:
        shown = [b.address if b.state == "active" else f"{b.address} ({b.state})" for b in row.backends]
        text = ", ".join(shown[:most])
        if most is not None and len(shown) > most:
            text += f" … {len(shown)} in all"
        printed.add_row(
            row.namespace,
            row.name,
            row.port_name,
            row.type,
            row.scope,
            row.frontend,
            row.algorithm,
            f"{row.affinity}s" if row.affinity else "none",
            "not translated: the node's own address" if row.own else text or "none",
        )
    console().print(printed)
