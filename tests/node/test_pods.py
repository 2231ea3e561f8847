"""Names of pods in libcni's cache; the file is of containerd 2.1, shortened."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ebpfproxy.node.pod_names import Pod, pods

CACHED = {
    "kind": "cniCacheV1",
    "containerId": "08c1abc7565e1360dddc9f8a0f540d93d9726925a438e5595fbcaedec3fe2dda",
    "config": "e30=",
    "ifName": "eth0",
    "networkName": "pods",
    "cniArgs": [
        ["K8S_POD_NAME", "client-7f"],
        ["K8S_POD_INFRA_CONTAINER_ID", "08c1abc7565e1360dddc9f8a0f540d93d9726925a438e5595fbcaedec3fe2dda"],
        ["K8S_POD_UID", "6505b72a-dcd3-446d-beef-3d84af95c9e5"],
        ["IgnoreUnknown", "1"],
        ["K8S_POD_NAMESPACE", "shop"],
    ],
    "capabilityArgs": {"dns": {"Servers": ["10.96.0.10"]}},
    "result": {
        "cniVersion": "0.3.1",
        "dns": {},
        "interfaces": [
            {"mac": "9a:00:00:00:00:01", "name": "cni0"},
            {"mac": "9a:00:00:00:00:02", "name": "eth0", "sandbox": "/var/run/netns/cni-210dcecb"},
        ],
        "ips": [{"address": "10.244.0.7/24", "interface": 1, "version": ""}],
    },
}


def test_a_pod_is_named_with_its_network_namespace(tmp_path: Path) -> None:
    (tmp_path / "pods-08c1-eth0").write_text(json.dumps(CACHED))
    assert list(pods(tmp_path)) == [Pod("shop", "client-7f", "cni-210dcecb")]


def test_what_is_no_result_of_a_pod_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("{")
    (tmp_path / "b").write_text("[]")
    (tmp_path / "c").write_text(json.dumps({**CACHED, "cniArgs": None}))
    (tmp_path / "d").write_text(json.dumps({**CACHED, "result": None}))
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    assert list(pods(tmp_path)) == []
    assert list(pods(tmp_path / "nowhere")) == []
