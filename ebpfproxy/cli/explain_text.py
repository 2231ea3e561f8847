"""The text of ``ebpfproxy explain``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ebpfproxy.cli.output import age, console, plain, table
from ebpfproxy.explain.answer import Explanation
from ebpfproxy.explain.endpoint_reasons import EndpointRow
from ebpfproxy.explain.path import Hook, Outcome, Ranges
from ebpfproxy.explain.report import Report

_SHOWN = 16
_HOOKS = {
    Hook.SOCKET: "the socket (connect and sendmsg)",
    Hook.XDP: "XDP",
    Hook.INGRESS: "tc ingress, where its packets come in",
    Hook.EGRESS: "tc egress, where its packets leave",
    Hook.LOOPBACK: "tc on the loopback device",
    Hook.NONE: "none",
}
_ERRORS = {"timeout": "packets are dropped, connect() times out"}


def print_report(report: Report) -> None:
    """Prints each explanation: a line with the answer, facts, and a table of the endpoints."""
    out = console()
    if report.why:
        out.print(plain(f"DOES NOT WORK: {report.why}"))
    for number, each in enumerate(report.explanations):
        if number:
            out.print()
        out.print(plain(_headline(each)))
        for name, value in _facts(each):
            out.print(plain(f"  {name + ':':<16}{value}"))
        if each.endpoints:
            out.print(_endpoints(each.endpoints))
    if report.without_agent:
        out.print()
        out.print(plain(f"The maps alone are explained, and not why they are so: {report.without_agent}."))


def _headline(each: Explanation) -> str:
    to = f"{each.service} {each.target}" if each.service else each.target
    answer = "works" if each.works else f"DOES NOT WORK: {_ERRORS.get(each.error, each.error)}"
    return f"{each.client} → {to}  {answer}"


def _facts(each: Explanation) -> Iterator[tuple[str, str]]:
    yield "because", each.why
    yield "decided at", _HOOKS[each.hook]
    yield from (("before", step) for step in each.steps)
    if each.service:
        yield "frontend", f"{each.frontend}, {each.scope} scope"
        yield "policy", f"{each.policy} ({each.policy_from})"
    if each.outcome is Outcome.TRANSLATED:
        yield "algorithm", each.algorithm
    if each.affinity is not None:
        kept = f"{each.affinity.client} stays with {each.affinity.backend} for {age(each.affinity.expires)}"
        free = f"{each.affinity.client} has no entry"
        yield "affinity", f"{each.affinity.seconds}s, {kept if each.affinity.backend else free}"
    if each.source_ranges is not Ranges.NONE:
        yield "source ranges", each.source_ranges
    if each.masquerade is not None:
        yield "masquerade", _masquerade(each)
        for hook, backends in each.masquerade.forwarded.items():
            more = f" and {len(backends) - _SHOWN} more" * (len(backends) > _SHOWN)
            where = "XDP, but the first of a flow" if hook is Hook.XDP else "tc ingress"
            yield "past netfilter", f"packets to {', '.join(backends[:_SHOWN])}{more}, at {where}"
    for row in each.sockets:
        yield "open sockets", f"{row.sockets} to {row.backend} ({row.state}): {row.what}"
    for flow in each.flows[:_SHOWN]:
        seen = f", seen as {flow.masquerade}" if flow.masquerade else ""
        yield (
            "open flow",
            f"{flow.client} to {flow.backend}{seen}, {flow.state}, idle {age(flow.idle)}: {flow.what}",
        )
    if len(each.flows) > _SHOWN:
        yield "open flow", f"… {len(each.flows)} in all"
    yield from (("note", note) for note in each.notes)


def _masquerade(each: Explanation) -> str:
    found = each.masquerade
    assert found is not None
    addresses = " or ".join(found.addresses) or "an address of this node"
    if found.applies:
        return f"yes, as {addresses}: {found.why}"
    return f"no: {found.why}" + f"; but as {addresses} where the backend is the client itself" * found.hairpin


def _endpoints(rows: tuple[EndpointRow, ...]) -> Any:
    shown = rows if len(rows) <= _SHOWN else [*_shortened(rows)]
    columns = {
        "": ["" for _ in shown],
        "endpoint": [row.address for row in shown],
        "pod": [row.pod for row in shown],
        "new connections": [f"{row.share:.0%}" if row.used else "none" for row in shown],
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
