"""What a kernel's run finds: lines of JSON, written in the emulator and read outside it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec

from tests.kernels.kernels import group_of, network_of


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
    ``passed``: the number of tests that are not in ``results``, by group and by the network that they are about.
    """

    machine: dict[str, str] = {}
    features: dict[str, bool] = {}
    refusal: str = ""
    planned: dict[str, int] = {}
    results: list[Result] = []
    passed: dict[str, dict[str, int]] = {}
    complete: bool = False
    stopped: list[str] = []
    repeated: list[str] = []
    day: str = ""
    commit: str = ""
    seconds: float = 0


def folded(run: Run) -> Run:
    """Returns a run with the number of tests that passed in place of each one's name: there are thousands."""
    passed = {group: Counter(counts) for group, counts in run.passed.items()}
    for each in run.results:
        if each.outcome == "passed":
            passed.setdefault(group_of(each.test), Counter())[network_of(each.test)] += 1
    return msgspec.structs.replace(
        run,
        results=[each for each in run.results if each.outcome != "passed"],
        passed={group: dict(counts) for group, counts in passed.items()},
    )


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
