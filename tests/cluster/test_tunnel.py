"""Pods of other nodes are reached by a VXLAN device, as flannel's backend makes it; the MTU of pods is smaller."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import agents
from tests.cluster.cluster import Cluster
from tests.cluster.web import Web

pytestmark = [pytest.mark.root, pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def tunnelled(folder: Path) -> Iterator[Cluster]:
    with Cluster(folder / "tunnel", tunnel=True) as made:
        made.up()
        made.install_agent()
        yield made


def test_services_are_served_over_a_tunnel(tunnelled: Cluster) -> None:
    """Where pods are reached over VXLAN, a Service answers pods, nodes and hosts outside, in both families."""
    agents.assert_healthy(tunnelled)
    web = Web(tunnelled, ["node-1", "node-2"])
    web.wait()
    web.assert_answers()


def test_tunnel_is_distinguished_from_uplinks_and_pods(tunnelled: Cluster) -> None:
    """``status`` says of each device what it was taken for: both LANs are uplinks, the VXLAN device is a tunnel."""
    for name in tunnelled.agent_pods().values():
        output = tunnelled.kubectl("-n", "kube-system", "exec", name, "--", "ebpfproxy", "status")
        rows = dict(line.split()[:2] for line in output.splitlines() if line.startswith(("eth", "flannel")))
        assert rows == {"eth0": "uplink", "eth1": "uplink", "flannel.1": "tunnel"}
