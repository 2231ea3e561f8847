"""The agents of a cluster, inspected by ``ebpfproxy status`` in their pods."""

from __future__ import annotations

import json
from typing import Any

from tests.cluster.cluster import Cluster

Object = dict[str, Any]


def execute(cluster: Cluster, pod: str, *command: str) -> str:
    """Runs a command in the agent's container."""
    return cluster.kubectl("-n", "kube-system", "exec", pod, "-c", "ebpfproxy", "--", *command)


def statuses(cluster: Cluster) -> dict[str, Object]:
    """Returns the output of ``ebpfproxy status -o json`` by node."""
    return {
        node: json.loads(execute(cluster, pod, "ebpfproxy", "status", "-o", "json"))
        for node, pod in cluster.agent_pods().items()
    }


def assert_healthy(cluster: Cluster) -> dict[str, Object]:
    """Asserts that each node has a healthy agent without problems; returns their statuses."""
    found = statuses(cluster)
    assert sorted(found) == sorted(each["metadata"]["name"] for each in cluster.get("nodes")["items"])
    for status in found.values():
        assert status["problems"] == []
        assert status["healthy"]
        assert {watch["state"] for watch in status["agent"]["watches"]} == {"connected"}
    return found
