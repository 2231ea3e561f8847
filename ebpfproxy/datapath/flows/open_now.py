"""What a client has open to one frontend: flows of the packet path, and sockets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Protocol

from ebpfproxy.datapath.abi.layout import pack_address
from ebpfproxy.datapath.abi.socket_layout import (
    origin_frontend,
    origin_netns,
    origin_use,
    peers_as_origins,
)
from ebpfproxy.datapath.flows.conntrack_table import FlowRow, Timeouts, flows_of
from ebpfproxy.datapath.flows.origin_table import OriginTable, each_of
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.services.model import Protocol as Transport
from ebpfproxy.services.model import ServicePortKey, format_address, format_endpoint

_COOKIE = 0xFFFFFFFF


class Destination(Protocol):
    """An address, a port and a protocol that a client asks for."""

    @property
    def address(self) -> bytes: ...
    @property
    def port(self) -> int: ...
    @property
    def protocol(self) -> Transport: ...


def flows_between(
    maps: MapSet,
    clients: Iterable[bytes],
    to: Destination,
    *,
    timeouts: Timeouts,
    now: int,
    names: Mapping[int, ServicePortKey],
) -> tuple[FlowRow, ...]:
    """The flows from any of these addresses.

    ``now``: CLOCK_MONOTONIC in nanoseconds; ``names`` by service id.
    """
    packed = [pack_address(each) for each in clients]
    # All entries of a flow have the client's address, in the key or in what it becomes.
    entries = [
        (key, value)
        for key, value in maps["conntrack"].items()
        if any(each in (key[:16], key[16:32], value[:16], value[16:32]) for each in packed)
    ]
    services = {number: f"{name.namespace}/{name.name}" for number, name in names.items()}
    frontend = format_endpoint(to.address, to.port)
    sources = {format_address(each) for each in clients}
    found = flows_of(entries, timeouts, now, services)
    return tuple(
        row
        for row, _ in found
        if row.frontend == frontend
        and row.protocol == to.protocol.name
        and row.client.rpartition(":")[0].strip("[]") in sources
    )


def sockets_between(
    maps: MapSet, netns: int, to: Destination, names: Mapping[int, ServicePortKey]
) -> dict[int, int]:
    """How many sockets of a network namespace have asked for the frontend, by backend id.

    ``netns``: its cookie; 0 is nobody's. ``names`` by service id: a record knows no protocol of its own.
    """
    if not netns:
        return {}
    wanted = (to.address, to.port)
    further = (each for entry in maps["sock_peers"].items() for each in peers_as_origins(*entry))
    found: Counter[int] = Counter()
    for origin in chain(each_of(OriginTable(maps).open()), further):
        if origin_netns(origin) != netns & _COOKIE or origin_frontend(origin) != wanted:
            continue
        use = origin_use(origin)
        name = names.get(use.service_id)
        if name is not None and name.protocol is to.protocol:
            found[use.backend_id] += 1
    return dict(found)
