"""From a Service and its slices to the service ports that a datapath gets: all rules put together."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import NamedTuple

from ebpfproxy.services.balancing import Weights
from ebpfproxy.services.endpoints import SliceEndpoints, Traits, merge
from ebpfproxy.services.frontends import PortFrontends, ServiceFrontends
from ebpfproxy.services.model import Backend, Family, Frontend, ServicePort
from ebpfproxy.services.policy import Usable, usable_endpoints


class TakenOut(enum.StrEnum):
    """Why an endpoint that could serve gets no new connections from this node."""

    DRAINED = "drained"
    WEIGHT = "weight-zero"


class Choice(NamedTuple):
    """What the rules say of a service port's endpoints: each of them is in exactly one of the first two."""

    endpoints: Mapping[Backend, Traits]
    taken_out: Mapping[Backend, tuple[TakenOut, Traits]]
    #: The rules see only ``endpoints``.
    usable: Usable


def ports_of(
    service: ServiceFrontends,
    slices: Sequence[SliceEndpoints],
    owns: Callable[[Frontend], bool],
    *,
    drained: Set[tuple[bytes, int]],
    node_name: str,
    zone: str | None,
) -> Iterator[ServicePort]:
    """The ports that have a frontend left, of those that the Service ``owns``.

    ``drained``: addresses and ports (0: all) that shall take no new connections from this node.
    """
    for port in service.ports:
        frontends = tuple(filter(owns, port.frontends))
        if not frontends:
            continue
        endpoints, taken_out, usable = choice_of(
            port, slices, service.weights, drained=drained, node_name=node_name, zone=zone
        )
        yield ServicePort(
            key=port.key,
            frontends=port.frontends if frontends == port.frontends else frontends,
            cluster=usable.cluster,
            local=usable.local,
            draining=usable.draining,
            terminating=usable.terminating,
            idle=usable.idle,
            affinity_seconds=port.affinity_seconds,
            algorithm=port.algorithm,
            drained=tuple(sorted(taken_out)),
            weights=_weights_of(usable, endpoints, service.weights),
            source_ranges=port.source_ranges,
        )


def choice_of(
    port: PortFrontends,
    slices: Iterable[SliceEndpoints],
    weights: Weights | None,
    *,
    drained: Set[tuple[bytes, int]],
    node_name: str,
    zone: str | None,
) -> Choice:
    """Applies all rules to the endpoints of a port; the arguments are those of :func:`ports_of`."""
    endpoints = endpoints_of_port(port, slices)
    taken_out = _take_out(endpoints, weights, drained)
    return Choice(endpoints, taken_out, usable_endpoints(endpoints, node_name, zone))


def endpoints_of_port(port: PortFrontends, slices: Iterable[SliceEndpoints]) -> dict[Backend, Traits]:
    """The endpoints of all slices that have this port, by name and protocol.

    An address that is there twice counts once: see :func:`ebpfproxy.services.endpoints.merge`.
    """
    found: dict[Backend, Traits] = {}
    name, protocol, family = port.key.port_name, port.key.protocol, port.key.family
    for piece in slices:
        if piece.family is not family:
            continue
        for slice_port in piece.ports:
            if slice_port.name != name or slice_port.protocol is not protocol:
                continue
            number = slice_port.port
            backends = [Backend(address, number, protocol) for address in piece.addresses]
            if not found:
                # Nearly always all there is: one slice, and each address once.
                found = dict(zip(backends, piece.traits, strict=True))
                if len(found) == len(backends):
                    continue
                found = {}
            for backend, traits in zip(backends, piece.traits, strict=True):
                known = found.setdefault(backend, traits)
                if known is not traits:
                    found[backend] = merge(known, traits)
    return found


def _take_out(
    endpoints: dict[Backend, Traits], weights: Weights | None, drained: Set[tuple[bytes, int]]
) -> dict[Backend, tuple[TakenOut, Traits]]:
    """Takes out those that could serve but shall not, so that the rules see only the others."""
    if weights is None and not drained:
        return {}
    found = {
        backend: (reason, traits)
        for backend, traits in endpoints.items()
        if (reason := _taken_out(backend, traits, weights, drained)) is not None
    }
    for backend in found:
        del endpoints[backend]
    return found


def _taken_out(
    backend: Backend, traits: Traits, weights: Weights | None, drained: Set[tuple[bytes, int]]
) -> TakenOut | None:
    if not (traits.ready or traits.draining):
        return None
    if (backend.address, 0) in drained or (backend.address, backend.port) in drained:
        return TakenOut.DRAINED
    if weights is not None and not weights.of(backend.address, traits.node, traits.zone):
        return TakenOut.WEIGHT
    return None


def _weights_of(
    usable: Usable, endpoints: Mapping[Backend, Traits], weights: Weights | None
) -> tuple[tuple[Backend, int], ...]:
    """The weights of usable endpoints, where they are not 1."""
    if weights is None:
        return ()
    found = []
    for backend in sorted({*usable.cluster, *usable.local}):
        traits = endpoints[backend]
        weight = weights.of(backend.address, traits.node, traits.zone)
        if weight != 1:
            found.append((backend, weight))
    return tuple(found)


def ready_on_this_node(ports: Iterable[ServicePort]) -> int:
    """How many ready endpoints a Service has here, in the family that has more."""
    ready: dict[Family, set[bytes]] = {family: set() for family in Family}
    for port in ports:
        ready[port.key.family] |= {b.address for b in port.local if b not in port.terminating}
    return max(map(len, ready.values()))
