"""The text of ``ebpfproxy explain``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ebpfproxy.cli.output import console, plain, table
from ebpfproxy.explain.endpoint_reasons import EndpointRow
from ebpfproxy.explain.report import Report
from ebpfproxy.inspection import words
from ebpfproxy.inspection.explanation import facts, headline

_SHOWN = 16


def print_report(report: Report) -> None:
    """Prints each explanation: a line with the answer, facts, and a table of the endpoints."""
    out = console()
    if report.why:
        out.print(plain(f"DOES NOT WORK: {report.why}"))
    for number, each in enumerate(report.explanations):
        if number:
            out.print()
        out.print(plain(headline(each)))
        for name, value in facts(each):
            out.print(plain(f"  {name + ':':<16}{value}"))
        if each.endpoints:
            is_kept = each.affinity is not None and each.affinity.backend
            out.print(_endpoints(each.endpoints, "without affinity" if is_kept else "new connections"))
    if report.without_agent:
        out.print()
        out.print(plain(f"The maps alone are explained, and not why they are so: {report.without_agent}."))


def _endpoints(rows: tuple[EndpointRow, ...], shares: str) -> Any:
    shown = rows if len(rows) <= _SHOWN else [*_shortened(rows)]
    columns = {
        "": ["" for _ in shown],
        "endpoint": [row.address for row in shown],
        "pod": [row.pod for row in shown],
        shares: [words.share(row.share) if row.used else "none" for row in shown],
        "node": [row.node for row in shown],
        "zone": [row.zone for row in shown],
        "reason": [row.why for row in shown],
    }
    # What nobody has takes no room.
    found = {name: cells for name, cells in columns.items() if not name or any(cells)}
    printed = table(*found)
    for cells in zip(*found.values(), strict=True):
        printed.add_row(*map(plain, cells))
    if len(shown) < len(rows):
        printed.add_row("", f"… {len(rows)} in all, -o json has them")
    return printed


def _shortened(rows: tuple[EndpointRow, ...]) -> Iterator[EndpointRow]:
    """Both kinds, the used ones and those that are left out, have some of the lines."""
    used = [row for row in rows if row.used]
    unused = [row for row in rows if not row.used]
    room = max(_SHOWN // 2, _SHOWN - len(unused))
    yield from used[:room]
    yield from unused[: _SHOWN - len(used[:room])]
