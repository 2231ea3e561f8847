"""From a Service's name and port to the frontends that a client would use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ebpfproxy.datapath.abi.layout import Scope, ServiceEntry, ServiceKey
from ebpfproxy.explain.path import Client, Place, Target
from ebpfproxy.services.model import FrontendKind, Protocol, ServicePortKey

_OUTSIDE = (FrontendKind.LOAD_BALANCER, FrontendKind.EXTERNAL_IP, FrontendKind.NODE_PORT)
_INSIDE = (FrontendKind.CLUSTER_IP,)


class AmbiguousPortError(Exception):
    """The Service has several ports, and none is named; the message lists them."""


class Asked(NamedTuple):
    """A Service, and which of its ports: by name or number, empty for its only one."""

    namespace: str
    name: str
    port: str = ""
    protocol: Protocol | None = None

    def __str__(self) -> str:
        service = f"{self.namespace}/{self.name}"
        return f"{service}:{self.port}" if self.port else service


class Programmed(NamedTuple):
    """A frontend in the maps, with the service port that it belongs to."""

    key: ServiceKey
    entry: ServiceEntry
    port: ServicePortKey


def programmed(
    entries: Iterable[tuple[ServiceKey, ServiceEntry]], names: Mapping[int, ServicePortKey], asked: Asked
) -> list[Programmed]:
    """The frontends of a Service, one for each address and port: whichever scopes they have entries for."""
    return [
        Programmed(key, entry, port)
        for key, entry in entries
        if (port := names.get(entry.id)) is not None
        and (port.namespace, port.name) == (asked.namespace, asked.name)
        and key.scope is Scope.INTERNAL
    ]


def targets(
    found: Iterable[Programmed], asked: Asked, client: Client, node_addresses: Mapping[int, bytes]
) -> list[Target]:
    """The frontends that the client would use, of those in its families.

    In the cluster it uses cluster IPs, and from outside what is meant for that, if the Service has any.
    ``node_addresses``: at which NodePorts are used, by length. Empty where the Service lacks the port, or has
    nothing in the client's families. Raises AmbiguousPortError.
    """
    of_service = list(found)
    numbers = {
        each.port: each.key.port for each in of_service if each.entry.kind is not FrontendKind.NODE_PORT
    }
    ports = {
        port: number
        for port, number in numbers.items()
        if asked.port in ("", port.port_name, str(number)) and asked.protocol in (None, port.protocol)
    }
    if not asked.port and len({(port.port_name, port.protocol) for port in ports}) > 1:
        names = sorted({f"{port.port_name or number}/{port.protocol.name}" for port, number in ports.items()})
        raise AmbiguousPortError(f"{asked} has several ports, name one of them: {', '.join(names)}")
    families = {len(address) for address in client.addresses}
    usable = [each for each in of_service if each.port in ports and len(each.key.address) in families]
    kinds = _OUTSIDE if client.place is Place.OUTSIDE else _INSIDE
    chosen = [each for each in usable if each.entry.kind in kinds] or usable
    made = []
    for each in sorted(chosen, key=lambda each: (len(each.key.address), each.entry.kind, each.key)):
        address = each.key.address
        if each.entry.kind is FrontendKind.NODE_PORT:
            address = node_addresses.get(len(address), b"")
        if address:
            made.append(Target(address, each.key.port, each.port.protocol))
    return made
