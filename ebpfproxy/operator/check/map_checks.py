"""Maps that contradict themselves: all that can be told of them without the agent, who knows what is wanted.

An entry that leads to an id which does not exist, and a frontend that the filters do not know.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from ebpfproxy.datapath.abi import layout
from ebpfproxy.datapath.abi.arrays import backend_ids
from ebpfproxy.datapath.abi.layout import POLICIES, U32, ServiceFlags, ServiceKey
from ebpfproxy.datapath.drift.compare import Kind
from ebpfproxy.datapath.drift.findings import Finding
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.services.filter import address_hash
from ebpfproxy.services.model import BackendState, FrontendKind, Policy

_MEND = "start the agent, which compares all maps with the API"


def contradictions(maps: MapSet) -> list[Finding]:
    """What does not fit together. Raises BpfError."""
    names = _names(maps)
    return [*_frontends(maps, names), *_selections(maps, names), *_referring(maps, names)]


def _names(maps: MapSet) -> dict[int, str]:
    found = {}
    for key, value in maps["service_names"].items():
        try:
            name = layout.unpack_name(value)
        except ValueError:
            found[U32.unpack(key)[0]] = ""
        else:
            port = f":{name.port_name}" if name.port_name else ""
            found[U32.unpack(key)[0]] = f"{name.namespace}/{name.name}{port}"
    return found


def _finding(where: str, kind: Kind, what: str, consequence: str, service: str = "") -> Finding:
    return Finding(
        where=where, kind=str(kind), what=what, service=service, consequence=consequence, mend=_MEND
    )


def _frontends(maps: MapSet, names: dict[int, str]) -> Iterator[Finding]:
    for table in ("services4", "services6"):
        for key, value in maps[table].items():
            try:
                entry, frontend = layout.unpack_service(value), layout.unpack_service_key(key)
            except (ValueError, struct.error):
                text = f"key {key.hex()}"
                yield _finding(table, Kind.CHANGED, text, "no agent writes such an entry")
                continue
            if entry.flags & ServiceFlags.ADDRESS:
                continue
            if entry.id not in names:
                text = f"{frontend}, service id {entry.id}"
                yield _finding(
                    table, Kind.FOREIGN, text, "connections to it are translated that are no Service's"
                )
            else:
                yield from _unfiltered(maps, frontend, entry.kind, names[entry.id])


def _unfiltered(maps: MapSet, key: ServiceKey, kind: FrontendKind, service: str) -> Iterator[Finding]:
    for name, number in (("port_filter", key.port), ("address_filter", address_hash(key.address))):
        if name == "address_filter" and kind is FrontendKind.NODE_PORT:
            continue
        if not maps.shared(name).bytes[number >> 3] & 1 << (number & 7):
            consequence = "packets of clients outside to it pass untranslated"
            yield _finding(name, Kind.MISSING, str(key), consequence, service)


def _selections(maps: MapSet, names: dict[int, str]) -> Iterator[Finding]:
    selections, records = maps.selections(), maps.backends()
    room = maps["slots"].spec.max_entries
    for number, service in names.items():
        for policy, (base, count) in enumerate(selections.ranges(number)):
            if base + count > room:
                text = f"slots {base} to {base + count} with policy {Policy(policy).name}"
                yield _finding("selections", Kind.CHANGED, text, "new connections are refused", service)
                continue
            for backend_id in sorted(set(backend_ids(selections.slots((base, count))))):
                known = records.read(backend_id)
                if known is None or known[1] is BackendState.GONE:
                    consequence = "new connections are refused, or go to a backend that is gone"
                    yield _finding("backends", Kind.MISSING, f"backend id {backend_id}", consequence, service)


def _referring(maps: MapSet, names: dict[int, str]) -> Iterator[Finding]:
    for key, _ in maps["members"].items():
        service_id = layout.unpack_member(key)[0] // POLICIES
        if service_id not in names:
            yield _finding("members", Kind.FOREIGN, f"service id {service_id}", "none, until the id is used")
    for key, _ in maps["source_ranges"].items():
        service_id, _ = layout.unpack_source_range(key)
        if service_id not in names:
            consequence = "once the id is used, clients get in that may not"
            yield _finding("source_ranges", Kind.FOREIGN, f"service id {service_id}", consequence)
