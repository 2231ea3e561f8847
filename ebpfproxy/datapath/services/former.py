"""Backends that clients may be connected to by maps of other sizes, which the complete state does not name.

They get ids in the new maps before anything is copied there, so that their connections are copied, too, and
end as they would in maps that stay: after the time in which an endpoint may come back. So do Services that
are not there any more: connections outlive them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import msgspec

from ebpfproxy.datapath.abi.arrays import backend_ids
from ebpfproxy.datapath.abi.flow_layout import RemovalReason, unpack_departure
from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.flows.map_migration import nameless, other_maps
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.services.adopt import service_names, uses
from ebpfproxy.services.model import Backend, ServicePort, ServicePortKey

Former = Mapping[ServicePortKey, Collection[Backend]]


def former_backends(pins: Path, maps: MapSet) -> Former:
    """By service port, what is chosen by maps of other sizes than these, or has something open."""
    found = dict[ServicePortKey, set[Backend]]()
    for old in other_maps(pins, maps):
        names = service_names(old)
        records = old.backends()
        places = old["service_names"].spec.max_entries
        for service_id, backend_id in _uses(old, names):
            known = records.read(backend_id)
            if known is not None and service_id < places:
                found.setdefault(names.get(service_id, nameless(service_id)), set()).add(known[0])
        old.close()
    return found


def _uses(old: MapSet, services: Collection[int]) -> Iterator[tuple[int, int]]:
    for key, value in old["departures"].items():
        if U32.unpack(value)[0] == RemovalReason.ABSENT:
            yield unpack_departure(key)
    selections = old.selections()
    for number in services:
        for used in selections.ranges(number):
            for backend_id in {*backend_ids(selections.slots(used))}:
                yield number, backend_id
    # Those that are draining, for example, whether another service port selects them or not; and those that
    # are gone, as an agent that was killed may not have ended what is open to them.
    yield from uses(old)


def with_former(ports: Iterable[ServicePort], former: Former) -> Iterator[ServicePort]:
    """Those of the service ports that had other backends, with these, as what serves old connections only.

    A backend that is idle is not yet: it becomes so with the next state, and datagrams leave it then.
    """
    for port in ports:
        more = set(former.get(port.key, ())).difference(port.cluster, port.local, port.draining, port.drained)
        if more:
            idle = tuple(each for each in port.idle if each not in more)
            yield msgspec.structs.replace(port, draining=(*port.draining, *sorted(more)), idle=idle)


def without_service(ports: Iterable[ServicePort], former: Former) -> Iterator[ServicePort]:
    """Service ports that are none of these, without frontends, with what serves old connections only."""
    for key in former.keys() - {port.key for port in ports}:
        yield ServicePort(key, frontends=(), cluster=(), local=(), draining=tuple(sorted(former[key])))
