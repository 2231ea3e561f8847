"""The class of both programs' groups of commands: how each of them ends, and what is said then."""

from __future__ import annotations

from typing import Any

import click

from ebpfproxy.cli import streams
from ebpfproxy.plain_text import plain_lines


class PlainErrorsGroup(click.Group):
    def main(self, *args: Any, **options: Any) -> Any:
        streams.prepare()
        return super().main(*args, **options)

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        """It prints the help, too."""
        with streams.ended_in_order():
            return super().make_context(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        """Keeps a terminal from what an error has of others: click prints it as it is."""
        try:
            with streams.ended_in_order():
                return super().invoke(ctx)
        except click.ClickException as error:
            # To click it is final.
            object.__setattr__(error, "message", plain_lines(error.message))
            raise
