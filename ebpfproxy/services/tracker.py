"""From a stream of events to changed service ports: the state of the cluster, as far as Services need it.

Events are indexed as they come and only mark Services as touched; ``drain`` computes the touched ones once,
however many events there were, and returns what really differs from what was drained before. The order in
which Services, slices and the Node arrive does not matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import chain
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from ebpfproxy.kube.objects import (
    OPTIONAL,
    Changed,
    Deleted,
    Event,
    Node,
    ObjectKey,
    Replaced,
    Resource,
    key_of,
)
from ebpfproxy.services.cidrs import ServiceRanges
from ebpfproxy.services.conflicts import Age, Claim, Claims, claim_of
from ebpfproxy.services.endpoints import SliceEndpoints
from ebpfproxy.services.frontends import ServiceFrontends
from ebpfproxy.services.model import (
    Family,
    Frontend,
    HealthCheck,
    Policy,
    Prefix,
    ServicePort,
    ServicePortKey,
    format_endpoint,
)
from ebpfproxy.services.ports import ports_of, ready_on_this_node
from ebpfproxy.services.reasons import ServiceReasons, reasons_of
from ebpfproxy.services.slices import Slices
from ebpfproxy.services.values import Warning, parse_time
from ebpfproxy.services.warnings import Warnings

T = TypeVar("T")


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


class _Index(NamedTuple, Generic[T]):
    """How the tracker takes objects of one resource, as ``services.reduce`` makes them."""

    keys: Callable[[], Collection[ObjectKey]]
    #: Sets an object, or removes it (None). True where a Service has to be computed again.
    set: Callable[[ObjectKey, T | None], bool]
    warnings: Callable[[T], tuple[Warning, ...]] = lambda _: ()
    #: Gets each object whose change was an event and made a Service be computed again.
    changed: Callable[[T], None] = lambda _: None


class Tracker:
    """Services, slices and the Node as last heard of, for the node ``node_name``."""

    def __init__(self, node_name: str) -> None:
        self._node_name = node_name
        self._heard_of: set[Resource] = set()
        self._services: dict[ObjectKey, ServiceFrontends] = {}
        self._slices = Slices()
        self._claims = Claims()
        self._ports: dict[ObjectKey, tuple[ServicePort, ...]] = {}
        self._touched: dict[ObjectKey, None] = {}
        self._warnings = Warnings()
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
        #: What T is of a resource is known here only.
        self._indexes: Mapping[Resource, _Index[Any]] = {
            Resource.SERVICES: _Index(self._services.keys, self._set_service, lambda each: each.warnings),
            Resource.ENDPOINTSLICES: _Index(
                self._slices.keys, self._set_slice, lambda each: each.warnings, self._note_trigger
            ),
            Resource.NODES: _Index(lambda: [key_of(self.node)] if self.node else [], self._set_node),
            Resource.SERVICECIDRS: _Index(self._ranges.keys, self._set_ranges, lambda each: each.warnings),
        }

    # -- what is known

    @property
    def synced(self) -> bool:
        """True once every resource that all API servers have was listed."""
        return self._heard_of >= set(Resource) - OPTIONAL

    @property
    def knows_node(self) -> bool:
        """True once there is a Node object for this node, or certainly none."""
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
        return bool(self._touched or self._warnings)

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
            if port.cluster and not port.local and any(f.external or f.internal for f in port.frontends):
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
        self._apply(self._indexes[event.resource], event)

    def _apply(self, index: _Index[T], event: Replaced[T] | Changed[T] | Deleted) -> None:
        resource = event.resource
        if isinstance(event, Replaced):
            self._heard_of.add(resource)
            for gone in set(index.keys()) - event.objects.keys() - event.unreadable:
                self._warnings.set((resource, gone), ())
                index.set(gone, None)
            for key, each in event.objects.items():
                index.set(key, each)
                self._warnings.set((resource, key), index.warnings(each))
            return
        new = event.object if isinstance(event, Changed) else None
        self._warnings.set((resource, event.key), index.warnings(new) if new is not None else ())
        if index.set(event.key, new):
            self._received.append(event.received)
            if new is not None:
                index.changed(new)

    def _note_trigger(self, piece: SliceEndpoints) -> None:
        time = parse_time(piece.trigger_time) if piece.trigger_time is not None else None
        if time is not None and piece.service is not None:
            self._triggers.setdefault(piece.service, []).append(time)

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
        self._service_changes += 1
        self._touched[key] = None
        age, claims = _claims_of(key, new)
        for other in self._claims.replace(*_claims_of(key, old), age, claims):
            self._touched[other] = None
        return True

    def _set_slice(self, key: ObjectKey, new: SliceEndpoints | None) -> bool:
        before, after = self._slices.set(key, new)
        concerned = [service for service in (before, after) if service is not None]
        self._touched.update(dict.fromkeys(concerned))
        self._endpoint_changes += bool(concerned)
        if new is None and before is not None:
            self._triggers.pop(before, None)
        return bool(concerned)

    def _set_node(self, key: ObjectKey, node: Node | None) -> bool:
        if key.name != self._node_name:
            return False
        zone = self._zone
        self.node = node
        if self._zone == zone:
            return False
        self._touched.update(dict.fromkeys(self._services))
        return bool(self._services)

    def _set_ranges(self, key: ObjectKey, new: ServiceRanges | None) -> bool:
        if new is None:
            self._ranges.pop(key, None)
        else:
            self._ranges[key] = new
        return False

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
            warnings=self._warnings.take_new(),
            triggers=tuple(chain.from_iterable(self._triggers.values())),
            received=tuple(self._received),
            service_changes=self._service_changes,
            endpoint_changes=self._endpoint_changes,
        )
        self._touched = {}
        self._triggers, self._received = {}, []
        self._service_changes = self._endpoint_changes = 0
        return update

    def _note_health(self, key: ObjectKey, ports: tuple[ServicePort, ...]) -> None:
        service = self._services.get(key)
        if service is None or not service.health_port or not ports:
            self._health_checks.pop(key, None)
            return
        self._health_checks[key] = HealthCheck(*key, service.health_port, ready_on_this_node(ports))

    @property
    def health_checks(self) -> list[HealthCheck]:
        """One for each Service with a healthCheckNodePort, as last drained."""
        return list(self._health_checks.values())

    def _compute(self, key: ObjectKey) -> tuple[ServicePort, ...]:
        conflicts: list[Warning] = []
        ports: tuple[ServicePort, ...] = ()
        if service := self._services.get(key):
            ports = tuple(
                ports_of(
                    service,
                    self._slices.of(key),
                    lambda frontend: self._owns(key, frontend, conflicts),
                    drained=self._drained,
                    node_name=self._node_name,
                    zone=self._zone,
                )
            )
        self._warnings.set(("conflicts", key), conflicts)
        return ports

    def reasons(self, key: ObjectKey) -> ServiceReasons | None:
        """Why the Service's endpoints are used or left out, by what is known now; None for an unknown one."""
        service = self._services.get(key)
        if service is None:
            return None
        return reasons_of(
            key,
            service,
            self._slices.of(key),
            lambda frontend: self._claims.owner(claim_of(frontend)),
            drained=self._drained,
            node_name=self._node_name,
            zone=self._zone,
        )

    @property
    def drained(self) -> frozenset[tuple[bytes, int]]:
        """What :meth:`set_drained` was told last."""
        return self._drained

    def set_drained(self, drained: frozenset[tuple[bytes, int]]) -> None:
        """Addresses and ports (0: all) that shall take no new connections from this node."""
        addresses = {address for address, _ in self._drained ^ drained}
        if addresses:
            self._drained = drained
            self._touched.update(dict.fromkeys(self._slices.services_with(addresses)))

    @property
    def slices(self) -> list[SliceEndpoints]:
        """All slices as they are now."""
        return self._slices.all()

    def has_endpoint(self, address: bytes, port: int) -> bool:
        """True if any slice has it; port 0: any port."""
        return self._slices.has_endpoint(address, port)

    def _owns(self, key: ObjectKey, frontend: Frontend, conflicts: list[Warning]) -> bool:
        claim = claim_of(frontend)
        if self._claims.is_owner(key, claim):
            return True
        where = format_endpoint(frontend.address, frontend.port)
        conflicts.append(
            Warning(
                Resource.SERVICES,
                key,
                str(frontend.kind),
                f"{where}/{frontend.protocol.name} already belongs to {self._claims.owner(claim)}",
            )
        )
        return False


def _claims_of(key: ObjectKey, service: ServiceFrontends | None) -> tuple[Age, set[Claim]]:
    if service is None:
        return ("", *key), set()
    return service.age, {claim_of(f) for port in service.ports for f in port.frontends}
