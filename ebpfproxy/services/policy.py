"""Which endpoints a service port may use: the rule that everything else serves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ebpfproxy.services.endpoints import Traits
from ebpfproxy.services.model import Backend


class Usable(NamedTuple):
    """Backends, each set sorted and without duplicates."""

    cluster: tuple[Backend, ...]
    local: tuple[Backend, ...]
    draining: tuple[Backend, ...]
    terminating: frozenset[Backend]
    idle: tuple[Backend, ...] = ()


_NONE = frozenset[Backend]()


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
    leaving = [item for item in endpoints.items() if item[1].draining]
    idle: tuple[Backend, ...] = ()
    if len(ready) + len(leaving) < len(endpoints):
        idle = _sorted(backend for backend, c in endpoints.items() if not c.ready and not c.draining)
    if ready:
        cluster = _sorted(_by_hints(ready, node_name, zone))
    else:
        cluster = _sorted(backend for backend, _ in leaving)
    local = _sorted(backend for backend, c in ready if c.local) or _sorted(
        backend for backend, c in leaving if c.local
    )
    if not leaving:
        return Usable(cluster, cluster if local == cluster else local, (), _NONE, idle)
    used = {*cluster, *local}
    return Usable(
        cluster,
        cluster if local == cluster else local,
        _sorted(backend for backend, _ in leaving if backend not in used),
        frozenset(backend for backend, _ in leaving if backend in used),
        idle,
    )


def _by_hints(ready: list[tuple[Backend, Traits]], node_name: str, zone: str | None) -> Iterable[Backend]:
    if all(c.nodes for _, c in ready):
        here = [backend for backend, c in ready if node_name in c.nodes]
        if here:
            return here
    if zone and all(c.zones for _, c in ready):
        here = [backend for backend, c in ready if zone in c.zones]
        if here:
            return here
    return [backend for backend, _ in ready]


def _sorted(backends: Iterable[Backend]) -> tuple[Backend, ...]:
    return tuple(sorted(backends))
