"""Writes back what the maps should hold, in the order in which a change is published.

See ``datapath.services.publish`` for the reasons: what something refers to comes before it, and what is
foreign goes in the opposite order.
"""

from __future__ import annotations

from collections.abc import Iterable

from ebpfproxy.datapath.drift.compare import Difference, Kind
from ebpfproxy.datapath.kernel.bpf_map import Map, SharedArray
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.services.frontend_cache import changing_frontends, changing_ranges

#: Tables come before those that lead to them.
ORDER = (
    "crc32c",
    "devices",
    "xdp_devices",
    "node_addresses",
    "client_namespaces",
    "cidr_filter",
    "cidrs",
    "backend_filter",
    "backend_ports",
    "address_filter",
    "port_filter",
    "service_names",
    "slots",
    "backends",
    "members",
    "selections",
    "departures",
    "epochs",
    "source_ranges",
    "services4",
    "services6",
)


def repair(maps: MapSet, found: Iterable[Difference]) -> list[Difference]:
    """Repairs, in the thread that writes the maps.

    Returns what it has repaired: an entry for which there is no room stays missing, as it was before. With
    nothing to repair, it ends only what programs have cached.
    """
    by_map: dict[str, list[Difference]] = {}
    for each in found:
        by_map.setdefault(each.map, []).append(each)
    names = sorted(by_map, key=ORDER.index)
    repaired: list[Difference] = []
    # Programs may have cached what was there, also of what has been changed back since.
    with changing_frontends(maps), changing_ranges(maps):
        for name in names:
            table = maps[name]
            if isinstance(table, SharedArray):
                repaired += _store(table, by_map[name])
            else:
                repaired += _write(table, by_map[name])
        for name in reversed(names):
            foreign = [each for each in by_map[name] if each.kind is Kind.FOREIGN]
            if foreign and not isinstance(maps[name], SharedArray):
                maps[name].delete_many([each.key for each in foreign])
                repaired += foreign
    return repaired


def _write(table: Map, found: Iterable[Difference]) -> list[Difference]:
    wanted = {each.key: each for each in found if each.wanted is not None}
    refused = table.update_many({key: each.wanted for key, each in wanted.items() if each.wanted is not None})
    for key in refused:
        del wanted[key]
    return list(wanted.values())


def _store(array: SharedArray, found: Iterable[Difference]) -> list[Difference]:
    repaired = list(found)
    for each in repaired:
        array.restore(int.from_bytes(each.key, "big"))
    return repaired
