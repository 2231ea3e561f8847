"""Runs netfilter's own tools. Their output is in the error when they fail.

Comments of rules have any bytes: what is no UTF-8 is restored as it was saved.
"""

from __future__ import annotations

import shutil
import subprocess

from ebpfproxy.plain_text import plain

_SECONDS = 120.0
_SHOWN_LINES = 5


class ToolError(Exception):
    """A tool is missing or failed; the message has its output."""


def has(tool: str) -> bool:
    return shutil.which(tool) is not None


def run(*command: str, stdin: str | None = None) -> str:
    """Returns what the command prints. Raises ToolError."""
    try:
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=_SECONDS,
            check=False,
        )
    except FileNotFoundError as error:
        raise ToolError(f"{command[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise ToolError(f"{' '.join(command)} did not end within {_SECONDS:g} s") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        shown = plain("; ".join(said[-_SHOWN_LINES:]))
        raise ToolError(f"{' '.join(command)}: {shown or done.returncode}")
    return done.stdout
