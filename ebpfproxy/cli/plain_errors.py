"""The class of both programs' groups of commands: their errors may have text of others."""

from __future__ import annotations

from typing import Any

import click

from ebpfproxy.plain_text import plain_lines


class PlainErrorsGroup(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        """Keeps a terminal from what an error has of others: click prints it as it is."""
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            # To click it is final.
            object.__setattr__(error, "message", plain_lines(error.message))
            raise
