"""``ebpfproxy test`` in a cluster of two lab nodes with real agents, whose pods run in network namespaces."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.lab import Lab
from tests.lab.waiting import until
from tests.operator.test.lab_cluster import LabCluster

pytestmark = pytest.mark.root

_DROP = "add table inet t; add chain inet t f { type filter hook forward priority 0; }; add rule inet t f udp dport 8080 drop"


@pytest.fixture(scope="module")
def cluster() -> Iterator[LabCluster]:
    with Lab() as lab:
        made = LabCluster(lab)
        yield made
        made.stop()


def has_sctp() -> bool:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP).close()
    except OSError:
        return False
    return True


def assert_nothing_is_left(cluster: LabCluster) -> None:
    until(lambda: cluster.left() == [], f"the test has left {cluster.left()}")


def test_all_checks_pass_and_nothing_is_left(cluster: LabCluster) -> None:
    done = cluster.run("--restart", "-o", "json")
    assert done.code == 0, done.output + done.errors
    found: dict[str, Any] = json.loads(done.output)
    assert found["good"]
    rows = {(row["check"], row["protocol"], row["family"]): row["result"] for row in found["rows"]}
    expected = {("agent restart under load", "", ""): "passed"}
    for check, protocols in (
        ("headless, direct", ["TCP"]),
        ("ClusterIP", ["TCP", "UDP"]),
        ("NodePort", ["TCP", "UDP"]),
        ("session affinity", ["TCP"]),
        ("internalTrafficPolicy Local", ["TCP", "UDP"]),
        ("externalTrafficPolicy Local", ["TCP", "UDP"]),
        ("hairpin", ["TCP", "UDP"]),
    ):
        expected |= {(check, p, f): "passed" for p in protocols for f in ("IPv4", "IPv6")}
    families = ("IPv4", "IPv6") if has_sctp() else ("",)
    result = "passed" if has_sctp() else "skipped"
    expected |= {(check, "SCTP", f): result for check in ("ClusterIP", "NodePort") for f in families}
    assert rows == expected
    assert "agent of node-a restarted" in done.errors
    assert "agent of node-b restarted" in done.errors
    assert_nothing_is_left(cluster)


def test_failures_say_what_was_asked_from_where_and_what_came(cluster: LabCluster) -> None:
    """node-b drops UDP to its pods: what its own server must answer fails, with the command that explains more."""
    cluster.nodes["node-b"].run(["nft", _DROP])
    try:
        done = cluster.run("-o", "junit")
    finally:
        cluster.nodes["node-b"].run(["nft", "delete table inet t"])
    assert done.code == 1, done.output + done.errors
    cases = {case.get("name"): case for case in ElementTree.fromstring(done.output)}
    failure = cases["internalTrafficPolicy Local UDP IPv4"].find("failure")
    assert failure is not None
    sentence, explain = str(failure.text).splitlines()[:2]
    assert re.fullmatch(
        r"pod client-2 on node-b asked Service local at 10\.96\.200\.\d+:80/UDP and expected an answer of server-2,"
        r" but: no answer came in time\.",
        sentence,
    )
    assert re.fullmatch(
        r"  kubectl -n kube-system exec ebpfproxy-\d+ -- ebpfproxy explain ebpfproxy-test/client-2 10\.96\.200\.\d+:80"
        r" --protocol UDP",
        explain,
    )
    assert cases["ClusterIP TCP IPv4"].find("failure") is None
    assert_nothing_is_left(cluster)


def test_interrupted_test_removes_everything(cluster: LabCluster) -> None:
    done = cluster.run(interrupt_at=2)
    assert (done.code, done.output) == (2, "")
    assert done.errors.splitlines()[-2:] == ["namespace ebpfproxy-test removed", "Error: interrupted"]
    assert_nothing_is_left(cluster)


def test_kept_namespace_of_one_node_is_not_touched_by_the_next_test(cluster: LabCluster) -> None:
    """An only node has two servers, and no client on another node; pods that are kept go on running."""
    done = cluster.run("--node", "node-a", "--keep")
    assert done.code == 0, done.output + done.errors
    assert "skipped: clients on other nodes need a second node" in done.output
    assert done.output.endswith("Services work: 1 node\n")
    pods = cluster.pods("ebpfproxy-test")
    assert sorted(each["metadata"]["name"] for each in pods) == ["client-1", "host-1", "server-1", "server-2"]
    done = cluster.run()
    assert (done.code, done.output) == (2, "")
    assert "namespace ebpfproxy-test exists" in done.errors
    assert cluster.pods("ebpfproxy-test") == pods
