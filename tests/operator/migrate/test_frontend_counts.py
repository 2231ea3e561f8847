"""The agent's log, status and the migration's plan count frontends in one way."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.e2e.two_node_cluster import TwoNodeCluster
from tests.lab import Lab, manifests

pytestmark = pytest.mark.root


@pytest.fixture
def cluster() -> Iterator[TwoNodeCluster]:
    with Lab() as lab:
        yield TwoNodeCluster(lab)


def test_frontends_are_counted_alike(cluster: TwoNodeCluster) -> None:
    """An address with a port and a protocol is one, in both scopes together. A NodePort is one in each family."""
    manifests.write(
        cluster.manifests / "local.yaml",
        manifests.service(
            "local",
            type="NodePort",
            externalTrafficPolicy="Local",
            clusterIPs=["10.96.0.99"],
            ports=[{"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30999}],
        ),
        manifests.slice_of("local", [manifests.endpoint(cluster.w1.address, "node-a")]),
    )
    agent = cluster.agent().start()
    logged = re.findall(r"programmed all Services .* frontends=(\d+)", agent.text)
    shown = json.loads(cluster.a.cli("status", "-o", "json"))["frontends"]
    planned = json.loads(cluster.a.cli("migrate", "plan", "-o", "json", check=False))["agent_frontends"]
    listed = {row["frontend"] for row in json.loads(cluster.a.cli("service", "list", "-o", "json"))}
    agent.stop()
    assert (logged, shown, planned) == ([str(len(listed))], len(listed), len(listed))
    assert {"0.0.0.0:30999/TCP", "0.0.0.0:30080/TCP", "[::]:30080/TCP"} <= listed
