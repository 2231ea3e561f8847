"""The Kubernetes objects as ebpfproxy reads them, and the events by which sources deliver them.

Typed, immutable records decoded straight from the wire (msgspec), with only the fields that are read.
A source (the API server's reflectors in ``kube.watch.reflector``, files in ``kube.manifests``) puts
``Replaced``, ``Changed`` and ``Deleted`` on a queue; ``services`` consumes them. This module knows
neither HTTP nor what a Service means.

Field names are the API's (camelCase on the wire). The API server writes ``null`` for empty lists,
hence ``| None``.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable, Mapping
from typing import Generic, NamedTuple, TypeVar

import msgspec


class _Record(msgspec.Struct, frozen=True, rename="camel", kw_only=True, gc=False):
    """Immutable and without cycles, so the garbage collector need not track it."""


class ServiceAnnotations(_Record, frozen=True, rename=None):
    lb_algorithm: str | None = msgspec.field(name="ebpfproxy.io/lb-algorithm", default=None)
    weights: str | None = msgspec.field(name="ebpfproxy.io/weights", default=None)


class ServiceLabels(_Record, frozen=True, rename=None):
    proxy_name: str | None = msgspec.field(name="service.kubernetes.io/service-proxy-name", default=None)


class SliceAnnotations(_Record, frozen=True, rename=None):
    #: RFC 3339 time of the change (a pod's or the Service's) that led to this version of the slice.
    trigger_time: str | None = msgspec.field(
        name="endpoints.kubernetes.io/last-change-trigger-time", default=None
    )


class SliceLabels(_Record, frozen=True, rename=None):
    service_name: str | None = msgspec.field(name="kubernetes.io/service-name", default=None)
    headless: str | None = msgspec.field(name="service.kubernetes.io/headless", default=None)


class NodeLabels(_Record, frozen=True, rename=None):
    zone: str | None = msgspec.field(name="topology.kubernetes.io/zone", default=None)


class ServiceMeta(_Record, frozen=True):
    name: str
    namespace: str = "default"
    resource_version: str = ""
    creation_timestamp: str | None = None
    labels: ServiceLabels | None = None
    annotations: ServiceAnnotations | None = None


class SliceMeta(_Record, frozen=True):
    name: str
    namespace: str = "default"
    resource_version: str = ""
    labels: SliceLabels | None = None
    annotations: SliceAnnotations | None = None


class NodeMeta(_Record, frozen=True):
    name: str
    resource_version: str = ""
    labels: NodeLabels | None = None
    deletion_timestamp: str | None = None


class ServicePortSpec(_Record, frozen=True):
    port: int
    name: str = ""
    protocol: str = "TCP"
    node_port: int = 0


class ClientIPConfig(_Record, frozen=True):
    timeout_seconds: int | None = None


class SessionAffinityConfig(_Record, frozen=True):
    client_ip: ClientIPConfig | None = msgspec.field(name="clientIP", default=None)


class ServiceSpec(_Record, frozen=True):
    type: str = "ClusterIP"
    cluster_ip: str = msgspec.field(name="clusterIP", default="")
    cluster_ips: tuple[str, ...] | None = msgspec.field(name="clusterIPs", default=None)
    ports: tuple[ServicePortSpec, ...] | None = None
    external_ips: tuple[str, ...] | None = msgspec.field(name="externalIPs", default=None)
    session_affinity: str = "None"
    session_affinity_config: SessionAffinityConfig | None = None
    internal_traffic_policy: str | None = None
    external_traffic_policy: str | None = None
    load_balancer_source_ranges: tuple[str, ...] | None = None
    health_check_node_port: int = 0


class LoadBalancerIngress(_Record, frozen=True):
    ip: str | None = None
    ip_mode: str | None = None


class LoadBalancerStatus(_Record, frozen=True):
    ingress: tuple[LoadBalancerIngress, ...] | None = None


class ServiceStatus(_Record, frozen=True):
    load_balancer: LoadBalancerStatus | None = None


class Service(_Record, frozen=True):
    metadata: ServiceMeta
    spec: ServiceSpec
    status: ServiceStatus | None = None


class EndpointConditions(_Record, frozen=True):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class ForZone(_Record, frozen=True):
    name: str


class ForNode(_Record, frozen=True):
    name: str


class EndpointHints(_Record, frozen=True):
    for_zones: tuple[ForZone, ...] | None = None
    for_nodes: tuple[ForNode, ...] | None = None


class TargetRef(_Record, frozen=True):
    kind: str = ""
    name: str = ""


class Endpoint(_Record, frozen=True):
    addresses: tuple[str, ...] | None = None
    conditions: EndpointConditions | None = None
    node_name: str | None = None
    zone: str | None = None
    hints: EndpointHints | None = None
    target_ref: TargetRef | None = None


class EndpointPort(_Record, frozen=True):
    #: A slice port's defaults: no name is "", no protocol is TCP, no port means "all ports" and is skipped.
    name: str | None = None
    port: int | None = None
    protocol: str | None = None


class EndpointSlice(_Record, frozen=True):
    metadata: SliceMeta
    address_type: str
    endpoints: tuple[Endpoint, ...] | None = None
    ports: tuple[EndpointPort, ...] | None = None


class Taint(_Record, frozen=True):
    key: str


class NodeSpec(_Record, frozen=True):
    pod_cidrs: tuple[str, ...] | None = msgspec.field(name="podCIDRs", default=None)
    taints: tuple[Taint, ...] | None = None


class NodeAddress(_Record, frozen=True):
    type: str = ""
    address: str = ""


class NodeStatus(_Record, frozen=True):
    addresses: tuple[NodeAddress, ...] | None = None


class Node(_Record, frozen=True):
    metadata: NodeMeta
    spec: NodeSpec | None = None
    status: NodeStatus | None = None


class ServiceCidrMeta(_Record, frozen=True):
    name: str
    resource_version: str = ""


class ServiceCidrSpec(_Record, frozen=True):
    cidrs: tuple[str, ...] | None = None


class ServiceCidr(_Record, frozen=True):
    """networking.k8s.io/v1, since Kubernetes 1.33 (KEP-1880); v1beta1 has the same fields."""

    metadata: ServiceCidrMeta
    spec: ServiceCidrSpec | None = None


Object = Service | EndpointSlice | Node | ServiceCidr


class Resource(enum.StrEnum):
    """The watched resources; the value is the plural name in the API's paths."""

    SERVICES = "services"
    ENDPOINTSLICES = "endpointslices"
    NODES = "nodes"
    SERVICECIDRS = "servicecidrs"


#: Resources that an API server may not have, or may not show: nothing waits for them.
OPTIONAL = frozenset({Resource.SERVICECIDRS})

RECORD_TYPES: dict[Resource, type[Service] | type[EndpointSlice] | type[Node] | type[ServiceCidr]] = {
    Resource.SERVICES: Service,
    Resource.ENDPOINTSLICES: EndpointSlice,
    Resource.NODES: Node,
    Resource.SERVICECIDRS: ServiceCidr,
}


class ObjectKey(NamedTuple):
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.namespace else self.name


def key_of(obj: Object) -> ObjectKey:
    """Namespace and name; the namespace of what has none is empty."""
    meta = obj.metadata
    if isinstance(meta, _OF_NO_NAMESPACE):
        return ObjectKey("", meta.name)
    return ObjectKey(sys.intern(meta.namespace), meta.name)


_OF_NO_NAMESPACE = (NodeMeta, ServiceCidrMeta)


#: A source calls it with each object as soon as that is decoded, so that long lists need little memory.
Reduce = Callable[[Object], object]


T = TypeVar("T")


class Replaced(msgspec.Struct, Generic[T], frozen=True, gc=False):
    """The complete content of one resource: a first list, a new list after a gap, all manifests.

    ``objects`` are what the source's ``Reduce`` makes of them. ``unreadable`` names objects that could not be
    decoded: what was last known of those stays in force.
    """

    resource: Resource
    objects: Mapping[ObjectKey, T]
    unreadable: frozenset[ObjectKey] = frozenset()


class Changed(msgspec.Struct, Generic[T], frozen=True, gc=False):
    """One object was added or modified. ``received`` is ``time.monotonic()`` when its bytes were read."""

    resource: Resource
    key: ObjectKey
    object: T
    received: float = 0.0


class Deleted(msgspec.Struct, frozen=True, gc=False):
    """One object is no more. ``received`` as in Changed."""

    resource: Resource
    key: ObjectKey
    received: float = 0.0


#: Any event of any resource, as a queue holds them.
Event = Replaced[object] | Changed[object] | Deleted
