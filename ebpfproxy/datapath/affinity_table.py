"""Session affinity as the map holds it: which client stays with which backend, and for how long."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from ebpfproxy.datapath.abi import flow_layout
from ebpfproxy.datapath.abi.flow_layout import ClientKind
from ebpfproxy.datapath.abi.layout import NSEC_PER_SEC
from ebpfproxy.datapath.dump import Dump
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.services.model import format_address

#: A client that is a network namespace has this before its cookie.
NETNS = "netns:"


class AffinityRow(msgspec.Struct, frozen=True):
    """One client of one service port. The JSON of ``ebpfproxy affinity list``: these names stay.

    ``client`` is an address, or ``netns:COOKIE`` of a network namespace whose sockets connected; ``name`` is
    what that namespace is known by, where it can be seen. Times in seconds.
    """

    service: str
    port_name: str
    client: str
    name: str
    backend: str
    idle: float
    expires: float


def affinity_rows(maps: MapSet, now: int, names: Mapping[int, str]) -> list[tuple[AffinityRow, bytes]]:
    """Every entry that has not expired, with its key, sorted. ``now`` is CLOCK_MONOTONIC in ns.

    ``names`` are those of network namespaces, by cookie.
    """
    dump = Dump(maps)
    seconds = affinity_seconds(dump)
    found = []
    for key, value in maps["affinity"].items():
        client, service_id, kind = flow_layout.unpack_affinity_key(key)
        backend_id, last = flow_layout.unpack_affinity(value)
        port = dump.names.get(service_id)
        idle = max(0.0, (now - last) / NSEC_PER_SEC)
        if port is None or idle > seconds.get(service_id, 0):
            continue
        is_namespace = kind is ClientKind.NAMESPACE
        row = AffinityRow(
            service=f"{port.namespace}/{port.name}",
            port_name=port.port_name,
            client=f"{NETNS}{client}" if isinstance(client, int) else format_address(client),
            name=names.get(client, "") if is_namespace and isinstance(client, int) else "",
            backend=dump.backend_ref(backend_id).address,
            idle=round(idle, 3),
            expires=round(seconds[service_id] - idle, 3),
        )
        found.append((row, key))
    return sorted(found, key=lambda pair: (pair[0].service, pair[0].port_name, pair[0].client))


def affinity_seconds(dump: Dump) -> dict[int, int]:
    """Timeouts of session affinity by service id, where there is any."""
    return {entry.id: entry.affinity_seconds for _, entry in dump.entries() if entry.affinity_seconds}


def forget_expired(maps: MapSet, now: int) -> int:
    """Deletes entries that no choice would use again; returns how many."""
    affinity = maps["affinity"]
    # Reading takes a while: a client that came back meanwhile keeps the backend that it has now.
    return sum(
        affinity.delete(key) for key, found in list(_expired(maps, now)) if affinity.lookup(key) == found
    )


def _expired(maps: MapSet, now: int) -> Iterator[tuple[bytes, bytes]]:
    seconds: Mapping[int, int] | None = None
    for key, value in maps["affinity"].items():
        if seconds is None:
            seconds = affinity_seconds(Dump(maps))
        _, last = flow_layout.unpack_affinity(value)
        if now - last > seconds.get(flow_layout.affinity_service(key), 0) * NSEC_PER_SEC:
            yield key, value
