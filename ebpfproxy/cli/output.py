"""Prints values as a table, JSON or YAML, once or at every change."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click
import msgspec
import yaml

from ebpfproxy.inspection import words
from ebpfproxy.plain_text import escaped_json, plain, plain_lines

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["age", "console", "echo", "emit", "emit_watching", "json_of", "plain", "table"]

_WATCH_SECONDS = 0.5
age = words.age


def echo(text: object = "", *, err: bool = False, nl: bool = True) -> None:
    """Prints lines, of which a terminal obeys nothing: the API and processes choose what many name."""
    click.echo(plain_lines(str(text)), err=err, nl=nl)


def table(*columns: str) -> Table:
    """A plain table as kubectl prints them: no borders, upper-case heads."""
    # It is a fifth of a command's modules, and JSON and YAML need none of them.
    from ebpfproxy.cli.plain_rich import PlainTable  # noqa: PLC0415

    made = PlainTable(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for column in columns:
        made.add_column(column.upper(), overflow="fold", no_wrap=not sys.stdout.isatty())
    return made


def console() -> Console:
    """A console as wide as the terminal, or without a limit if there is none: a pipe gets whole lines."""
    from ebpfproxy.cli.plain_rich import PlainConsole  # noqa: PLC0415 - as above

    return PlainConsole(
        highlight=False, markup=False, width=None if sys.stdout.isatty() else 4000, soft_wrap=False
    )


def json_of(value: Any, *, indent: int = 0) -> str:
    """On one line where nothing is indented."""
    encoded = msgspec.json.encode(value)
    return escaped_json((msgspec.json.format(encoded, indent=indent) if indent else encoded).decode())


def emit(value: Any, form: str, as_table: Callable[[Any], None]) -> None:
    """Prints ``value`` (anything msgspec can turn into builtins)."""
    if form == "json":
        click.echo(json_of(value, indent=2))
    elif form == "yaml":
        click.echo(yaml.safe_dump(msgspec.to_builtins(value), sort_keys=False).rstrip())
    else:
        as_table(value)


def emit_watching(read: Callable[[], Any], form: str, as_table: Callable[[Any], None], watch: bool) -> None:
    """Prints the result of ``read``; with ``watch`` again at every change, on a cleared terminal.

    An interrupt is how that ends.
    """
    if not watch:
        emit(read(), form, as_table)
        return
    before: Any = None
    with suppress(KeyboardInterrupt):
        while True:
            value = read()
            if value != before:
                if sys.stdout.isatty() and form == "table":
                    click.clear()
                elif before is not None and form == "yaml":
                    click.echo("---")
                emit(value, form, as_table)
                sys.stdout.flush()
            before = value
            time.sleep(_WATCH_SECONDS)
