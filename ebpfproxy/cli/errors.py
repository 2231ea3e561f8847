"""Errors that a user can act on become one line, and exit code 1, or 2 where 1 is an answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from ebpfproxy.inspection.failures import FAILURES, told


class UnansweredError(click.ClickException):
    """Nothing was found out, where exit code 1 would say that something is wrong."""

    exit_code = 2


@contextmanager
def answers() -> Iterator[None]:
    """Gives errors that code."""
    try:
        yield
    except click.UsageError:
        raise
    except click.ClickException as error:
        raise UnansweredError(error.message) from error


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
