"""``ebpfproxy test --manifests``: the Services of an agent without a cluster, asked from its node."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.lab import Lab, LabNode, Pod, manifests, servers
from tests.lab.manifests import endpoint, service, slice_of

pytestmark = pytest.mark.root

IP, IP6, NODE_PORT = "10.96.0.10", "fd00:10:96::10", 30080
PORTS = [
    {"name": "http", "port": 80, "protocol": "TCP", "nodePort": NODE_PORT},
    {"name": "udp", "port": 53, "protocol": "UDP", "nodePort": 30053},
]
SLICE_PORTS = [{**each, "port": 8080} for each in PORTS]


class ManifestNode(NamedTuple):
    node: LabNode
    web: list[Pod]
    folder: Path


@pytest.fixture(scope="module")
def manifest_node() -> Iterator[ManifestNode]:
    with Lab() as lab:
        node = lab.node("node-a")
        web = [node.pod("web-1"), node.pod("web-2")]
        for pod in web:
            servers.start(pod, pod.name, 8080)
        folder = lab.folder / "manifests"
        manifests.write(
            folder / "services.yaml",
            service("web", clusterIPs=[IP, IP6], ports=PORTS, type="NodePort"),
            slice_of("web", [endpoint(pod.address, "node-a") for pod in web], ports=SLICE_PORTS),
            slice_of("web", [endpoint(pod.address6, "node-a") for pod in web], ports=SLICE_PORTS),
            service("sticky", clusterIPs=["10.96.0.20"], sessionAffinity="ClientIP"),
            slice_of("sticky", [endpoint(pod.address, "node-a") for pod in web]),
            service("empty", clusterIPs=["10.96.0.30"], ports=PORTS),
            service("headless", clusterIPs=["None"]),
            service("elsewhere", clusterIPs=["10.96.0.40"], internalTrafficPolicy="Local"),
            slice_of("elsewhere", [endpoint("10.244.9.9", "node-z")]),
        )
        node.agent(manifests=folder).start()
        yield ManifestNode(node, web, folder)


def run(manifest_node: ManifestNode, folder: Path) -> tuple[int, dict[str, Any]]:
    words = ["test", "--manifests", str(folder), "-o", "json", "--bpf-root", str(manifest_node.node.bpf_root)]
    done = manifest_node.node.run_command(words)
    assert done.errors == ""
    return done.code, json.loads(done.output)


def test_services_of_the_folder_work(manifest_node: ManifestNode) -> None:
    code, found = run(manifest_node, manifest_node.folder)
    assert code == 0, found
    assert {(row["check"], row["protocol"], row["family"]) for row in found["rows"]} == {
        *(("ClusterIP", protocol, family) for protocol in ("TCP", "UDP") for family in ("IPv4", "IPv6")),
        *(("NodePort", protocol, family) for protocol in ("TCP", "UDP") for family in ("IPv4", "IPv6")),
        ("session affinity", "TCP", "IPv4"),
        ("without endpoints", "TCP", "IPv4"),
        ("without endpoints", "UDP", "IPv4"),
    }


def test_each_difference_is_a_sentence(manifest_node: ManifestNode, tmp_path: Path) -> None:
    """The agent serves other endpoints than these files name, and one Service of them not at all."""
    silent = manifest_node.web[0].address
    manifests.write(
        tmp_path / "services.yaml",
        service("web", clusterIPs=[IP]),
        slice_of("web", [endpoint("10.244.1.99", "node-a")]),
        service("empty", clusterIPs=["10.96.0.30"]),
        slice_of(
            "empty", [endpoint(silent, "node-a")], ports=[{"name": "http", "port": 9, "protocol": "TCP"}]
        ),
        service("sticky", clusterIPs=["10.96.0.20"]),
    )
    code, found = run(manifest_node, tmp_path)
    assert code == 1
    failures = [each for row in found["rows"] for each in row["failures"]]
    sentences = sorted(each["sentence"] for each in failures)
    assert sentences[0] == (
        f"node-a itself asked Service shop/empty:http at 10.96.0.30:80/TCP and expected a connection to {silent}:9,"
        f" but: Connection refused (ECONNREFUSED); nor can {silent}:9 be reached directly."
    )
    assert sentences[1] == (
        "node-a itself asked Service shop/sticky:http at 10.96.0.20:80/TCP and expected no connection, as no endpoint"
        " may be used, but: it was connected."
    )
    assert sentences[2].startswith(
        f"node-a itself asked Service shop/web:http at {IP}:80/TCP and expected a connection to 10.244.1.99:8080, but:"
        " it was connected to 10.244.1."
    )
    explain = {each["explain"] for each in failures}
    assert f"ebpfproxy explain host {IP}:80 --protocol TCP" in explain


def test_unreadable_file_is_no_result(manifest_node: ManifestNode, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("apiVersion: v1\nkind: Service\nspec: 1\n")
    words = ["test", "--manifests", str(tmp_path), "--bpf-root", str(manifest_node.node.bpf_root)]
    done = manifest_node.node.run_command(words)
    assert (done.code, done.output) == (2, "")
    assert "a.yaml: document 1, Service" in done.errors
    (tmp_path / "a.yaml").write_text("")
    done = manifest_node.node.run_command(words)
    assert (done.code, done.output) == (2, "")
    assert "no Service has an address" in done.errors
