"""Objects of realistic size, with managedFields, conditions and other unused fields."""

from __future__ import annotations

import uuid
from typing import Any

_SERVICE_FIELDS: dict[str, Any] = {
    "f:metadata": {"f:labels": {".": {}, "f:app": {}}},
    "f:spec": {
        "f:clusterIP": {},
        "f:internalTrafficPolicy": {},
        "f:ports": {
            ".": {},
            'k:{"port":80,"protocol":"TCP"}': {
                ".": {},
                "f:name": {},
                "f:port": {},
                "f:protocol": {},
                "f:targetPort": {},
            },
        },
        "f:selector": {},
        "f:sessionAffinity": {},
        "f:type": {},
    },
}
_SLICE_FIELDS: dict[str, Any] = {
    "f:addressType": {},
    "f:endpoints": {},
    "f:metadata": {
        "f:annotations": {".": {}, "f:endpoints.kubernetes.io/last-change-trigger-time": {}},
        "f:generateName": {},
        "f:labels": {
            ".": {},
            "f:app": {},
            "f:endpointslice.kubernetes.io/managed-by": {},
            "f:kubernetes.io/service-name": {},
        },
        "f:ownerReferences": {".": {}, 'k:{"uid":"24e9c3df-d594-43ae-9d3c-64dac4256ab8"}': {}},
    },
    "f:ports": {},
}
_NODE_FIELDS: dict[str, Any] = {
    "f:status": {
        "f:addresses": {".": {}, 'k:{"type":"InternalIP"}': {".": {}, "f:address": {}, "f:type": {}}},
        "f:allocatable": {".": {}, "f:cpu": {}, "f:memory": {}},
        "f:capacity": {".": {}, "f:cpu": {}, "f:memory": {}},
    }
}


def _managed(manager: str, api_version: str, fields: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "manager": manager,
            "operation": "Update",
            "apiVersion": api_version,
            "time": "2026-11-20T23:45:46Z",
            "fieldsType": "FieldsV1",
            "fieldsV1": fields,
        }
    ]


def _uid(*of: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join(of)))


def service(name: str, address: str, *, namespace: str = "load", **spec: Any) -> dict[str, Any]:
    ports = [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080}]
    return {
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": _uid("service", namespace, name),
            "creationTimestamp": "2026-11-20T23:45:46Z",
            "labels": {"app": name},
            "managedFields": _managed("kubectl", "v1", _SERVICE_FIELDS),
        },
        "spec": {
            "ports": ports,
            "selector": {"app": name},
            "clusterIP": address,
            "clusterIPs": [address],
            "type": "ClusterIP",
            "sessionAffinity": "None",
            "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack",
            "internalTrafficPolicy": "Cluster",
            **spec,
        },
        "status": {"loadBalancer": {}},
    }


def endpoint(address: str, node: str, *, ready: bool = True) -> dict[str, Any]:
    return {
        "addresses": [address],
        "conditions": {"ready": ready, "serving": ready, "terminating": False},
        "targetRef": {
            "kind": "Pod",
            "namespace": "load",
            "name": f"pod-{address.replace('.', '-').replace(':', '-')}",
            "uid": "13fb15b2-375d-4f12-a448-4c11199eea5e",
        },
        "nodeName": node,
        "zone": "zone-a",
    }


def endpoint_slice(
    service_name: str,
    endpoints: list[dict[str, Any]],
    *,
    namespace: str = "load",
    suffix: str = "x7k2p",
    trigger: str | None = None,
    port: int = 8080,
) -> dict[str, Any]:
    annotations = {"endpoints.kubernetes.io/last-change-trigger-time": trigger} if trigger else {}
    return {
        "metadata": {
            "name": f"{service_name}-{suffix}",
            "generateName": f"{service_name}-",
            "namespace": namespace,
            "uid": _uid("slice", namespace, service_name, suffix),
            "generation": 3,
            "creationTimestamp": "2026-11-20T23:45:46Z",
            "labels": {
                "app": service_name,
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                "kubernetes.io/service-name": service_name,
            },
            "annotations": annotations,
            "ownerReferences": [
                {
                    "apiVersion": "v1",
                    "kind": "Service",
                    "name": service_name,
                    "uid": _uid("service", namespace, service_name),
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
            "managedFields": _managed("kube-controller-manager", "discovery.k8s.io/v1", _SLICE_FIELDS),
        },
        "addressType": "IPv6" if endpoints and ":" in endpoints[0]["addresses"][0] else "IPv4",
        "endpoints": endpoints,
        "ports": [{"name": "http", "protocol": "TCP", "port": port}],
    }


def node(name: str, zone: str = "zone-a", *, address: str = "172.18.0.1") -> dict[str, Any]:
    labels = {
        "kubernetes.io/hostname": name,
        "kubernetes.io/os": "linux",
        "topology.kubernetes.io/region": "r1",
        "topology.kubernetes.io/zone": zone,
    }
    return {
        "metadata": {
            "name": name,
            "uid": _uid("node", name),
            "creationTimestamp": "2026-11-20T23:45:46Z",
            "labels": labels,
            "annotations": {"node.alpha.kubernetes.io/ttl": "0"},
            "managedFields": _managed("kubelet", "v1", _NODE_FIELDS),
        },
        "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"]},
        "status": {
            "capacity": {"cpu": "4", "memory": "8Gi"},
            "allocatable": {"cpu": "4", "memory": "8Gi"},
            "addresses": [
                {"type": "InternalIP", "address": address},
                {"type": "Hostname", "address": name},
            ],
            "nodeInfo": {"kubeletVersion": "v1.36.2", "operatingSystem": "linux"},
        },
    }


def service_address(i: int) -> str:
    """Returns the cluster IP of load Service ``i``."""
    return f"10.{96 + i // 65000}.{i % 65000 // 250}.{i % 250 + 1}"


def pod_address(i: int) -> str:
    """Returns a unique address for every ``i`` up to ten million."""
    return f"{11 + i // 15_000_000}.{i // 62500 % 240 + 1}.{i // 250 % 250}.{i % 250 + 1}"
