"""``ebpfproxy test`` in a cluster without kube-proxy."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.cluster import images
from tests.cluster.cluster import Cluster

pytestmark = [pytest.mark.root, pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def installed(cluster: Cluster) -> Iterator[Cluster]:
    cluster.ebpfproxy("install", "--image", images.AGENT)
    yield cluster
    cluster.uninstall_agent()


def test_all_checks_pass_also_while_agents_restart(installed: Cluster) -> None:
    """``ebpfproxy test --restart`` passes from pods and nodes in both families, and its namespace is gone afterwards."""
    done = installed.ebpfproxy("test", "--restart", "-o", "json")
    found = json.loads(done)
    rows = {(row["check"], row["protocol"], row["family"]): row["result"] for row in found["rows"]}
    assert {key for key, result in rows.items() if result != "passed" and key[1] != "SCTP"} == set()
    assert {key[2] for key in rows} >= {"IPv4", "IPv6"}
    assert not installed.succeeds("kubectl", "get", "namespace", "ebpfproxy-test")
