"""What a kernel's run finds: lines of JSON, written in the emulator and read outside it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import msgspec


class Result(msgspec.Struct, frozen=True):
    """The outcome of a test: passed, failed or skipped, and why it was skipped or how it failed."""

    test: str
    outcome: str
    reason: str = ""
    seconds: float = 0


class Run(msgspec.Struct):
    """``machine``: properties of the running kernel. ``features``: what the agent's probe has found.

    ``refusal``: the agent's only line where it does not start. ``planned``: the number of tests of each group. ``complete``: whether pytest has ended by itself; else
    ``stopped`` has the groups of tests of which some or all did not run. ``repeated``: tests that failed and were run again.
    """

    machine: dict[str, str] = {}
    features: dict[str, bool] = {}
    refusal: str = ""
    planned: dict[str, int] = {}
    results: list[Result] = []
    complete: bool = False
    stopped: list[str] = []
    repeated: list[str] = []
    day: str = ""
    seconds: float = 0


def line(kind: str, value: Any) -> str:
    return json.dumps({kind: msgspec.to_builtins(value)}) + "\n"


def read(lines: Iterable[str]) -> Run:
    """Reads what :func:`line` made; the last line of a kernel that crashed may be half of one."""
    run = Run(machine={}, features={}, results=[])
    for text in lines:
        try:
            ((kind, value),) = json.loads(text).items()
        except ValueError:
            continue
        if kind == "result":
            run.results.append(msgspec.convert(value, Result))
        else:
            setattr(run, kind, value)
    return run
