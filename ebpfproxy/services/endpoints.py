"""From an EndpointSlice to candidates: each endpoint parsed once for each version of its slice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from ebpfproxy.objects import EndpointConditions, EndpointSlice, ObjectKey, Resource, key_of
from ebpfproxy.services.model import Family, Protocol
from ebpfproxy.services.values import Warning, parse_address, parse_protocol, unusable_backend, valid_port

_FAMILIES = {"IPv4": Family.IPV4, "IPv6": Family.IPV6}


class Candidate(NamedTuple):
    """An endpoint that a service port may choose, as the rules of ``policy`` see it.

    ``draining``: not ready, but serving and terminating. Neither ready nor draining ones are not kept.
    """

    address: bytes
    ready: bool
    local: bool
    zones: tuple[str, ...]
    nodes: tuple[str, ...]

    @property
    def draining(self) -> bool:
        return not self.ready


class SlicePort(NamedTuple):
    name: str
    protocol: Protocol
    port: int


class SliceEndpoints(msgspec.Struct, frozen=True, gc=False):
    """What a slice adds to its Service."""

    service: ObjectKey | None
    family: Family | None
    ports: tuple[SlicePort, ...]
    candidates: tuple[Candidate, ...]
    warnings: tuple[Warning, ...]


def endpoints_of(piece: EndpointSlice, node_name: str) -> SliceEndpoints:
    """The usable endpoints of a slice.

    Of an endpoint's addresses only the first counts: they are fungible (discovery/v1, Endpoint.addresses).
    ``ready`` absent is true, ``serving`` absent follows ready, ``terminating`` absent is false.
    """
    labels = piece.metadata.labels
    if (
        labels is None
        or not labels.service_name
        or labels.headless is not None
        or labels.proxy_name is not None
    ):
        return SliceEndpoints(None, None, (), (), ())
    warnings = _Warnings(key_of(piece))
    service = ObjectKey(piece.metadata.namespace, labels.service_name)
    family = _FAMILIES.get(piece.address_type)
    if family is None:
        warnings.add("addressType", f"{piece.address_type!r} is neither IPv4 nor IPv6, the slice is not used")
        return SliceEndpoints(service, None, (), (), tuple(warnings.found))
    ports = tuple(_ports(piece, warnings))
    candidates = tuple(_candidates(piece, family, node_name, warnings))
    return SliceEndpoints(service, family, ports, candidates, tuple(warnings.found))


class _Warnings:
    def __init__(self, key: ObjectKey) -> None:
        self._key = key
        self.found: list[Warning] = []

    def add(self, field: str, message: str) -> None:
        self.found.append(Warning(Resource.ENDPOINTSLICES, self._key, field, message))


def _ports(piece: EndpointSlice, warnings: _Warnings) -> Iterator[SlicePort]:
    for i, port in enumerate(piece.ports or ()):
        if port.port is None:
            continue
        protocol = parse_protocol(port.protocol)
        if protocol is None:
            warnings.add(f"ports[{i}].protocol", f"unknown protocol {port.protocol!r}")
        elif not valid_port(port.port):
            warnings.add(f"ports[{i}].port", f"{port.port} is not in 1 to 65535")
        else:
            yield SlicePort(port.name or "", protocol, port.port)


def _candidates(
    piece: EndpointSlice, family: Family, node_name: str, warnings: _Warnings
) -> Iterator[Candidate]:
    size = 4 if family is Family.IPV4 else 16
    for i, endpoint in enumerate(piece.endpoints or ()):
        ready = _is_ready(endpoint.conditions)
        if not ready and not _is_draining(endpoint.conditions):
            continue
        if not endpoint.addresses:
            warnings.add(f"endpoints[{i}].addresses", "is empty")
            continue
        text = endpoint.addresses[0]
        address = parse_address(text)
        if address is None or len(address) != size:
            warnings.add(f"endpoints[{i}].addresses[0]", f"{text!r} is not an {family} address")
            continue
        reason = unusable_backend(address)
        if reason is not None:
            warnings.add(f"endpoints[{i}].addresses[0]", f"{text} {reason}")
            continue
        hints = endpoint.hints
        yield Candidate(
            address,
            ready,
            endpoint.node_name == node_name,
            tuple(z.name for z in hints.for_zones or ()) if hints else (),
            tuple(n.name for n in hints.for_nodes or ()) if hints else (),
        )


def _is_ready(conditions: EndpointConditions | None) -> bool:
    return conditions is None or conditions.ready is None or conditions.ready


def _is_draining(conditions: EndpointConditions | None) -> bool:
    return conditions is not None and bool(conditions.serving and conditions.terminating)
