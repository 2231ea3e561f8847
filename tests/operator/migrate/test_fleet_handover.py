"""Migration and rollback of two nodes by one command, while clients on both send requests and keep connections."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ebpfproxy.datapath.kernel.roots import pin_folder
from tests.lab import Lab, command, manifests, waiting
from tests.lab.spaces import OWN
from tests.operator.migrate import control_plane, rules
from tests.operator.migrate.control_plane import ControlPlane, serving
from tests.operator.migrate.kube_proxy_cluster import KubeProxyCluster, broken, cluster_objects
from tests.operator.migrate.kubelet import LabKubelet
from tests.operator.migrate.traffic import LongConnection, RequestLoad, no_request_fails

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]

NAMES = ["node-a1", "node-b1"]


class Cluster(KubeProxyCluster):
    """A cluster of two nodes with kube-proxy of a DaemonSet, in one mode: ``test_handover`` has all of them on a node."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.client_b = self.b.pod("client-b")
        self.plane = ControlPlane(LabKubelet([self.a, self.b], self.manifests, "nftables"), *NAMES)
        self.plane.put(control_plane.kube_proxy())
        self.wait_pods("kube-proxy")
        self.url = ""

    def write(self) -> None:
        """Removes hints and internal traffic policies, because both nodes load the rules of one node."""
        documents = cluster_objects()
        for each in documents:
            each.get("spec", {}).pop("internalTrafficPolicy", None)
            for endpoint in each.get("endpoints") or ():
                endpoint.pop("hints", None)
        manifests.write(self.manifests / "cluster.yaml", *documents)

    def start_agents(self) -> None:
        self.plane.put(control_plane.agent())
        self.wait_pods("ebpfproxy")

    def wait_pods(self, owner: str) -> None:
        def ready() -> bool:
            found = [pod for name in NAMES for pod in self.plane.pods(owner, name)]
            return len(found) == len(NAMES) and all(pod["status"]["phase"] == "Running" for pod in found)

        waiting.until(ready, f"no pods of {owner}", 60)

    def call(self, *arguments: str) -> command.Done:
        """Runs the command as an operator does, in a process outside of the nodes."""
        command.import_commands()
        return OWN.call(command.run, ["migrate", *arguments, "--master", self.url], timeout=200)

    def good(self, *arguments: str) -> str:
        """Returns the output of a command that exits with 0."""
        done = self.call(*arguments)
        assert done.code == 0, done.output + done.errors
        print(f"$ ebpfproxy migrate {' '.join(arguments)}\n{done.output}")
        return done.output

    def all_connections(self) -> list[LongConnection]:
        targets = [
            (self.client_b, "tcp", rules.ORDERS, 80),
            (self.client_b, "udp", rules.DNS, 53),
            (self.b, "tcp", rules.ORDERS, 80),
            (self.outside, "tcp", self.b.address, rules.PAYMENTS_NODE_PORT),
        ]
        return [*self.connections(), *(LongConnection(*target) for target in targets for _ in range(3))]

    def socket_loads(self) -> list[RequestLoad]:
        return [
            *self.loads()[:2],
            RequestLoad(self.client_b, "tcp", rules.ORDERS, 80),
            RequestLoad(self.client_b, "udp", rules.DNS, 53),
        ]

    def all_loads(self) -> list[RequestLoad]:
        outside = RequestLoad(self.outside, "tcp", self.b.address, rules.PAYMENTS_NODE_PORT)
        return [*self.socket_loads(), *self.loads()[2:], outside]

    def leftovers(self) -> list[tuple[bool, bool]]:
        """Returns for each node if rules of kube-proxy exist, and if conntrack is kept enabled."""
        found = [self.leftovers_on(node) for node in (self.a, self.b)]
        return [(has_rules, bool(hold)) for has_rules, hold in found]


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    with Lab() as lab:
        created = Cluster(lab)
        with serving(created.plane) as created.url:
            yield created


def test_migration_and_rollback_of_two_nodes_under_load_keep_long_connections() -> None:
    with running_cluster() as cluster:
        rejected = cluster.call("plan", "--all-nodes", "--image", "x")
        assert rejected.code == 1
        assert "node-a1: nothing is pinned below /host/bpf/ebpfproxy: no agent has run" in rejected.output, (
            rejected.output + rejected.errors
        )
        connections = cluster.all_connections()
        assert broken(connections) == {}
        with no_request_fails(*cluster.all_loads()):
            cluster.start_agents()
            planned = json.loads(cluster.good("plan", "--all-nodes", "-o", "json"))
            for each in planned["nodes"]:
                assert (each["state"], each["blockers"]) == ("to do", []), each
                assert each["found"]["kube_proxy_frontends"] == 20
                assert list(each["found"]["processes"].values()) == ["process"]
            cluster.good("plan", "--all-nodes")
            cluster.good("run", "--all-nodes")
        assert broken(connections) == {}
        assert cluster.leftovers() == [(False, True)] * 2
        assert cluster.plane.restarted == []
        assert not any(cluster.plane.pods("kube-proxy", name) for name in NAMES)
        again = cluster.good("run", "--all-nodes")
        assert "node-a1: done already" in again
        assert "node-b1: done already" in again

        agent_connections = [
            LongConnection(client, "tcp", rules.ORDERS, 80) for client in (cluster.client, cluster.client_b)
        ]
        with no_request_fails(*cluster.socket_loads()):
            output = cluster.good("rollback", "--all-nodes")
        assert output.count("waiting for the agent to end") == 2
        assert broken([*connections, *agent_connections]) == {}
        assert cluster.leftovers() == [(True, False)] * 2
        assert not any(pin_folder(node.bpf_root).exists() for node in (cluster.a, cluster.b))
        assert not any(cluster.plane.pods("ebpfproxy", name) for name in NAMES)
