"""Which endpoints a service port may use: the rule that everything else serves."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

from ebpfproxy.services.endpoints import Traits
from ebpfproxy.services.model import Backend


class Basis(enum.StrEnum):
    """What a set of backends consists of: the rule that decided."""

    READY = "ready"
    NODE_HINTS = "node-hints"
    ZONE_HINTS = "zone-hints"
    #: None is ready: those that terminate and still serve.
    TERMINATING = "terminating"


class Usable(NamedTuple):
    """Backends, each set sorted and without duplicates."""

    cluster: tuple[Backend, ...]
    local: tuple[Backend, ...]
    draining: tuple[Backend, ...]
    terminating: frozenset[Backend]
    idle: tuple[Backend, ...] = ()
    cluster_basis: Basis = Basis.READY
    local_basis: Basis = Basis.READY


_NONE = frozenset[Backend]()
#: An enumeration looks for each of its members anew (until Python 3.12), which takes longer than a call.
_READY, _NODE_HINTS, _ZONE_HINTS, _TERMINATING = Basis


def usable_endpoints(endpoints: Mapping[Backend, Traits], node_name: str, zone: str | None) -> Usable:
    """The endpoints that new connections may use, by traffic policy, on the node ``node_name``.

    ``cluster`` (policy Cluster): the ready endpoints that topology hints leave; if no endpoint at all is
    ready, those that are serving and terminating, hints or not (KEP-1669). It is empty only where no
    endpoint anywhere can serve: then traffic of either policy is rejected.

    ``local`` (policy Local): the ready endpoints on this node; if there is none, the serving and
    terminating ones on this node. Hints do not apply. Where it is empty but ``cluster`` is not, traffic
    under policy Local is dropped.

    Topology hints (KEP-2433, KEP-3015) look at ready endpoints only. If every one carries node hints and
    one of them names this node, only those naming this node are used; else if every one carries zone hints
    and one names this node's zone, only those naming the zone; else all of them. A node that has no zone
    uses all. Whatever the hints, the result is not empty where a ready endpoint exists.

    ``draining``: the terminating endpoints in neither set, which only serve old connections.
    ``terminating``: the members of both sets that are terminating. ``idle``: the endpoints that are not
    ready and not draining, which no rule looks at.
    """
    ready = [item for item in endpoints.items() if item[1].ready]
    leaving: list[tuple[Backend, Traits]] = []
    idle: tuple[Backend, ...] = ()
    if len(ready) < len(endpoints):
        leaving = [item for item in endpoints.items() if item[1].draining]
        idle = _sorted(backend for backend, c in endpoints.items() if not c.ready and not c.draining)
    cluster_basis = local_basis = _READY
    if ready:
        chosen, cluster_basis = _by_hints(ready, node_name, zone)
        cluster = _sorted(chosen)
    else:
        cluster, cluster_basis = _sorted(backend for backend, _ in leaving), _TERMINATING
    local = _sorted([backend for backend, c in ready if c.local])
    if not local:
        local, local_basis = _sorted([backend for backend, c in leaving if c.local]), _TERMINATING
    local = cluster if local == cluster else local
    if not leaving:
        return Usable(cluster, local, (), _NONE, idle, cluster_basis, local_basis)
    used = {*cluster, *local}
    return Usable(
        cluster,
        local,
        _sorted(backend for backend, _ in leaving if backend not in used),
        frozenset(backend for backend, _ in leaving if backend in used),
        idle,
        cluster_basis,
        local_basis,
    )


class Unused(enum.StrEnum):
    """Why hints of one kind do not restrict the ready endpoints, though some have any."""

    NOT_ALL = "not every ready endpoint has one"
    NOT_HERE = "none names this node's"
    UNKNOWN_ZONE = "this node has no zone"


_NOT_ALL, _NOT_HERE, _UNKNOWN_ZONE = Unused
_Endpoints = Sequence[tuple[Backend, Traits]]
_Hints = Callable[[Traits], tuple[str, ...]]
_NODES, _ZONES = attrgetter("nodes"), attrgetter("zones")


def _by_hints(ready: _Endpoints, node_name: str, zone: str | None) -> tuple[Iterable[Backend], Basis]:
    for basis, hints, own in ((_NODE_HINTS, _NODES, node_name), (_ZONE_HINTS, _ZONES, zone)):
        here = _named(ready, hints, own)
        if not isinstance(here, Unused):
            return here, basis
    return [backend for backend, _ in ready], _READY


def _named(ready: _Endpoints, hints: _Hints, own: str | None) -> list[Backend] | Unused:
    """The endpoints whose hints name ``own``, the node or its zone, else why the hints are not followed."""
    if not own:
        return _UNKNOWN_ZONE
    # Mostly nobody has any.
    if not hints(ready[0][1]) or not all(hints(c) for _, c in ready):
        return _NOT_ALL
    return [backend for backend, c in ready if own in hints(c)] or _NOT_HERE


def unused_hints(
    endpoints: Mapping[Backend, Traits], node_name: str, zone: str | None
) -> tuple[Unused | None, Unused | None]:
    """Why node hints and zone hints are not followed; None where they are, or where nobody has any."""
    ready = [item for item in endpoints.items() if item[1].ready]

    def reason(hints: _Hints, own: str | None) -> Unused | None:
        found = _named(ready, hints, own) if any(hints(c) for _, c in ready) else None
        return found if isinstance(found, Unused) else None

    return reason(_NODES, node_name), reason(_ZONES, zone)


def _sorted(backends: Iterable[Backend]) -> tuple[Backend, ...]:
    return tuple(sorted(backends))
