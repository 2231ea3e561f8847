"""Runs netfilter's own tools. Their output is in the error when they fail."""

from __future__ import annotations

import shutil
import subprocess

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
            command, input=stdin, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except FileNotFoundError as error:
        raise ToolError(f"{command[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise ToolError(f"{' '.join(command)} did not end within {_SECONDS:g} s") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise ToolError(f"{' '.join(command)}: {'; '.join(said[-_SHOWN_LINES:]) or done.returncode}")
    return done.stdout
