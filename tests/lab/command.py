"""Runs ``ebpfproxy`` commands, the agent as well, in a forked child, which has their modules already.

Tests run ``status`` and other commands hundreds of times, and start hundreds of agents; importing takes most of the time
of a new process.
"""

from __future__ import annotations

import functools
import importlib
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping
from typing import NamedTuple

from ebpfproxy import cli

#: What commands import once they need it.
_LATER = {
    "run": ("ebpfproxy.agent.cluster_source", "ebpfproxy.agent.folder_source"),
    "top": ("rich.console", "ebpfproxy.cli.top_screen"),
    "ui": ("ebpfproxy.ui.serve",),
}
_TABLES = ("rich.console", "rich.table", "ebpfproxy.cli.plain_rich")


class Done(NamedTuple):
    code: int
    output: str
    errors: str


@functools.cache
def import_commands() -> None:
    """Imports all commands once in the parent, and what they import when they print tables."""
    for name in (*(f"ebpfproxy.cli.{command}" for command in cli.COMMANDS), "rich.console", "rich.table"):
        importlib.import_module(name)


def modules(arguments: list[str]) -> tuple[str, ...]:
    """What a process has to import to run the command."""
    name = next((each for each in arguments if each in cli.COMMANDS), None)
    return ("ebpfproxy.cli",) if name is None else (f"ebpfproxy.cli.{name}", *_LATER.get(name, _TABLES))


def main(arguments: list[str], environment: Mapping[str, str], folder: str) -> None:
    """Does in a child what a new interpreter does for ``python -m ebpfproxy``: the child exits afterwards."""
    _set_environment(environment)
    os.chdir(folder)
    # The agent executes this again when its configuration has changed.
    sys.orig_argv = [sys.executable, "-m", "ebpfproxy", *arguments]
    sys.argv = ["", *arguments]
    runpy.run_module("ebpfproxy", run_name="__main__", alter_sys=True)


def _set_environment(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


def run(arguments: list[str], environment: Mapping[str, str] | None = None) -> Done:
    """Runs the command in this process, redirecting its output: to be called in a child that exits afterwards."""
    if environment is not None:
        _set_environment(environment)
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
