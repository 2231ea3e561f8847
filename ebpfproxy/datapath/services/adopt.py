"""What a start finds in the maps: service ports keep their ids, ranges and entries.

Only differences are written afterwards. What belongs to no service port stays until the first complete state
is programmed.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import NamedTuple

from ebpfproxy.datapath.abi import layout, socket_layout
from ebpfproxy.datapath.abi.flow_layout import FLOW, NAT, BackendUse, RemovalReason, nat_uses
from ebpfproxy.datapath.abi.layout import ServiceKey
from ebpfproxy.datapath.flows.origin_table import OriginTable
from ebpfproxy.datapath.flows.peers import unconnected_uses
from ebpfproxy.datapath.flows.removed_backends import RemovedBackends
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.services.backends import Backends
from ebpfproxy.datapath.services.frontend_table import Frontends
from ebpfproxy.datapath.services.plan import NO_IDS, NO_MEMBERS, NO_SOURCES, Member, Published
from ebpfproxy.datapath.services.publish import Tables
from ebpfproxy.services.model import Prefix, ServicePortKey

_BATCH = 4096


class Adopted(NamedTuple):
    published: dict[ServicePortKey, Published]
    #: Members of no service port.
    strangers: list[Member]
    #: Ids that something has, but no service port.
    nameless: set[int]


def service_names(maps: MapSet) -> dict[int, ServicePortKey]:
    """The service ports that are there, by id."""
    return dict(layout.known_names(maps["service_names"].items()))


def adopt(maps: MapSet, names: Mapping[int, ServicePortKey], tables: Tables) -> Adopted:
    """Reads back what is published, and tells the backends' table which of them service ports hold."""
    selections, backends, frontends, removed = tables
    entries = _entries(frontends)
    sources = _sources(maps)
    members, strangers = _members(maps, names.keys())
    used = _in_use(maps, backends) if names else {}
    missing = _absent(names.keys(), backends, removed)
    gone, idle = (removed.by_service(why) for why in (RemovalReason.GONE, RemovalReason.IDLE))
    published = {}
    for number, name in names.items():
        selected = selections.backends(number)
        # What is selected is back, though an agent was killed before it said so.
        absent = missing.get(number, NO_IDS) - selected
        # The service port has let go of what is gone, which another one may hold.
        unselected = used.get(number, NO_IDS) - selected - gone.get(number, NO_IDS) | absent
        known = Published(
            number,
            tuple(entries.get(number, ())),
            frozenset(sources.get(number, NO_SOURCES)),
            unselected,
            members=members.get(number, NO_MEMBERS),
        )
        known.inactive = backends.adopt(
            selected | unselected, absent=absent, idle=unselected & idle.get(number, NO_IDS)
        )
        _remove_idle(number, known.inactive.idle, removed)
        published[name] = known
    ids = entries.keys() | sources.keys() | {each.service_id for each in strangers}
    places = maps["service_names"].spec.max_entries
    return Adopted(published, strangers, {number for number in ids - names.keys() if number < places})


def _remove_idle(service_id: int, idle: frozenset[int], removed: RemovedBackends) -> None:
    """Flows leave idle backends, though a killed agent was about to say that these are back."""
    missing = [number for number in idle if BackendUse(service_id, number) not in removed]
    removed.note(service_id, dict.fromkeys(missing, RemovalReason.IDLE))


def _entries(frontends: Frontends) -> dict[int, list[ServiceKey]]:
    found: dict[int, list[ServiceKey]] = {}
    for key, entry in frontends.items():
        found.setdefault(entry.id, []).append(key)
    return found


def _sources(maps: MapSet) -> dict[int, set[Prefix]]:
    found: dict[int, set[Prefix]] = {}
    for key, _ in maps["source_ranges"].items():
        service_id, prefix = layout.unpack_source_range(key)
        found.setdefault(service_id, set()).add(prefix)
    return found


def _members(
    maps: MapSet, services: Set[int]
) -> tuple[dict[int, tuple[frozenset[int], frozenset[int]]], list[Member]]:
    """Members by service id and policy; and those of no service."""
    found: dict[int, tuple[set[int], set[int]]] = {}
    strangers = []
    for key, _ in maps["members"].items():
        selection, backend_id = layout.unpack_member(key)
        service_id, policy = divmod(selection, layout.POLICIES)
        if service_id in services:
            found.setdefault(service_id, (set(), set()))[policy].add(backend_id)
        else:
            strangers.append(Member(service_id, policy, backend_id))
    return {number: (frozenset(a), frozenset(b)) for number, (a, b) in found.items()}, strangers


def _in_use(maps: MapSet, backends: Backends) -> dict[int, frozenset[int]]:
    """Backends that flows or sockets use, by service id, whether the service port selects them or not."""
    found: dict[int, set[int]] = {}
    for service_id, backend_id in uses(maps):
        found.setdefault(service_id, set()).add(backend_id)
    there = backends.known({number for each in found.values() for number in each})
    return {service_id: frozenset(each & there) for service_id, each in found.items()}


def uses(maps: MapSet) -> set[tuple[int, int]]:
    """What flows and sockets use; each pair equals a BackendUse.

    There may be very many flows and sockets: no loop in Python looks at each.
    """
    found: set[tuple[int, int]] = set()
    for origins in OriginTable(maps).connected():
        found.update(socket_layout.origin_uses(origins))
    for peers in unconnected_uses(maps):
        found.update(peers)
    for _, values, count in bpf.map_lookup_batches(maps["conntrack"].fd, FLOW.size, NAT.size, _BATCH):
        found.update(nat_uses(values[: count * NAT.size]))
    return found


def _absent(services: Set[int], backends: Backends, removed: RemovedBackends) -> dict[int, frozenset[int]]:
    """Backends that an earlier agent was waiting for, by service id. Those that cannot come back are gone."""
    found = removed.by_service(RemovalReason.ABSENT)
    there = backends.known({n for absent in found.values() for n in absent}) if found else set()
    for number, absent in found.items():
        if lost := absent - there if number in services else absent:
            removed.note(number, dict.fromkeys(lost, RemovalReason.GONE))
    return {number: frozenset(absent & there) for number, absent in found.items() if number in services}
