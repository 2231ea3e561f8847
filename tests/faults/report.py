"""What was lost, by fault and kind of load: a section of docs/tested.md."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

from tests import tested
from tests.faults.load import KINDS, Result

TITLE, COMMAND = "Faults", "make test-faults"
_began = time.monotonic()
_rows: dict[str, dict[str, list[int]]] = {}


def add(fault: str, found: Mapping[str, Sequence[Result]]) -> None:
    """``found``: by place. A fault may be added more than once."""
    row = _rows.setdefault(fault, {kind: [0, 0] for kind in KINDS})
    for results in found.values():
        for each in results:
            row[each.kind][0] += each.count
            row[each.kind][1] += len(each.lost)


def add_probes(fault: str, count: int, lost: int) -> None:
    """Of health checks."""
    row = _rows.setdefault(fault, {kind: [0, 0] for kind in KINDS}).setdefault("probes", [0, 0])
    row[0] += count
    row[1] += lost


def part() -> dict[str, dict[str, list[int]]]:
    """What this process has recorded."""
    return _rows


def join(found: Mapping[str, Mapping[str, list[int]]]) -> None:
    """Adds what another process of the same run has recorded."""
    for fault, kinds in found.items():
        row = _rows.setdefault(fault, {})
        for kind, (count, lost) in kinds.items():
            counts = row.setdefault(kind, [0, 0])
            counts[0] += count
            counts[1] += lost


def write() -> None:
    if tested.PAGE not in os.environ or not _rows:
        return
    head = ["fault", "connections", "requests", "datagrams", "requests on long connections", "health checks"]
    rows = [[fault, *(_cell(row.get(kind)) for kind in (*KINDS, "probes"))] for fault, row in _rows.items()]
    lines = [
        "Two nodes in network namespaces, with the programs in this kernel and the stand-in API server. Load comes from a "
        "pod (sockets) and from outside through NodePorts (packets), to two Services with an endpoint on each node. A "
        "connection or datagram is lost if it has an error, no answer in 10 s, or one of a server that is no endpoint of "
        "the Service. After each fault the maps are compared with the API's objects. Lost of how many:",
        "",
        *tested.table(head, rows),
    ]
    tested.write(
        Path(os.environ[tested.PAGE]), TITLE, COMMAND, date.today(), time.monotonic() - _began, lines
    )


def _cell(counts: list[int] | None) -> str:
    return f"{counts[1]} of {counts[0]:,}" if counts and counts[0] else ""
