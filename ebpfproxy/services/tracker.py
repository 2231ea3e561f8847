"""From a stream of events to changed service ports: the state of the cluster, as far as Services need it.

Events are indexed as they come and only mark Services as touched; ``drain`` computes the touched ones once,
however many events there were, and returns what really differs from what was drained before. The order in
which Services, slices and the Node arrive does not matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import chain

import msgspec

from ebpfproxy.kube.objects import OPTIONAL, Changed, Event, Node, ObjectKey, Replaced, Resource, key_of
from ebpfproxy.services.balancing import Weights
from ebpfproxy.services.cidrs import ServiceRanges
from ebpfproxy.services.conflicts import Age, Claim, Claims, claim_of
from ebpfproxy.services.endpoints import SliceEndpoints, Traits, merge
from ebpfproxy.services.frontends import PortFrontends, ServiceFrontends
from ebpfproxy.services.model import (
    Backend,
    Family,
    Frontend,
    HealthCheck,
    Policy,
    Prefix,
    ServicePort,
    ServicePortKey,
    format_endpoint,
)
from ebpfproxy.services.policy import Usable, usable_endpoints
from ebpfproxy.services.values import Warning, parse_time


class Update(msgspec.Struct, frozen=True):
    """What changed since the last drain.

    ``triggers`` are Unix times at which pods or Services changed (the annotation
    ``endpoints.kubernetes.io/last-change-trigger-time`` of changed slices); ``received`` are the monotonic
    times at which the events' bytes were read. First lists and new lists have neither, and neither have
    events that change nothing here. A slice that is deleted takes the triggers of its Service along, as in
    kube-proxy's EndpointsChangeTracker: its annotation tells of its last change, not of its end.
    """

    changed: tuple[ServicePort, ...]
    removed: tuple[ServicePortKey, ...]
    warnings: tuple[Warning, ...]
    triggers: tuple[float, ...]
    received: tuple[float, ...]
    service_changes: int
    endpoint_changes: int


class Tracker:
    """Services, slices and the Node as last heard of, for the node ``node_name``."""

    def __init__(self, node_name: str) -> None:
        self._node_name = node_name
        self._heard_of: set[Resource] = set()
        self._services: dict[ObjectKey, ServiceFrontends] = {}
        self._slices: dict[ObjectKey, SliceEndpoints] = {}
        self._slices_of: dict[ObjectKey, tuple[ObjectKey, ...]] = {}
        self._claims = Claims()
        self._ports: dict[ObjectKey, tuple[ServicePort, ...]] = {}
        self._touched: dict[ObjectKey, None] = {}
        self._warned: dict[tuple[Resource, ObjectKey], frozenset[Warning]] = {}
        self._conflicts: dict[ObjectKey, frozenset[Warning]] = {}
        self._new_warnings: list[Warning] = []
        self._triggers: dict[ObjectKey, list[float]] = {}
        self._received: list[float] = []
        self._health_checks: dict[ObjectKey, HealthCheck] = {}
        self._drained: frozenset[tuple[bytes, int]] = frozenset()
        self._service_changes = 0
        self._endpoint_changes = 0
        self._ranges: dict[ObjectKey, ServiceRanges] = {}
        self._of_other_proxies: frozenset[bytes] | None = frozenset()
        self.node: Node | None = None
        #: Service ports with policy Local that have endpoints but none here, by family and policy.
        self.without_local_endpoints: Counter[tuple[Family, str]] = Counter()

    # -- what is known

    @property
    def synced(self) -> bool:
        """Whether every resource that any API server has was listed once."""
        return self._heard_of >= set(Resource) - OPTIONAL

    @property
    def knows_node(self) -> bool:
        """Whether there is a Node object for this node, or certainly none."""
        return Resource.NODES in self._heard_of

    @property
    def service_cidrs(self) -> tuple[Prefix, ...] | None:
        """The ranges of all ServiceCIDRs; None before they were listed."""
        if Resource.SERVICECIDRS not in self._heard_of:
            return None
        return tuple(sorted({prefix for each in self._ranges.values() for prefix in each.prefixes}))

    @property
    def of_other_proxies(self) -> frozenset[bytes]:
        """Cluster IPs of Services with another service-proxy-name."""
        if self._of_other_proxies is None:
            self._of_other_proxies = frozenset(chain.from_iterable(s.others for s in self._services.values()))
        return self._of_other_proxies

    @property
    def pending(self) -> bool:
        return bool(self._touched or self._new_warnings)

    @property
    def pending_changes(self) -> tuple[int, int]:
        """Changes of Services and of endpoints since the last drain."""
        return self._service_changes, self._endpoint_changes

    @property
    def services(self) -> int:
        """Services that have a frontend."""
        return len(self._ports)

    def service_ports(self) -> list[ServicePort]:
        """Everything as last drained, sorted."""
        return sorted((p for ports in self._ports.values() for p in ports), key=lambda p: p.key)

    def _count_without_local(self, ports: Iterable[ServicePort], step: int) -> None:
        for port in ports:
            if port.cluster and not port.local:
                family = port.key.family
                for policy, uses in (
                    ("internal", any(f.internal == Policy.LOCAL for f in port.frontends)),
                    ("external", any(f.internal < f.external for f in port.frontends)),
                ):
                    self.without_local_endpoints[family, policy] += step * uses

    @property
    def _zone(self) -> str | None:
        labels = self.node.metadata.labels if self.node is not None else None
        return labels.zone if labels is not None else None

    # -- events

    def apply(self, event: Event) -> None:
        """The event's objects are what ``services.reduce`` makes of them."""
        if isinstance(event, Replaced):
            self._heard_of.add(event.resource)
            for gone in self._known(event.resource) - event.objects.keys() - event.unreadable:
                self._remove(event.resource, gone)
            for key, each in event.objects.items():
                self._set(key, each)
        elif isinstance(event, Changed):
            if self._set(event.key, event.object):
                self._received.append(event.received)
                if isinstance(event.object, SliceEndpoints):
                    self._note_trigger(event.object)
        elif self._remove(event.resource, event.key):
            self._received.append(event.received)

    def _note_trigger(self, piece: SliceEndpoints) -> None:
        time = parse_time(piece.trigger_time) if piece.trigger_time is not None else None
        if time is not None and piece.service is not None:
            self._triggers.setdefault(piece.service, []).append(time)

    def _known(self, resource: Resource) -> set[ObjectKey]:
        if resource is Resource.SERVICES:
            return set(self._services)
        if resource is Resource.ENDPOINTSLICES:
            return set(self._slices)
        if resource is Resource.SERVICECIDRS:
            return set(self._ranges)
        return {key_of(self.node)} if self.node is not None else set()

    def _set(self, key: ObjectKey, each: object) -> bool:
        """Whether a Service has to be computed again; so do all of the following."""
        if isinstance(each, ServiceFrontends):
            return self._set_service(key, each)
        if isinstance(each, SliceEndpoints):
            return self._set_slice(key, each)
        if isinstance(each, ServiceRanges):
            self._ranges[key] = each
            self._warn(Resource.SERVICECIDRS, key, each.warnings)
            return False
        assert isinstance(each, Node), f"{key}: a {type(each).__name__} is not reduced"
        return key.name == self._node_name and self._set_node(each)

    def _remove(self, resource: Resource, key: ObjectKey) -> bool:
        self._warn(resource, key, ())
        if resource is Resource.SERVICES:
            return self._set_service(key, None)
        if resource is Resource.ENDPOINTSLICES:
            return self._set_slice(key, None)
        if resource is Resource.SERVICECIDRS:
            self._ranges.pop(key, None)
            return False
        return key.name == self._node_name and self._set_node(None)

    def _set_service(self, key: ObjectKey, new: ServiceFrontends | None) -> bool:
        old = self._services.get(key)
        if old == new:
            return False
        if (old and old.others) or (new and new.others):
            self._of_other_proxies = None
        if new is None:
            del self._services[key]
        else:
            self._services[key] = new
            self._warn(Resource.SERVICES, key, new.warnings)
        self._service_changes += 1
        self._touched[key] = None
        age, claims = _claims_of(key, new)
        for other in self._claims.replace(*_claims_of(key, old), age, claims):
            self._touched[other] = None
        return True

    def _set_slice(self, key: ObjectKey, new: SliceEndpoints | None) -> bool:
        old = self._slices.get(key)
        if old is None or new is None:
            if old is new:
                return False
        elif old.same_as(new):
            return False
        if new is None:
            del self._slices[key]
        else:
            self._slices[key] = new
            self._warn(Resource.ENDPOINTSLICES, key, new.warnings)
        before = old.service if old is not None else None
        after = new.service if new is not None else None
        concerned = [service for service in (before, after) if service is not None]
        self._touched.update(dict.fromkeys(concerned))
        self._endpoint_changes += bool(concerned)
        if before == after:
            return bool(concerned)
        if before is not None:
            if new is None:
                self._triggers.pop(before, None)
            left = tuple(each for each in self._slices_of.pop(before) if each != key)
            if left:
                self._slices_of[before] = left
        if after is not None:
            self._slices_of[after] = (*self._slices_of.get(after, ()), key)
        return bool(concerned)

    def _set_node(self, node: Node | None) -> bool:
        zone = self._zone
        self.node = node
        if self._zone == zone:
            return False
        self._touched.update(dict.fromkeys(self._services))
        return bool(self._services)

    def _warn(self, resource: Resource, key: ObjectKey, warnings: Iterable[Warning]) -> None:
        """Reports those that were not there before."""
        new = frozenset(warnings)
        old = self._warned.pop((resource, key), frozenset())
        if new:
            self._warned[resource, key] = new
            self._new_warnings += sorted(new - old, key=str)

    # -- results

    def drain(self) -> Update:
        changed: list[ServicePort] = []
        removed: list[ServicePortKey] = []
        for key in self._touched:
            old = self._ports.get(key, ())
            new = self._compute(key)
            was = {port.key: port for port in old}
            changed += [port for port in new if was.pop(port.key, None) != port]
            removed += was
            self._count_without_local(old, -1)
            self._count_without_local(new, 1)
            if new:
                self._ports[key] = new
            else:
                self._ports.pop(key, None)
            self._note_health(key, new)
        update = Update(
            changed=tuple(changed),
            removed=tuple(removed),
            warnings=tuple(self._new_warnings),
            triggers=tuple(chain.from_iterable(self._triggers.values())),
            received=tuple(self._received),
            service_changes=self._service_changes,
            endpoint_changes=self._endpoint_changes,
        )
        self._touched = {}
        self._new_warnings, self._triggers, self._received = [], {}, []
        self._service_changes = self._endpoint_changes = 0
        return update

    def _note_health(self, key: ObjectKey, ports: tuple[ServicePort, ...]) -> None:
        service = self._services.get(key)
        if service is None or not service.health_port or not ports:
            self._health_checks.pop(key, None)
            return
        ready: dict[Family, set[bytes]] = {family: set() for family in Family}
        for port in ports:
            ready[port.key.family] |= {b.address for b in port.local if b not in port.terminating}
        count = max(map(len, ready.values()))
        self._health_checks[key] = HealthCheck(*key, service.health_port, count)

    @property
    def health_checks(self) -> list[HealthCheck]:
        """Of the Services with a healthCheckNodePort, as last drained."""
        return list(self._health_checks.values())

    def _compute(self, key: ObjectKey) -> tuple[ServicePort, ...]:
        service = self._services.get(key)
        if service is None:
            self._conflicts.pop(key, None)
            return ()
        conflicts: list[Warning] = []
        ports = []
        for port in service.ports:
            frontends = tuple(f for f in port.frontends if self._owns(key, f, conflicts))
            if not frontends:
                continue
            endpoints = self._endpoints(key, port)
            drained = self._take_drained(endpoints, service.weights)
            usable = usable_endpoints(endpoints, self._node_name, self._zone)
            ports.append(
                ServicePort(
                    key=port.key,
                    frontends=port.frontends if frontends == port.frontends else frontends,
                    cluster=usable.cluster,
                    local=usable.local,
                    draining=usable.draining,
                    terminating=usable.terminating,
                    idle=usable.idle,
                    affinity_seconds=port.affinity_seconds,
                    algorithm=port.algorithm,
                    drained=drained,
                    weights=_weights_of(usable, endpoints, service.weights),
                    source_ranges=port.source_ranges,
                )
            )
        before = self._conflicts.pop(key, frozenset())
        if conflicts:
            self._conflicts[key] = frozenset(conflicts)
            self._new_warnings += [w for w in conflicts if w not in before]
        return tuple(ports)

    def _take_drained(self, endpoints: dict[Backend, Traits], weights: Weights | None) -> tuple[Backend, ...]:
        """Takes out those that could serve but shall not, so that the rules see only the others."""
        if weights is None and not self._drained:
            return ()
        drained = [
            backend
            for backend, traits in endpoints.items()
            if (traits.ready or traits.draining)
            and (
                (backend.address, 0) in self._drained
                or (backend.address, backend.port) in self._drained
                or (weights is not None and not weights.of(backend.address, traits.node, traits.zone))
            )
        ]
        for backend in drained:
            del endpoints[backend]
        return tuple(sorted(drained))

    def set_drained(self, drained: frozenset[tuple[bytes, int]]) -> None:
        """Addresses and ports (0: all) that shall take no new connections from this node."""
        addresses = {address for address, _ in self._drained ^ drained}
        if addresses:
            self._drained = drained
            for piece in self._slices.values():
                if piece.service is not None and not addresses.isdisjoint(piece.addresses):
                    self._touched[piece.service] = None

    def has_endpoint(self, address: bytes, port: int) -> bool:
        """Whether any slice has it; port 0: any port."""
        return any(
            address in piece.addresses and (not port or any(p.port == port for p in piece.ports))
            for piece in self._slices.values()
        )

    def _owns(self, key: ObjectKey, frontend: Frontend, conflicts: list[Warning]) -> bool:
        owner = self._claims.owner(claim_of(frontend))
        if owner == key:
            return True
        where = format_endpoint(frontend.address, frontend.port)
        conflicts.append(
            Warning(
                Resource.SERVICES,
                key,
                str(frontend.kind),
                f"{where}/{frontend.protocol.name} already belongs to {owner}",
            )
        )
        return False

    def _endpoints(self, key: ObjectKey, port: PortFrontends) -> dict[Backend, Traits]:
        """The endpoints of all slices that have this port, by name and protocol.

        An address that is there twice counts once: see :func:`ebpfproxy.services.endpoints.merge`.
        """
        found: dict[Backend, Traits] = {}
        name, protocol, family = port.key.port_name, port.key.protocol, port.key.family
        for slice_key in self._slices_of.get(key, ()):
            piece = self._slices[slice_key]
            if piece.family is not family:
                continue
            for slice_port in piece.ports:
                if slice_port.name != name or slice_port.protocol is not protocol:
                    continue
                number = slice_port.port
                for address, traits in zip(piece.addresses, piece.traits, strict=True):
                    backend = Backend(address, number, protocol)
                    known = found.setdefault(backend, traits)
                    if known is not traits:
                        found[backend] = merge(known, traits)
        return found


def _claims_of(key: ObjectKey, service: ServiceFrontends | None) -> tuple[Age, set[Claim]]:
    if service is None:
        return ("", *key), set()
    return service.age, {claim_of(f) for port in service.ports for f in port.frontends}


def _weights_of(
    usable: Usable, endpoints: dict[Backend, Traits], weights: Weights | None
) -> tuple[tuple[Backend, int], ...]:
    """Of the usable ones, where they are not 1."""
    if weights is None:
        return ()
    found = []
    for backend in sorted({*usable.cluster, *usable.local}):
        traits = endpoints[backend]
        weight = weights.of(backend.address, traits.node, traits.zone)
        if weight != 1:
            found.append((backend, weight))
    return tuple(found)
