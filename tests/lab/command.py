"""Runs ``ebpfproxy`` commands in a forked child, which has their modules already.

Tests run ``status`` and other commands hundreds of times; importing takes most of the time of a new process.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import tempfile
from typing import NamedTuple

from ebpfproxy import cli


class Done(NamedTuple):
    code: int
    output: str
    errors: str


@functools.cache
def import_commands() -> None:
    """Imports all commands once in the parent, and what they import when they print tables."""
    for name in (*(f"ebpfproxy.cli.{command}" for command in cli.COMMANDS), "rich.console", "rich.table"):
        importlib.import_module(name)


def run(arguments: list[str]) -> Done:
    """Runs the command in this process, redirecting its output: to be called in a child that exits afterwards."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        os.dup2(output.fileno(), 1)
        os.dup2(errors.fileno(), 2)
        # pytest has replaced both streams.
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        code = 0
        try:
            cli.main(arguments, prog_name="ebpfproxy")
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            if isinstance(ended.code, str):
                print(ended.code, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        return Done(code, *(_content(file.fileno()) for file in (output, errors)))


def _content(descriptor: int) -> str:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode()
