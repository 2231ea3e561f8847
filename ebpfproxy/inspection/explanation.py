"""An explanation in words: one line with the answer, and named facts."""

from __future__ import annotations

from collections.abc import Iterator

from ebpfproxy.explain.answer import Explanation
from ebpfproxy.explain.path import Hook, Outcome, Ranges
from ebpfproxy.inspection.words import age

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


def headline(each: Explanation) -> str:
    to = f"{each.service} {each.target}" if each.service else each.target
    answer = "works" if each.works else f"DOES NOT WORK: {_ERRORS.get(each.error, each.error)}"
    return f"{each.client} → {to}  {answer}"


def facts(each: Explanation) -> Iterator[tuple[str, str]]:
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
            more = f" and {len(backends) - _SHOWN} more" if len(backends) > _SHOWN else ""
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
    if found.hairpin:
        return f"no: {found.why}; but as {addresses} where the backend is the client itself"
    return f"no: {found.why}"
