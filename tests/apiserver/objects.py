"""Objects of a real one's size: managedFields, conditions and all that nobody here reads."""

from __future__ import annotations

from typing import Any

_FIELDS: dict[str, Any] = {
    "f:metadata": {"f:labels": {".": {}, "f:app": {}}},
    "f:spec": {"f:ports": {".": {}}, "f:type": {}},
}


def _managed(manager: str) -> list[dict[str, Any]]:
    entry = {
        "manager": manager,
        "operation": "Update",
        "apiVersion": "v1",
        "time": "2026-11-20T23:45:46Z",
        "fieldsType": "FieldsV1",
        "fieldsV1": _FIELDS,
    }
    return [entry, {**entry, "manager": "kube-controller-manager"}]


def service(name: str, address: str, *, namespace: str = "load", **spec: Any) -> dict[str, Any]:
    ports = [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080}]
    return {
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": f"00000000-0000-4000-8000-{abs(hash(name)) % 10**12:012}",
            "creationTimestamp": "2026-11-20T23:45:46Z",
            "labels": {"app": name},
            "managedFields": _managed("kubectl"),
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
            "uid": "aa76f4eb-42f6-4fc6-bee7-5436926cd851",
            "generation": 3,
            "creationTimestamp": "2026-11-20T23:45:46Z",
            "labels": {
                "app": service_name,
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                "kubernetes.io/service-name": service_name,
            },
            "annotations": annotations,
            "ownerReferences": [
                {"apiVersion": "v1", "kind": "Service", "name": service_name, "controller": True}
            ],
            "managedFields": _managed("kube-controller-manager"),
        },
        "addressType": "IPv6" if endpoints and ":" in endpoints[0]["addresses"][0] else "IPv4",
        "endpoints": endpoints,
        "ports": [{"name": "http", "protocol": "TCP", "port": port}],
    }


def node(name: str, zone: str = "zone-a") -> dict[str, Any]:
    return {
        "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}},
        "spec": {"podCIDRs": ["10.244.1.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": "172.18.0.1"}]},
    }


def service_address(i: int) -> str:
    """The cluster IP of load Service ``i``."""
    return f"10.{96 + i // 65000}.{i % 65000 // 250}.{i % 250 + 1}"


def pod_address(i: int) -> str:
    """Another address for every ``i`` up to ten million."""
    return f"{11 + i // 15_000_000}.{i // 62500 % 240 + 1}.{i // 250 % 250}.{i % 250 + 1}"
