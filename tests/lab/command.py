"""The ``ebpfproxy`` command without a new interpreter: a forked child has its modules already.

Tests ask ``status`` and its like hundreds of times, and importing takes most of such a call's time.
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
    """Once in the parent, so that no child has to."""
    for name in cli.COMMANDS:
        importlib.import_module(f"ebpfproxy.cli.{name}")


def run(arguments: list[str]) -> Done:
    """Runs the command in this process, whose output it takes away: call it in a child that ends then."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        os.dup2(output.fileno(), 1)
        os.dup2(errors.fileno(), 2)
        # pytest has put others in their place.
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
