"""Why each endpoint of a Service is used or left out: the rules' own decisions, put into records.

:func:`ebpfproxy.services.ports.choice_of` decides; nothing here decides anything. The agent answers
``ebpfproxy explain`` with these records as JSON.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set

import msgspec

from ebpfproxy.kube.objects import ObjectKey
from ebpfproxy.services.balancing import Weights
from ebpfproxy.services.endpoints import SliceEndpoints, Traits
from ebpfproxy.services.frontends import PortFrontends, ServiceFrontends
from ebpfproxy.services.model import (
    Backend,
    Frontend,
    Policy,
    ServicePortKey,
    format_address,
    format_endpoint,
)
from ebpfproxy.services.policy import Basis, Unused, unused_hints
from ebpfproxy.services.ports import Choice, TakenOut, choice_of


class Reason(enum.StrEnum):
    """What the rules make of an endpoint under one traffic policy."""

    USED = "used"
    NOT_READY = "not-ready"
    TERMINATING = "terminating"
    NODE_HINTS = "node-hints"
    ZONE_HINTS = "zone-hints"
    OTHER_NODE = "other-node"
    DRAINED = "drained"
    WEIGHT_ZERO = "weight-zero"
    #: No slice that has the address has the Service's port, by name and protocol.
    NO_PORT = "no-such-port"


class EndpointReason(msgspec.Struct, frozen=True):
    """One endpoint, as its slices have it, and what the rules make of it by traffic policy.

    ``address`` with the port, but without one where no slice has the port. ``state``: ``ready``,
    ``terminating`` (and serving), ``not ready``, ``not serving`` (and terminating). ``pod``: namespace and
    name, empty where the slice names none.
    """

    address: str
    state: str
    cluster: Reason
    local: Reason
    node: str = ""
    zone: str = ""
    node_hints: tuple[str, ...] = ()
    zone_hints: tuple[str, ...] = ()
    weight: int = 1
    pod: str = ""

    def under(self, policy: Policy) -> Reason:
        return self.local if policy is Policy.LOCAL else self.cluster


class LostFrontend(msgspec.Struct, frozen=True):
    """A frontend that the Service asks for, but an older one has."""

    frontend: str
    owner: str


class PortReasons(msgspec.Struct, frozen=True):
    """One port of a Service in one family (4 or 6)."""

    port_name: str
    protocol: str
    family: int
    cluster_basis: Basis
    local_basis: Basis
    endpoints: tuple[EndpointReason, ...]
    #: Why hints that some endpoints have are not followed; None where they are, or there are none.
    node_hints_unused: Unused | None = None
    zone_hints_unused: Unused | None = None
    lost: tuple[LostFrontend, ...] = ()

    def basis(self, policy: Policy) -> Basis:
        return self.local_basis if policy is Policy.LOCAL else self.cluster_basis


class ServiceReasons(msgspec.Struct, frozen=True):
    """What the agent of ``node`` knows of a Service. ``unserved``: why it has no frontends, if so."""

    namespace: str
    name: str
    node: str
    zone: str
    internal_policy: str
    external_policy: str
    unserved: str = ""
    warnings: tuple[str, ...] = ()
    ports: tuple[PortReasons, ...] = ()

    def port(self, key: ServicePortKey) -> PortReasons | None:
        wanted = key.port_name, key.protocol.name, key.family.value
        return next((p for p in self.ports if (p.port_name, p.protocol, p.family) == wanted), None)


def reasons_of(
    key: ObjectKey,
    service: ServiceFrontends,
    slices: Sequence[SliceEndpoints],
    owner: Callable[[Frontend], ObjectKey | None],
    *,
    drained: Set[tuple[bytes, int]],
    node_name: str,
    zone: str | None,
) -> ServiceReasons:
    """Explains a Service; the arguments are those of :func:`ebpfproxy.services.ports.ports_of`.

    ``owner``: the Service that has a frontend which this one asks for.
    """

    pods = dict(named for piece in slices for named in piece.pod_names())

    def port_reasons(port: PortFrontends) -> PortReasons:
        choice = choice_of(port, slices, service.weights, drained=drained, node_name=node_name, zone=zone)
        usable = choice.usable
        by_node, by_zone = unused_hints(choice.endpoints, node_name, zone)
        found = [*_of_endpoints(choice, service.weights, pods), *_without_port(port, slices, choice, pods)]
        return PortReasons(
            port_name=port.key.port_name,
            protocol=port.key.protocol.name,
            family=port.key.family,
            cluster_basis=usable.cluster_basis,
            local_basis=usable.local_basis,
            endpoints=tuple(found),
            node_hints_unused=by_node,
            zone_hints_unused=by_zone,
            lost=tuple(
                LostFrontend(f"{format_endpoint(each.address, each.port)}/{each.protocol.name}", str(other))
                for each in port.frontends
                if (other := owner(each)) != key
            ),
        )

    warnings = [*service.warnings, *(warning for piece in slices for warning in piece.warnings)]
    return ServiceReasons(
        namespace=key.namespace,
        name=key.name,
        node=node_name,
        zone=zone or "",
        internal_policy=service.internal.name.capitalize(),
        external_policy=service.external.name.capitalize(),
        unserved=service.unserved,
        warnings=tuple(map(str, warnings)),
        ports=tuple(map(port_reasons, service.ports)),
    )


_LEFT_OUT_BY = {Basis.NODE_HINTS: Reason.NODE_HINTS, Basis.ZONE_HINTS: Reason.ZONE_HINTS}
_TAKEN_OUT = {TakenOut.DRAINED: Reason.DRAINED, TakenOut.WEIGHT: Reason.WEIGHT_ZERO}


def _of_endpoints(
    choice: Choice, weights: Weights | None, pods: Mapping[bytes, str]
) -> Iterator[EndpointReason]:
    usable = choice.usable
    cluster, local = frozenset(usable.cluster), frozenset(usable.local)

    def weight(backend: Backend, traits: Traits) -> int:
        return weights.of(backend.address, traits.node, traits.zone) if weights is not None else 1

    for backend in sorted((*choice.endpoints, *choice.taken_out)):
        if (taken_out := choice.taken_out.get(backend)) is not None:
            traits = taken_out[1]
            by_cluster = by_local = _TAKEN_OUT[taken_out[0]]
        else:
            traits = choice.endpoints[backend]
            by_cluster = Reason.USED if backend in cluster else _left_out(traits, usable.cluster_basis)
            by_local = Reason.USED if backend in local else _left_out_here(traits, usable.local_basis)
        yield EndpointReason(
            address=format_endpoint(backend.address, backend.port),
            state=_state(traits),
            cluster=by_cluster,
            local=by_local,
            node=traits.node,
            zone=traits.zone,
            node_hints=traits.nodes,
            zone_hints=traits.zones,
            weight=weight(backend, traits),
            pod=pods.get(backend.address, ""),
        )


def _state(traits: Traits) -> str:
    if traits.ready:
        return "ready"
    if traits.draining:
        return "terminating"
    return "not serving" if traits.terminating else "not ready"


def _left_out(traits: Traits, basis: Basis) -> Reason:
    if traits.ready:
        return _LEFT_OUT_BY[basis]
    return Reason.TERMINATING if traits.draining else Reason.NOT_READY


def _left_out_here(traits: Traits, basis: Basis) -> Reason:
    if not traits.ready and not traits.draining:
        return Reason.NOT_READY
    return Reason.TERMINATING if traits.local and basis is Basis.READY else Reason.OTHER_NODE


def _without_port(
    port: PortFrontends, slices: Iterable[SliceEndpoints], choice: Choice, pods: Mapping[bytes, str]
) -> Iterator[EndpointReason]:
    known = {backend.address for backend in (*choice.endpoints, *choice.taken_out)}
    others = {
        address: traits
        for piece in slices
        if piece.family is port.key.family
        for address, traits in zip(piece.addresses, piece.traits, strict=True)
        if address not in known
    }
    for address, traits in sorted(others.items()):
        yield EndpointReason(
            address=format_address(address),
            state=_state(traits),
            cluster=Reason.NO_PORT,
            local=Reason.NO_PORT,
            node=traits.node,
            zone=traits.zone,
            pod=pods.get(address, ""),
        )
