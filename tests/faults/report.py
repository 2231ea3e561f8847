"""What was lost, by fault and kind of load, and what became of each test: a section of docs/tested.md.

EBPFPROXY_FAULTS_KEPT names a file for what earlier runs have found, as the whole takes an hour: a run replaces what it
finds itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

import msgspec

from tests import tested
from tests.faults.load import KINDS, Result

TITLE, COMMAND = "Faults", "make test-faults"
_KEPT = "EBPFPROXY_FAULTS_KEPT"
_began = time.monotonic()


class Row(msgspec.Struct):
    """Of one fault: how many were made and lost, by kind of load; and the steps at which the fault was done."""

    steps: int = 0
    counts: dict[str, tuple[int, int]] = {}

    def add(self, kind: str, count: int, lost: int) -> None:
        before = self.counts.get(kind, (0, 0))
        self.counts[kind] = before[0] + count, before[1] + lost


class Outcome(msgspec.Struct):
    sentence: str
    outcome: str
    seconds: float
    day: str


class Found(msgspec.Struct):
    rows: dict[str, Row] = {}
    #: Keys are names of tests.
    outcomes: dict[str, Outcome] = {}
    seconds: float = 0.0

    def row(self, fault: str) -> Row:
        return self.rows.setdefault(fault, Row())

    def join(self, other: Found) -> None:
        """Adds what another process of the same run has recorded."""
        for fault, theirs in other.rows.items():
            row = self.row(fault)
            row.steps += theirs.steps
            for kind, counts in theirs.counts.items():
                row.add(kind, *counts)
        self.outcomes |= other.outcomes


_found = Found()


def add(fault: str, found: Mapping[str, Sequence[Result]]) -> None:
    """``found``: by place. A fault may be added more than once."""
    for results in found.values():
        for each in results:
            _found.row(fault).add(each.kind, each.count, len(each.lost))


def add_probes(fault: str, count: int, lost: int) -> None:
    """Of health checks."""
    _found.row(fault).add("probes", count, lost)


def add_steps(fault: str, count: int) -> None:
    _found.row(fault).steps += count


def add_outcome(test: str, sentence: str, outcome: str, seconds: float) -> None:
    _found.outcomes[test] = Outcome(sentence, outcome, seconds, date.today().isoformat())


def part() -> bytes:
    """What this process has recorded."""
    return msgspec.json.encode(_found)


def join(part: bytes) -> None:
    _found.join(msgspec.json.decode(part, type=Found))


def write() -> None:
    if tested.PAGE not in os.environ or not _found.rows:
        return
    found, kept = _found, os.environ.get(_KEPT)
    found.seconds = time.monotonic() - _began
    if kept is not None:
        file = Path(kept)
        if file.exists():
            found = msgspec.json.decode(file.read_bytes(), type=Found)
            found.rows |= _found.rows
            found.outcomes |= _found.outcomes
            found.seconds += _found.seconds
        file.write_bytes(msgspec.json.encode(found))
    tested.write(Path(os.environ[tested.PAGE]), TITLE, COMMAND, date.today(), found.seconds, [*_lines(found)])


def _lines(found: Found) -> list[str]:
    head = [
        "fault",
        "steps",
        "connections",
        "requests",
        "datagrams",
        "requests on long connections",
        "health checks",
    ]
    rows = [
        [fault, str(row.steps or ""), *(_cell(row.counts.get(kind)) for kind in (*KINDS, "probes"))]
        for fault, row in found.rows.items()
    ]
    outcomes = [
        [each.sentence, each.outcome, f"{each.seconds:.0f} s", each.day] for each in found.outcomes.values()
    ]
    return [
        "Two nodes in network namespaces, with the programs in this kernel and the stand-in API server. Load comes from a "
        "pod (sockets) and from outside through NodePorts (packets), to two Services with an endpoint on each node. A "
        "connection or datagram is lost if it has an error, no answer in 10 s, or one of a server that is no endpoint of "
        "the Service. After each fault the maps are compared with the API's objects. A step is a system call that changes "
        "maps, programs, attachments or pins, or a line that stores in the maps' memory. The whole is run in parts: what is "
        "not in these tables was not run yet, and where maps change their size, flows of packets may be lost. Lost of how "
        "many:",
        "",
        *tested.table(head, rows),
        *tested.table(["", "", "took", "on"], outcomes),
    ]


def _cell(counts: tuple[int, int] | None) -> str:
    return f"{counts[1]} of {counts[0]:,}" if counts and counts[0] else ""
