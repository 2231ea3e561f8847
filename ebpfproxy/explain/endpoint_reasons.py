"""Each endpoint of a service port in words: whether new connections get it, and by which rule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from ebpfproxy.datapath.lookup import Selected
from ebpfproxy.services.model import Policy, format_endpoint
from ebpfproxy.services.policy import Basis
from ebpfproxy.services.reasons import EndpointReason, PortReasons, Reason, ServiceReasons


class EndpointRow(msgspec.Struct, frozen=True):
    """``used``: the maps have it for new connections. ``reason`` is empty where only the maps are known.

    ``share``: which part of new connections it gets, where weights alone decide.
    """

    address: str
    used: bool
    why: str
    reason: str = ""
    state: str = ""
    node: str = ""
    zone: str = ""
    weight: int = 1
    share: float = 0.0
    pod: str = ""


def rows_of(
    selected: Sequence[Selected],
    policy: Policy,
    service: ServiceReasons | None,
    reasons: PortReasons | None,
) -> tuple[EndpointRow, ...]:
    """The endpoints that are used, then those that are left out; each once."""
    total = sum(each.slots for each in selected)
    in_maps = {
        format_endpoint(each.backend.address, each.backend.port): each.slots / total for each in selected
    }
    if service is None or reasons is None:
        states = {format_endpoint(e.backend.address, e.backend.port): str(e.state) for e in selected}
        return tuple(
            EndpointRow(address, used=True, why="in the maps", state=states[address], share=round(share, 4))
            for address, share in sorted(in_maps.items())
        )
    found = [
        EndpointRow(
            address=each.address,
            used=each.address in in_maps,
            why=_sentence(each, policy, service, reasons),
            reason=each.under(policy),
            state=each.state,
            node=each.node,
            zone=each.zone,
            weight=each.weight,
            pod=each.pod,
            share=round(in_maps.get(each.address, 0.0), 4),
        )
        for each in reasons.endpoints
    ]
    known = {each.address for each in reasons.endpoints}
    found += [
        EndpointRow(address, used=True, why="in the maps, but no endpoint", share=round(share, 4))
        for address, share in in_maps.items()
        if address not in known
    ]
    return tuple(sorted(found, key=lambda row: (not row.used, row.address)))


def differences(selected: Sequence[Selected], policy: Policy, reasons: PortReasons) -> Iterator[str]:
    """One sentence for each endpoint about which the rules and the maps differ."""
    in_maps = {format_endpoint(each.backend.address, each.backend.port) for each in selected}
    by_rules = {each.address for each in reasons.endpoints if each.under(policy) is Reason.USED}
    for address in sorted(by_rules - in_maps):
        yield f"the rules select {address}, but the maps do not have it"
    for address in sorted(in_maps - by_rules):
        yield f"the maps have {address}, but the rules do not select it"


def _sentence(each: EndpointReason, policy: Policy, service: ServiceReasons, reasons: PortReasons) -> str:
    match each.under(policy):
        case Reason.USED:
            return _used(policy, service, reasons.basis(policy))
        case Reason.NOT_READY:
            return "terminating, and not serving any more" if each.state == "not serving" else "not ready"
        case Reason.TERMINATING:
            return "terminating: no new connections while others are ready"
        case Reason.NODE_HINTS:
            return f"its hints are for {_list(each.node_hints)}, this node is {service.node}"
        case Reason.ZONE_HINTS:
            return f"its hints are for {_list(each.zone_hints)}, this node is in {service.zone}"
        case Reason.OTHER_NODE:
            return f"policy Local: it is on {each.node or 'no known node'}"
        case Reason.DRAINED:
            return "drained by hand (ebpfproxy backend drain)"
        case Reason.WEIGHT_ZERO:
            return "weight 0 (ebpfproxy.io/weights)"
        case Reason.NO_PORT:
            return f"its EndpointSlice has no port {reasons.port_name!r}/{reasons.protocol}"


def _used(policy: Policy, service: ServiceReasons, basis: Basis) -> str:
    here = " on this node" if policy is Policy.LOCAL else ""
    match basis:
        case Basis.NODE_HINTS:
            return "a hint names this node"
        case Basis.ZONE_HINTS:
            return f"a hint names this node's zone, {service.zone}"
        case Basis.TERMINATING:
            return f"terminating, but it serves, and none is ready{here}"
        case Basis.READY:
            return f"ready{here}"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)
