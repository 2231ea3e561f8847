"""What has to change in the maps for a service port: pure, without access to any map.

A :class:`Published` says what the maps hold for a service port. The functions and :class:`Change` compare it
with what is wanted; ``publish`` carries a change out, in the order in which readers may see it.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence, Set
from functools import cache
from itertools import chain
from typing import NamedTuple

import msgspec

from ebpfproxy.datapath.abi.flow_layout import RemovalReason
from ebpfproxy.datapath.abi.layout import Scope, ServiceEntry, ServiceFlags, ServiceKey
from ebpfproxy.datapath.services.slots import Source
from ebpfproxy.services.model import (
    Algorithm,
    Backend,
    Frontend,
    FrontendKind,
    Policy,
    Prefix,
    ServicePort,
    ServicePortKey,
)

#: Any other empty frozenset would be an object of 216 bytes, and nearly all of these are empty.
NO_IDS: frozenset[int] = frozenset()


class InactiveBackends(NamedTuple):
    """Those of a service port's backends that are not active, by what they are instead."""

    leaving: frozenset[int] = NO_IDS
    idle: frozenset[int] = NO_IDS
    drained: frozenset[int] = NO_IDS
    #: Their endpoint was removed, and may come back.
    absent: frozenset[int] = NO_IDS


ALL_ACTIVE = InactiveBackends()
NO_MEMBERS = (NO_IDS, NO_IDS)
NO_SOURCES: frozenset[Prefix] = frozenset()
NOTHING_MADE = (None, None)
#: An enumeration looks for each of its members anew (until Python 3.12), which takes longer than a call.
_LOCAL, _LOAD_BALANCER, _MAGLEV = Policy.LOCAL, FrontendKind.LOAD_BALANCER, Algorithm.MAGLEV
_INTERNAL, _EXTERNAL = Scope


class Published(msgspec.Struct):
    """What the maps hold for one service port, beyond what can be read from them."""

    id: int
    entries: tuple[ServiceKey, ...] = ()
    sources: frozenset[Prefix] = NO_SOURCES
    #: Backends in no selection, which only serve old connections: draining or idle ones.
    unselected: frozenset[int] = NO_IDS
    inactive: InactiveBackends = ALL_ACTIVE
    #: The backends in ``members`` by policy, if there is session affinity.
    members: tuple[frozenset[int], frozenset[int]] = NO_MEMBERS
    #: Hashes by policy of what slots that take long were made from: the same are not made again.
    made_from: tuple[int | None, int | None] = NOTHING_MADE


class BackendSets(NamedTuple):
    """Ids of a service port's backends, by what they are used for; the selected ones by policy, sorted."""

    selected: tuple[array[int], array[int]]
    draining: frozenset[int]
    #: Selected or not.
    terminating: frozenset[int]
    idle: frozenset[int]
    drained: frozenset[int]

    @property
    def members(self) -> tuple[frozenset[int], frozenset[int]]:
        """Those that session affinity may keep a client with, by policy."""
        return frozenset(self.selected[0]), frozenset(self.selected[1])

    @property
    def unselected(self) -> frozenset[int]:
        if self.idle or self.drained:
            return self.draining.union(self.idle, self.drained)
        return self.draining

    def inactive(self, absent: frozenset[int]) -> InactiveBackends:
        leaving = self.draining | self.terminating if self.terminating else self.draining
        if not (leaving or self.idle or self.drained or absent):
            return ALL_ACTIVE
        return InactiveBackends(leaving, self.idle, self.drained, absent)


class Removals(NamedTuple):
    """A service's backends that have come back, and those that its flows have to leave, with the reason."""

    service_id: int
    back: Set[int]
    removed: Mapping[int, RemovalReason]


class Member(NamedTuple):
    """A backend that session affinity may keep a client with."""

    service_id: int
    policy: int
    backend_id: int


class Change(msgspec.Struct):
    """The part of a change that readers see. New backends and slots are in place before it is carried out."""

    names: dict[int, ServicePortKey] = {}
    #: Service ids that have a new owner, and may have had another before.
    reused: list[int] = []
    members: list[Member] = []
    #: Base and count of the slots, by service id and policy.
    selections: dict[tuple[int, int], tuple[int, int]] = {}
    #: These are members no longer.
    excluded: list[Member] = []
    removals: list[Removals] = []
    sources: list[tuple[int, Prefix]] = []
    entries: dict[ServiceKey, ServiceEntry] = {}
    #: Service ids, each with a frontend that it has no longer.
    withdrawn: list[tuple[int, ServiceKey]] = []
    closed: list[tuple[int, Prefix]] = []
    #: Ids of service ports that are gone.
    deleted: list[int] = []
    #: The service ports that get something new, by service id.
    placed: dict[int, tuple[ServicePort, Published]] = {}
    #: Service ids, each with something that a map had no room for. Publishing notes them.
    refused: list[tuple[int, str]] = []

    def select(
        self, known: Published, before: Sequence[tuple[int, int]], after: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """Sets the ranges of slots by policy; returns those that are replaced."""
        replaced = []
        for policy, new in enumerate(after):
            old = before[policy]
            if new != old:
                self.selections[known.id, policy] = new
                if old[1]:
                    replaced.append(old)
        return replaced

    def set_members(self, known: Published, wanted: tuple[frozenset[int], frozenset[int]]) -> None:
        if wanted == known.members:
            return
        for policy, (old, new) in enumerate(zip(known.members, wanted, strict=True)):
            self.members += (Member(known.id, policy, number) for number in new - old)
            self.excluded += (Member(known.id, policy, number) for number in old - new)
        known.members = wanted

    def set_sources(self, known: Published, wanted: frozenset[Prefix]) -> None:
        if wanted == known.sources:
            return
        self.sources += ((known.id, prefix) for prefix in wanted - known.sources)
        self.closed += ((known.id, prefix) for prefix in known.sources - wanted)
        known.sources = wanted

    def set_entries(
        self,
        known: Published,
        wanted: Mapping[ServiceKey, ServiceEntry],
        present: Callable[[ServiceKey], ServiceEntry | None],
    ) -> None:
        """Sets the frontends. ``present``: the entry that a key has now, of whichever service port."""
        for key, entry in wanted.items():
            if present(key) != entry:
                self.entries[key] = entry
        if known.entries:
            self.withdrawn += ((known.id, key) for key in known.entries if key not in wanted)
        keys = tuple(wanted)
        if keys != known.entries:
            known.entries = keys

    def remove(
        self,
        known: Published,
        before: Set[int],
        after: Set[int],
        inactive: InactiveBackends,
        is_removed: Callable[[int], bool] | None,
        *,
        is_first: bool = False,
    ) -> None:
        """Notes what flows of a service have to learn when the backends that it uses change.

        Connections to an idle backend go on, and so they do to an absent one, which may come back.
        ``is_removed``: says if a backend was removed from the service; None where none was from any.
        ``is_first``: the agent before this one may have been killed between two of its writes.
        """
        was = known.inactive
        went = before - after
        back: Set[int] = NO_IDS
        removed: dict[int, RemovalReason] = {}
        if is_removed is not None:
            came = set(filter(is_removed, after)) if is_first else after - before | was.idle | was.absent
            back = came - (inactive.idle | inactive.absent | went)
            # It is there again, but not ready: its connections may go on.
            removed = dict.fromkeys(filter(is_removed, inactive.idle - was.idle - before), RemovalReason.IDLE)
        if before:
            removed |= dict.fromkeys((inactive.idle - was.idle) & before, RemovalReason.IDLE)
            removed |= dict.fromkeys(inactive.absent - was.absent, RemovalReason.ABSENT)
            removed |= dict.fromkeys(went, RemovalReason.GONE)
        if back or removed:
            self.removals.append(Removals(known.id, back, removed))

    def refusals(self) -> Iterator[tuple[ServicePort, str]]:
        """The service ports with something that a map had no room for, each with the reason."""
        found: dict[int, list[str]] = {}
        for service_id, why in self.refused:
            found.setdefault(service_id, []).append(why)
        for service_id, (why, *others) in found.items():
            port, _ = self.placed[service_id]
            yield port, f"{why}, and {len(others)} more" if others else why

    def withdraw(self, known: Published) -> None:
        """Removes everything by which clients find a service port."""
        self.withdrawn += ((known.id, key) for key in known.entries)
        self.closed += ((known.id, prefix) for prefix in known.sources)
        self.set_members(known, NO_MEMBERS)


def unused(port: ServicePort, sets: Sequence[Sequence[Backend]]) -> frozenset[Backend]:
    """Terminating backends of the set that no frontend uses: they serve old connections only."""
    return port.terminating.difference(*sets) if port.terminating else port.terminating


def selected_sets(port: ServicePort) -> tuple[Sequence[Backend], Sequence[Backend]]:
    """The backends that frontends choose from, by policy."""
    if port.local and any(_LOCAL in (f.internal, f.external) for f in port.frontends):
        return port.cluster, port.local
    return port.cluster, ()


def backends_of(port: ServicePort) -> Iterator[Backend]:
    """All that a service port has, selected or not; one may come twice."""
    return chain(port.cluster, port.local, port.draining, port.idle, port.drained)


def restricted(port: ServicePort, to: Container[Backend]) -> ServicePort:
    """A service port with some of its backends only; as it is where that leaves none but terminating ones."""

    def some(backends: Iterable[Backend]) -> tuple[Backend, ...]:
        return tuple(each for each in backends if each in to)

    cluster, draining = some(port.cluster), some(port.draining)
    if port.cluster and not cluster and draining:
        return port
    return msgspec.structs.replace(
        port,
        cluster=cluster,
        local=some(port.local),
        draining=draining,
        terminating=frozenset(some(port.terminating)),
        idle=some(port.idle),
        drained=some(port.drained),
        weights=tuple(each for each in port.weights if each[0] in to),
    )


def slot_source(
    port: ServicePort, backends: Sequence[Backend], numbers: array[int], maglev_size: int
) -> Source | None:
    """What the slots of one policy are made from; None where they are the backends' numbers themselves."""
    if not port.weights and port.algorithm is not _MAGLEV:
        return None
    weights = dict(port.weights)
    return Source(
        port.algorithm,
        backends,
        numbers,
        [weights.get(each, 1) for each in backends] if weights else None,
        maglev_size,
    )


def entries_of(
    port: ServicePort, service_id: int, sources_towards: Callable[[bytes], Sequence[bytes]]
) -> dict[ServiceKey, ServiceEntry]:
    """The entries of all frontends of a service port.

    ``sources_towards``: the addresses by which this node may ask at another; it is called only for frontends
    with source ranges.
    """
    entries: dict[ServiceKey, ServiceEntry] = {}
    for frontend in port.frontends:
        _add_entries(entries, frontend, service_id, port)
    if port.source_ranges:
        entries = {
            key: with_host_flag(key, entry, port.source_ranges, sources_towards)
            for key, entry in entries.items()
        }
    return entries


def with_host_flag(
    key: ServiceKey,
    entry: ServiceEntry,
    ranges: Iterable[Prefix],
    sources_towards: Callable[[bytes], Sequence[bytes]],
) -> ServiceEntry:
    """The entry, with HOST where the address by which this node asks at it is in its source ranges."""
    flags = entry.flags & ~ServiceFlags.HOST
    if flags & ServiceFlags.SOURCES:
        sources = sources_towards(key.address)
        if any(prefix.contains(source) for prefix in ranges for source in sources):
            flags |= ServiceFlags.HOST
    return entry if flags == entry.flags else entry._replace(flags=flags)


def host_flags(
    published: Iterable[Published],
    present: Callable[[ServiceKey], ServiceEntry | None],
    towards: Callable[[bytes], Sequence[bytes]],
) -> dict[ServiceKey, ServiceEntry]:
    """The entries of frontends with source ranges whose HOST flag has to change."""
    keys = ((key, known.sources) for known in published if known.sources for key in known.entries)
    return {
        key: now
        for key, ranges in keys
        if (entry := present(key)) is not None
        and (now := with_host_flag(key, entry, ranges, towards)) != entry
    }


def _add_entries(
    entries: dict[ServiceKey, ServiceEntry], frontend: Frontend, service_id: int, owner: ServicePort
) -> None:
    """Adds one entry, or two if the scopes' policies differ."""
    kind, address, port, protocol, internal, external = frontend
    has_sources = kind is _LOAD_BALANCER and owner.source_ranges is not None
    two = internal != external
    scopes = ((_INTERNAL, internal), (_EXTERNAL, external))
    for scope, policy in scopes if two else scopes[:1]:
        flags = _flags(has_sources, two, policy is _LOCAL)
        entries[ServiceKey(address, port, protocol, scope)] = ServiceEntry(
            service_id, flags, kind, owner.algorithm, owner.affinity_seconds
        )


@cache
def _flags(has_sources: bool, two_scopes: bool, is_local: bool) -> ServiceFlags:
    flags = ServiceFlags.SOURCES if has_sources else ServiceFlags(0)
    if two_scopes:
        flags |= ServiceFlags.TWO_SCOPES
    return flags | ServiceFlags.LOCAL if is_local else flags
