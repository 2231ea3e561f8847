"""Errors that a user can act on become one line and exit code 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from ebpfproxy.inspection.failures import FAILURES, told


@contextmanager
def one_line() -> Iterator[None]:
    try:
        yield
    except FAILURES as error:
        raise click.ClickException(told(error)) from error
    except OSError as error:
        # A file system is full, read-only or gone. What names no file is a mistake of ours.
        if error.filename is None:
            raise
        raise click.ClickException(str(error)) from error
