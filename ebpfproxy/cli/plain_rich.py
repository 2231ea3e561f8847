"""rich's console and table for text of others: they show it, and a terminal obeys none of it."""

from __future__ import annotations

from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

from ebpfproxy.plain_text import plain_lines


class PlainTable(Table):
    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        super().add_row(*(plain_lines(each) if isinstance(each, str) else each for each in cells), **options)


class PlainConsole(Console):
    def print(self, *parts: Any, **options: Any) -> None:
        super().print(*(plain_lines(each) if isinstance(each, str) else each for each in parts), **options)

    def on_broken_pipe(self) -> None:
        """Called while the error is handled: rich would end the process with 1, which is an answer."""
        raise  # noqa: PLE0704 - what is being handled
