"""Where the control plane is before Services work: what a pod is told is the cluster IP of one.

In this order, in a pod with a service account:

1. ``KUBERNETES_SERVICE_HOST``, where somebody set it in the pod: kubelet then still says otherwise in
   ``KUBERNETES_PORT_443_TCP_ADDR``.
2. The server in kubelet's own kubeconfig, where the pod can read it (kubeadm: /etc/kubernetes/kubelet.conf;
   override: ``EBPFPROXY_KUBELET_KUBECONFIG``): kubelet has to reach it without Services, too.
3. What kubelet says: it works where something else serves that cluster IP, such as a kube-proxy beside us.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec
import yaml

KUBELET_KUBECONFIG = Path("/etc/kubernetes/kubelet.conf")


class _Cluster(msgspec.Struct):
    server: str = ""


class _NamedCluster(msgspec.Struct):
    name: str
    cluster: _Cluster


class _Context(msgspec.Struct):
    cluster: str = ""


class _NamedContext(msgspec.Struct):
    name: str
    context: _Context


class _Kubeconfig(msgspec.Struct, rename="kebab"):
    clusters: tuple[_NamedCluster, ...] = ()
    contexts: tuple[_NamedContext, ...] = ()
    current_context: str = ""


def control_plane(environment: Mapping[str, str] = os.environ) -> tuple[str, str] | None:
    """The URL to ask, and where it is from; None for the service account's own."""
    host = environment.get("KUBERNETES_SERVICE_HOST", "")
    if host and host != environment.get("KUBERNETES_PORT_443_TCP_ADDR", host):
        return None
    path = Path(environment.get("EBPFPROXY_KUBELET_KUBECONFIG", str(KUBELET_KUBECONFIG)))
    server = server_of(path)
    return (server, str(path)) if server else None


def server_of(path: Path) -> str | None:
    """The server of a kubeconfig's current context; None where it cannot be read, or names none."""
    try:
        document = yaml.safe_load(path.read_bytes())
        found = msgspec.convert(document, _Kubeconfig)
    except (OSError, ValueError, yaml.YAMLError, msgspec.ValidationError):
        return None
    contexts = {each.name: each.context.cluster for each in found.contexts}
    clusters = {each.name: each.cluster.server for each in found.clusters}
    server = clusters.get(contexts.get(found.current_context, ""), "")
    return server.rstrip("/") if server.startswith(("https://", "http://")) else None
