"""From an EndpointSlice to what the rules need: each endpoint parsed once for each version of its slice."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from ebpfproxy.kube.objects import (
    Endpoint,
    EndpointConditions,
    EndpointHints,
    EndpointPort,
    EndpointSlice,
    ObjectKey,
    Resource,
    TargetRef,
    key_of,
)
from ebpfproxy.services.model import Family, Protocol
from ebpfproxy.services.values import (
    LOOPBACK,
    Warning,
    parse_address,
    parse_protocol,
    unusable_address,
    usual_addresses,
    valid_port,
)

_FAMILIES = {"IPv4": Family.IPV4, "IPv6": Family.IPV6}


class Traits(NamedTuple):
    """What the rules of ``policy`` depend on in an endpoint. Few differ: one object serves thousands.

    Neither ready nor draining (serving and terminating) means idle: only old connections live on.
    """

    ready: bool
    draining: bool
    local: bool
    zones: tuple[str, ...]
    nodes: tuple[str, ...]
    #: The node and zone that it is in, empty if unknown. Only weights depend on them.
    node: str = ""
    zone: str = ""
    #: This only decides between two endpoints of one address: see :func:`merge`.
    terminating: bool = False


class SlicePort(NamedTuple):
    name: str
    protocol: Protocol
    port: int


class SliceEndpoints(msgspec.Struct, frozen=True, gc=False):
    """What a slice adds to its Service."""

    service: ObjectKey | None
    family: Family | None
    ports: tuple[SlicePort, ...]
    addresses: tuple[bytes, ...]
    #: They belong to the addresses at the same places.
    traits: tuple[Traits, ...]
    warnings: tuple[Warning, ...]
    #: The names of the pods with the addresses, one a line, in the Service's namespace; empty where there are
    #: none. One text takes a tenth of the memory of as many.
    pods: str = ""
    #: RFC 3339 time of what led to this version; see objects.SliceAnnotations.
    trigger_time: str | None = None

    def pod_names(self) -> Iterator[tuple[bytes, str]]:
        """Addresses of pods with the pods' names, as ``namespace/name``."""
        if self.pods and self.service is not None:
            for address, name in zip(self.addresses, self.pods.split("\n"), strict=True):
                if name:
                    yield address, f"{self.service.namespace}/{name}"

    def same_as(self, other: SliceEndpoints) -> bool:
        """True if nothing but the trigger differs."""
        return msgspec.structs.replace(self, trigger_time=other.trigger_time) == other


def endpoints_of(piece: EndpointSlice, node_name: str) -> SliceEndpoints:
    """The usable endpoints of a slice.

    Of an endpoint's addresses only the first counts: they are fungible (discovery/v1, Endpoint.addresses).
    ``ready`` and ``serving`` absent are true, ``terminating`` absent is false (discovery/v1,
    EndpointConditions).
    """
    labels = piece.metadata.labels
    if labels is None or not labels.service_name or labels.headless is not None:
        return SliceEndpoints(None, None, (), (), (), ())
    warnings = _Warnings(piece)
    service = ObjectKey(piece.metadata.namespace, labels.service_name)
    family = _FAMILIES.get(piece.address_type)
    if family is None:
        warnings.add("addressType", f"{piece.address_type!r} is neither IPv4 nor IPv6, the slice is not used")
        return SliceEndpoints(service, None, (), (), (), tuple(warnings.found))
    ports, problems = _ports_of(piece.ports or ())
    for field, message in problems:
        warnings.add(field, message)
    endpoints, addresses = _usable(piece, family, warnings)
    pods = [_pod_of(target) if (target := endpoint.target_ref) else "" for endpoint in endpoints]
    return SliceEndpoints(
        service,
        family,
        ports,
        tuple(addresses),
        tuple(
            [
                _traits_of(
                    endpoint.conditions,
                    endpoint.hints,
                    endpoint.node_name or "",
                    endpoint.zone or "",
                    endpoint.node_name == node_name,
                )
                for endpoint in endpoints
            ]
        ),
        tuple(warnings.found),
        "\n".join(pods) if any(pods) else "",
        piece.metadata.annotations.trigger_time if piece.metadata.annotations else None,
    )


class _Warnings:
    def __init__(self, piece: EndpointSlice) -> None:
        self._piece = piece
        self.found: list[Warning] = []

    def add(self, field: str, message: str) -> None:
        self.found.append(Warning(Resource.ENDPOINTSLICES, key_of(self._piece), field, message))


@functools.lru_cache(maxsize=8192)
def _ports_of(
    given: tuple[EndpointPort, ...],
) -> tuple[tuple[SlicePort, ...], tuple[tuple[str, str], ...]]:
    """The ports that can be used, and for each of the others its field with what is wrong.

    The cache gives one object to all slices with the same ports, which thousands have.
    """
    ports: list[SlicePort] = []
    problems: list[tuple[str, str]] = []
    for i, port in enumerate(given):
        if port.port is None:
            continue
        protocol = parse_protocol(port.protocol)
        if protocol is None:
            problems.append((f"ports[{i}].protocol", f"unknown protocol {port.protocol!r}"))
        elif not valid_port(port.port):
            problems.append((f"ports[{i}].port", f"{port.port} is not in 1 to 65535"))
        else:
            ports.append(SlicePort(port.name or "", protocol, port.port))
    return tuple(ports), tuple(problems)


def _usable(
    piece: EndpointSlice, family: Family, warnings: _Warnings
) -> tuple[Sequence[Endpoint], Sequence[bytes]]:
    """The endpoints that can be backends, and their addresses."""
    endpoints = piece.endpoints or ()
    texts = [endpoint.addresses[0] for endpoint in endpoints if endpoint.addresses]
    if len(texts) == len(endpoints) and (found := usual_addresses(texts, family)) is not None:
        return endpoints, found
    checked = list(_checked(endpoints, family, warnings))
    return [endpoint for endpoint, _ in checked], [address for _, address in checked]


def _checked(
    endpoints: Sequence[Endpoint], family: Family, warnings: _Warnings
) -> Iterator[tuple[Endpoint, bytes]]:
    """The same, one by one, with a warning about each of the others."""
    size = 4 if family is Family.IPV4 else 16
    for i, endpoint in enumerate(endpoints):
        if not endpoint.addresses:
            warnings.add(f"endpoints[{i}].addresses", "is empty")
            continue
        text = endpoint.addresses[0]
        address = parse_address(text)
        if address is None or len(address) != size:
            warnings.add(f"endpoints[{i}].addresses[0]", f"{text!r} is not an {family} address")
            continue
        reason = unusable_address(address)
        if reason is not None and reason is not LOOPBACK:
            warnings.add(f"endpoints[{i}].addresses[0]", f"{text} {reason}")
            continue
        yield endpoint, address


def _pod_of(target: TargetRef) -> str:
    """The API server checks no such name: one that no pod can have is none."""
    return target.name if target.kind == "Pod" and target.name.isprintable() else ""


@functools.lru_cache(maxsize=8192)
def _traits_of(
    conditions: EndpointConditions | None, hints: EndpointHints | None, node: str, zone: str, is_local: bool
) -> Traits:
    """The cache saves what is the same for thousands of endpoints."""
    conditions = conditions or _NO_CONDITIONS
    ready = conditions.ready is not False
    terminating = bool(conditions.terminating)
    return _shared(
        Traits(
            ready,
            not ready and terminating and conditions.serving is not False,
            is_local,
            tuple(z.name for z in hints.for_zones or ()) if hints else (),
            tuple(n.name for n in hints.for_nodes or ()) if hints else (),
            node,
            zone,
            terminating,
        )
    )


_NO_CONDITIONS = EndpointConditions()


@functools.lru_cache(maxsize=8192)
def _shared(traits: Traits) -> Traits:
    """One object for all that are equal."""
    return traits


def merge(one: Traits, other: Traits) -> Traits:
    """One address that is there twice, of a Service's one or several slices.

    The one that does not terminate counts, ready or not: a new pod took the address of an old one. Among
    those left it is ready before draining before idle, and local where any is. The order in which three and
    more are merged does not matter: the order of slices is none.
    """
    if one.terminating != other.terminating:
        return other if one.terminating else one
    best = max(one, other, key=lambda t: (t.ready, t.draining, t.zones, t.nodes, t.node, t.zone))
    return _shared(best._replace(local=one.local or other.local))
