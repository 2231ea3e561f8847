"""The agent's requests in its container need exactly the rules of the ClusterRole."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.apiserver.certificates import Authority
from tests.deploy import objects
from tests.deploy.kubelet import OBJECTS, Kubelet, until
from tests.deploy.objects import Object
from tests.deploy.rbac import SERVICE, Asked, attributes, grants
from tests.deploy.runtime import Container
from tests.e2e.two_node_cluster import TwoNodeCluster
from tests.lab import Lab, clients, servers

RULES: list[Object] = OBJECTS["ClusterRole", "ebpfproxy"]["rules"]
GRANTED = {
    Asked(group, resource, verb)
    for rule in RULES
    for group in rule["apiGroups"]
    for resource in rule["resources"]
    for verb in rule["verbs"]
}
PORT = 7777


class Cluster:
    """An API server on the host of the agent's node, as a control plane."""

    def __init__(self, nodes: TwoNodeCluster) -> None:
        self.nodes = nodes
        self.kubelet = Kubelet(nodes)
        self._count = 0
        servers.start(nodes.w1, "w1", PORT)

    @contextmanager
    def api(self, rules: list[Object], *, pages: bool = False) -> Iterator[tuple[int, Path]]:
        """Yields its port and its folder, which is also that of the service account."""
        self._count += 1
        folder = self.nodes.lab.folder / f"api-{self._count}"
        folder.mkdir()
        Authority(folder).pair("server")
        for name, text in (
            ("token", "the-service-account"),
            ("namespace", "kube-system"),
            ("rules.json", json.dumps(rules)),
            ("backend", self.nodes.w1.address),
            *([("pages", "")] if pages else []),
        ):
            (folder / name).write_text(text)
        command = [sys.executable, "-m", "tests.deploy.rbac", str(folder)]
        process = self.nodes.a.popen(command, join_cgroup=False, stdout=subprocess.PIPE)
        assert process.stdout is not None
        yield int(process.stdout.readline()), folder
        process.kill()
        process.wait()

    def asked(self, folder: Path) -> list[Asked]:
        return [Asked(*json.loads(line)) for line in (folder / "asked.jsonl").read_text().splitlines()]


def watches(agent: Container) -> set[str]:
    status = json.loads(agent.execute("ebpfproxy", "status", "-o", "json"))
    return {watch["state"] for watch in status["agent"]["watches"]}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Lab() as lab:
        yield Cluster(TwoNodeCluster(lab))
        lab.nodes[0].cli("cleanup")


@pytest.mark.root
@pytest.mark.parametrize("pages", [False, True], ids=["streaming lists", "pages"])
def test_service_account_may_do_all_that_the_agent_requests(cluster: Cluster, pages: bool) -> None:
    with cluster.api(RULES, pages=pages) as (port, account):
        agent = cluster.kubelet.container("ebpfproxy", api=port, account=account, manifests=False)
        with cluster.kubelet.running(agent):
            assert cluster.nodes.client.call(clients.ask_tcp, SERVICE, PORT)["name"] == "w1"
            until(lambda: watches(agent) == {"connected"}, 60)
            assert watches(agent) == {"connected"}
            until(lambda: sum(each.verb == "create" for each in cluster.asked(account)) == 2, 60)
        asked = cluster.asked(account)
    assert all(each.granted for each in asked)
    events = [each for each in asked if each.resource == "events"]
    assert events == [Asked("events.k8s.io", "events", "create")] * 2, "the start and the annotation"
    look_up = Asked("", "services", "list", "metadata.name=annotated")
    assert look_up in asked
    verbs = {each._replace(selector="") for each in asked if each not in (look_up, events[0])}
    assert verbs <= GRANTED
    used = {each for each in GRANTED if each.resource != "events"}
    assert verbs == (used if pages else {each for each in used if each.verb == "watch"})
    nodes = {each.selector for each in asked if each.resource == "nodes"}
    assert nodes == {"metadata.name=node-a"}, "only its own"


@pytest.mark.root
@pytest.mark.parametrize("resource", ["services", "endpointslices", "nodes"])
def test_agent_without_permissions_logs_it_and_is_not_ready(cluster: Cluster, resource: str) -> None:
    rules = [rule for rule in RULES if resource not in rule["resources"]]
    with cluster.api(rules) as (port, account):
        agent = cluster.kubelet.container("ebpfproxy", api=port, account=account, manifests=False)
        with cluster.kubelet.running(agent, ready="orbidden") as log:
            assert f'cannot watch resource "{resource}"' in log.read_text()
            assert "programs are attached" not in log.read_text()
            path = objects.container(OBJECTS, "ebpfproxy")["readinessProbe"]["httpGet"]["path"]
            url = f"http://{cluster.nodes.a.address}:10256{path}"
            ask = ["curl", "-s", "-m5", "-o", "/dev/null", "-w", "%{http_code}", url]
            # The API server is asked before the agent itself may be.
            until(lambda: cluster.nodes.a.run(ask, check=False) != "000", 10)
            assert cluster.nodes.a.run(ask) == "503"


@pytest.mark.parametrize(
    ("method", "path", "asked"),
    [
        ("GET", "/api/v1/services?limit=500", ("", "services", "list")),
        ("GET", "/api/v1/services?watch=true", ("", "services", "watch")),
        ("GET", "/api/v1/nodes/n1", ("", "nodes", "get")),
        ("GET", "/apis/discovery.k8s.io/v1/endpointslices", ("discovery.k8s.io", "endpointslices", "list")),
        ("GET", "/api/v1/namespaces/kube-system/secrets/s", ("", "secrets", "get")),
        ("POST", "/apis/events.k8s.io/v1/namespaces/default/events", ("events.k8s.io", "events", "create")),
        ("PATCH", "/api/v1/nodes/n1/status", ("", "nodes", "patch")),
    ],
)
def test_requests_are_parsed_as_by_a_real_server(method: str, path: str, asked: tuple[str, str, str]) -> None:
    found = attributes(method, path)
    assert found is not None
    assert found[:3] == asked
    assert grants(RULES, found) == (Asked(*asked) in GRANTED)
