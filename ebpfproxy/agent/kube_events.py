"""The Kubernetes events that the agent sends, and the objects that they regard.

| reason | of | level | from |
|---|---|---|---|
| ``Starting`` | Node | Normal | kube-proxy |
| ``FailedToStartProxierHealthcheck``, ``FailedToStartMetricServer`` | Node | Warning | kube-proxy |
| ``FailedToStartServiceHealthcheck`` | Service | Warning | kube-proxy |
| ``DeviceNotAttached`` | Node | Warning | |
| ``DriftRepaired`` | Node | Warning | |
| ``NoRoomForServicePort`` | Service | Warning | |
| ``ValueNotUsed`` | Service, also for what its EndpointSlices have | Warning | every node, but one event |
| ``AddressConflict`` | the Service that does not get the address | Warning | every node, but one event |
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import ebpfproxy
from ebpfproxy.datapath.services.capacity import CapacityError
from ebpfproxy.kube.events.event import KubeEvent, Level, Reference
from ebpfproxy.kube.objects import ObjectKey, Resource
from ebpfproxy.services.model import FrontendKind
from ebpfproxy.services.values import Warning

_KINDS = {
    Resource.SERVICES: "Service",
    Resource.ENDPOINTSLICES: "EndpointSlice",
    Resource.NODES: "Node",
    Resource.SERVICECIDRS: "ServiceCIDR",
}
_START = "StartEbpfProxy"
_CONFLICTS = {str(kind) for kind in FrontendKind}
#: The keys are the names of the servers in ``http``.
_SERVER_REASONS = {
    "healthz": "FailedToStartProxierHealthcheck",
    "metrics": "FailedToStartMetricServer",
}


def starting(node: str) -> KubeEvent:
    return KubeEvent(_node(node), Level.NORMAL, "Starting", _START, f"ebpfproxy {ebpfproxy.__version__}")


def server_not_started(node: str, server: str, error: str) -> KubeEvent:
    """The event of a server that cannot listen: ``healthz`` or ``metrics``."""
    note = f"{server} server failed: {error}"
    return KubeEvent(_node(node), Level.WARNING, _SERVER_REASONS[server], _START, note)


def health_port_not_bound(node: str, service: ObjectKey, port: int, error: str) -> KubeEvent:
    """The event that kube-proxy sends, too (pkg/proxy/healthcheck/service_health.go)."""
    note = f'node {node} failed to start healthcheck "{service}" on port {port}: {error}'
    return KubeEvent(_service(service), Level.WARNING, "FailedToStartServiceHealthcheck", "Listen", note)


def device_not_attached(node: str, failure: str) -> KubeEvent:
    return KubeEvent(_node(node), Level.WARNING, "DeviceNotAttached", "AttachPrograms", failure)


def drift_repaired(node: str, first: Sequence[str], number: int) -> KubeEvent:
    """The event of entries or programs that somebody else has changed; ``first`` of them are named."""
    rest = number - len(first)
    note = "; ".join(first) + (f"; and {rest} more" if rest > 0 else "")
    return KubeEvent(_node(node), Level.WARNING, "DriftRepaired", "RepairMaps", f"node {node}: {note}")


def no_room(node: str, problems: Iterable[CapacityError]) -> list[KubeEvent]:
    """One event for each Service of which ports do not fit into the maps."""
    found: dict[ObjectKey, list[str]] = {}
    for problem in sorted(problems, key=str):
        found.setdefault(ObjectKey(problem.key.namespace, problem.key.name), []).append(str(problem))
    return [
        KubeEvent(
            _service(key),
            Level.WARNING,
            "NoRoomForServicePort",
            "ProgramServicePort",
            f"node {node}: {its[0]}" + (f"; and {len(its) - 1} more of its ports" if its[1:] else ""),
        )
        for key, its in found.items()
    ]


def value_not_used(warning: Warning) -> KubeEvent:
    kind = _KINDS[warning.resource]
    of = f"{kind} {warning.key.name}: " if warning.resource is Resource.ENDPOINTSLICES else ""
    note = f"{of}{warning.field}: {warning.message}"
    reason = "AddressConflict" if warning.field in _CONFLICTS else "ValueNotUsed"
    about = Reference(kind, *warning.key)
    return KubeEvent(about, Level.WARNING, reason, "ReadService", note, of_node=False)


def _node(name: str) -> Reference:
    return Reference("Node", "", name)


def _service(key: ObjectKey) -> Reference:
    return Reference("Service", key.namespace, key.name)
