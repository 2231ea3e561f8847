"""Agents of lab nodes as pods of a stand-in API server, which runs commands on the pod's node."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ebpfproxy.operator.agents import PROGRAM
from tests.apiserver import ApiServer, objects
from tests.apiserver.certificates import Authority
from tests.apiserver.containers import Call
from tests.kube.files import kubeconfig
from tests.lab import LabNode, Pod
from tests.lab.processes import Served

TOKEN = "planted-token-of-the-operator"
Item = dict[str, Any]


def agent_pod(node: LabNode, **status: Any) -> Item:
    ready = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
    return {
        "kind": "Pod",
        "apiVersion": "v1",
        "metadata": {
            "name": f"ebpfproxy-{node.name}",
            "namespace": "kube-system",
            "labels": {"k8s-app": "ebpfproxy"},
            "ownerReferences": [{"kind": "DaemonSet", "name": "ebpfproxy"}],
        },
        "spec": {"nodeName": node.name, "hostNetwork": True, "containers": [{"name": "ebpfproxy"}]},
        "status": status or ready,
    }


def pod_of(pod: Pod) -> Item:
    return {
        "kind": "Pod",
        "apiVersion": "v1",
        "metadata": {"name": pod.name, "namespace": "shop"},
        "spec": {"nodeName": pod.node.name, "containers": [{"name": "app"}]},
        "status": {"phase": "Running", "podIP": pod.address},
    }


@contextmanager
def serving(nodes: list[LabNode], folder: Path) -> Iterator[tuple[ApiServer, Path]]:
    """The server and an operator's kubeconfig, with TLS and a token."""
    authority = Authority(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.pair("server"))
    by_pod = {f"ebpfproxy-{node.name}": node for node in nodes}

    def start(call: Call) -> Served:
        """As in the container, but for the roots."""
        node = by_pod[call.pod]
        assert call.container == "ebpfproxy"
        assert call.command[:1] == list(PROGRAM[:1])
        roots = {"EBPFPROXY_BPF_ROOT": str(node.bpf_root), "EBPFPROXY_CNI_RESULTS": str(node.cni_results)}
        return node.start_command(call.command[1:], stdin=-1, stdout=-1, stderr=-1, environment=roots)

    with ApiServer(tls=context, tokens={TOKEN}) as server:
        server.containers.start = start
        for node in nodes:
            server.store.put("nodes", objects.node(node.name, address=node.address))
            server.cluster.put(agent_pod(node))
            for pod in node.pods:
                server.cluster.put(pod_of(pod))
        files = {"certificate-authority": str(authority.path)}
        yield server, kubeconfig(folder / "operator.conf", server.url, {"token": TOKEN}, **files)
