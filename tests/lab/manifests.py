"""Manifests of Services and EndpointSlices for a lab, as files that are replaced atomically."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from ebpfproxy import yaml_text

Document = dict[str, Any]


def service(name: str, *, namespace: str = "shop", **spec: Any) -> Document:
    """A Service with ``spec`` as in the API; the default is one TCP port 80 named http."""
    body = {"ports": [{"name": "http", "port": 80, "protocol": "TCP"}], **spec}
    if "clusterIPs" in body:
        body["clusterIP"] = body["clusterIPs"][0]
    meta = {"name": name, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": body}


def slice_of(
    name: str,
    endpoints: Iterable[Document],
    *,
    namespace: str = "shop",
    suffix: str = "",
    ports: list[Document] | None = None,
) -> Document:
    """An EndpointSlice, whose addressType is the family of its addresses."""
    found = list(endpoints)
    is_v6 = any(":" in e["addresses"][0] for e in found)
    family = "IPv6" if is_v6 else "IPv4"
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{name}-{family.lower()}{suffix}",
            "namespace": namespace,
            "labels": {"kubernetes.io/service-name": name},
        },
        "addressType": family,
        "ports": ports or [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": found,
    }


def endpoint(address: str, node: str, *, ready: bool = True, terminating: bool = False) -> Document:
    conditions = {"ready": ready, "serving": ready or terminating, "terminating": terminating}
    return {"addresses": [address], "nodeName": node, "conditions": conditions}


def write(path: Path, *documents: Document) -> None:
    """Replaces the file atomically, as an editor or a ConfigMap volume does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}")
    beside.write_text(yaml.dump_all(documents, Dumper=yaml.CSafeDumper))
    beside.rename(path)


def read(path: Path) -> list[Document]:
    """The documents of a file that :func:`write` has written."""
    return yaml_text.load_all(path.read_text())
