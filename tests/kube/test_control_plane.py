"""Which address of the control plane a pod uses before Services work."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebpfproxy.kube.control_plane import control_plane, server_of

KUBELET = """
apiVersion: v1
kind: Config
clusters:
- cluster: {certificate-authority-data: eHg=, server: "https://cp.example:6443/"}
  name: kubernetes
- cluster: {server: "https://other:1"}
  name: other
contexts:
- context: {cluster: kubernetes, user: system:node:a}
  name: system:node:a@kubernetes
current-context: system:node:a@kubernetes
users: []
"""
INJECTED = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_PORT_443_TCP_ADDR": "10.96.0.1"}


@pytest.fixture
def kubelet(tmp_path: Path) -> Path:
    path = tmp_path / "kubelet.conf"
    path.write_text(KUBELET)
    return path


def test_kubelets_own_server_comes_before_the_cluster_ip(kubelet: Path) -> None:
    found = control_plane({**INJECTED, "EBPFPROXY_KUBELET_KUBECONFIG": str(kubelet)})
    assert found == ("https://cp.example:6443", str(kubelet))


def test_what_somebody_set_in_the_pod_comes_first(kubelet: Path) -> None:
    environment = {**INJECTED, "EBPFPROXY_KUBELET_KUBECONFIG": str(kubelet)}
    assert control_plane({**environment, "KUBERNETES_SERVICE_HOST": "192.0.2.1"}) is None


def test_without_a_readable_kubeconfig_it_is_what_kubelet_says(tmp_path: Path) -> None:
    assert control_plane({**INJECTED, "EBPFPROXY_KUBELET_KUBECONFIG": str(tmp_path / "none")}) is None


@pytest.mark.parametrize(
    "text",
    ["", "[", "a: [1", "clusters: 7", KUBELET.replace("https://cp", "ftp://cp"), "current-context: x\n"],
)
def test_a_kubeconfig_that_names_no_server_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "kubelet.conf"
    path.write_text(text)
    assert server_of(path) is None
