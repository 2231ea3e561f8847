"""Two nodes, the rules of a real kube-proxy on the first, its Services, and clients with long connections."""

from __future__ import annotations

import json
import time
from pathlib import Path

from ebpfproxy.kube.objects import Resource
from ebpfproxy.operator.migrate.node import conntrack_hold, hold_chains, leftovers
from tests import recordings
from tests.lab import Agent, Lab, LabNode, Outside, Pod, manifests, servers
from tests.lab.spaces import Space
from tests.operator.migrate import rules, rules_ipv6
from tests.operator.migrate.commands import Migration
from tests.operator.migrate.traffic import LongConnection, RequestLoad, no_request_fails

_KINDS = {
    Resource.SERVICES: ("v1", "Service"),
    Resource.ENDPOINTSLICES: ("discovery.k8s.io/v1", "EndpointSlice"),
    Resource.NODES: ("v1", "Node"),
}
#: Endpoints of shop/orders-api and of DNS listen on these ports.
TARGET_PORT, DNS_PORT = 8080, 53
#: These tables keep netfilter's conntrack enabled after a migration.
CONNTRACK_HOLD = [f"nftables table {family} {hold_chains.NAME}" for family in ("ip", "ip6")]


#: Client, protocol, host and port.
Target = tuple[Space, str, str, int]


class KubeProxyCluster(Migration):
    """With ``dual_stack`` Services, endpoints and rules have both address families."""

    def __init__(self, lab: Lab, *, dual_stack: bool = False) -> None:
        self.lab = lab
        self.dual_stack = dual_stack
        self.a: LabNode = lab.node("node-a1")
        self.b: LabNode = lab.node("node-b1")
        self.w1: Pod = self.a.pod("w1")
        self.w2: Pod = self.b.pod("w2")
        self.client: Pod = self.a.pod("client")
        assert (self.w1.address, self.w2.address) == (rules.W1, rules.W2)
        for pod in (self.w1, self.w2):
            servers.start(pod, pod.name, TARGET_PORT, DNS_PORT)
        self.outside: Outside = lab.outside
        self.manifests: Path = lab.folder / "manifests"
        self.write()

    def agent(self, *arguments: str) -> Agent:
        return self.a.agent(*arguments, manifests=self.manifests)

    def write(self) -> None:
        manifests.write(self.manifests / "cluster.yaml", *self._documents())

    def _documents(self) -> list[manifests.Document]:
        return rules_ipv6.both_families(cluster_objects()) if self.dual_stack else cluster_objects()

    def remove_service(self, namespace: str, name: str) -> None:
        kept = [
            each
            for each in self._documents()
            if (each["metadata"].get("namespace"), each["metadata"]["name"]) != (namespace, name)
        ]
        manifests.write(self.manifests / "cluster.yaml", *kept)

    def wait_frontends(self, count: int) -> None:
        """Waits until the maps hold ``count`` frontends; all addresses of a NodePort count as one."""
        deadline = time.monotonic() + 60
        while len(frontends := self._frontends()) != count:
            assert time.monotonic() < deadline, sorted(frontends)
            time.sleep(0.2)

    def _frontends(self) -> set[str]:
        rows = json.loads(self.a.cli("service", "list", "-o", "json"))
        return {
            row["frontend"].rpartition(":")[2] if row["type"] == "NodePort" else row["frontend"]
            for row in rows
        }

    def kube_proxy(self, mode: str) -> None:
        """Loads the rules of kube-proxy on node-a1."""
        if self.dual_stack:
            self.a.call(rules_ipv6.load, mode)
        else:
            self.a.call(_load_rules, mode)

    @staticmethod
    def leftovers_on(node: LabNode) -> tuple[bool, list[str]]:
        """Returns if rules of kube-proxy exist on a node, and which objects keep conntrack enabled."""
        return node.call(_leftovers)

    def drain_fails_no_request(self, address: str) -> None:
        """Rolls back with --drain, while clients outside use NodePorts of ``address``. The agent has to be stopped."""
        outside = [RequestLoad(self.outside, "tcp", address, rules.PAYMENTS_NODE_PORT)]
        outside.append(RequestLoad(self.outside, "udp", address, rules.DNS_NODE_PORT))
        with no_request_fails(*outside):
            rollback = self.start_migrate("rollback", "--drain", "20s")
            time.sleep(3)
            assert rollback.poll() is None, "the long connections of the loads are still open"
        assert rollback.wait(20) == 0
        with no_request_fails(RequestLoad(self.outside, "tcp", address, rules.PAYMENTS_NODE_PORT)):
            time.sleep(1)

    def connections(self) -> list[LongConnection]:
        """Opens five per target, because kube-proxy selects endpoints at random."""
        targets: list[Target] = [
            (self.client, "tcp", rules.ORDERS, 80),
            (self.client, "tcp", rules.PAYMENTS, 3001),
            (self.client, "udp", rules.DNS, 53),
            (self.a, "tcp", rules.ORDERS, 80),
            (self.a, "udp", rules.DNS, 53),
            (self.outside, "tcp", self.a.address, rules.PAYMENTS_NODE_PORT),
            (self.outside, "udp", self.a.address, rules.DNS_NODE_PORT),
        ]
        return [LongConnection(*target) for target in self._of_families(targets) for _ in range(5)]

    def loads(self) -> list[RequestLoad]:
        targets: list[Target] = [
            (self.client, "tcp", rules.ORDERS, 80),
            (self.client, "udp", rules.DNS, 53),
            (self.outside, "tcp", self.a.address, rules.PAYMENTS_NODE_PORT),
            (self.outside, "udp", self.a.address, rules.DNS_NODE_PORT),
        ]
        return [RequestLoad(*target) for target in self._of_families(targets)]

    def _of_families(self, targets: list[Target]) -> list[Target]:
        if not self.dual_stack:
            return targets
        return targets + [
            (space, kind, rules_ipv6.address(host), port) for space, kind, host, port in targets
        ]


def cluster_objects() -> list[manifests.Document]:
    """Returns the recorded objects of the dumps, with the same changes for the lab as the dumps."""
    documents = []
    for resource, items in recordings.lists("final").items():
        for item in json.loads(rules.with_lab_addresses(json.dumps(items))):
            key = (item["metadata"].get("namespace"), item["metadata"]["name"])
            if resource is Resource.SERVICES and key == ("kube-system", "kube-dns"):
                item["spec"]["type"] = "NodePort"
                for port in item["spec"]["ports"]:
                    if port["protocol"] == "UDP":
                        port["nodePort"] = rules.DNS_NODE_PORT
            elif resource is Resource.SERVICES and key == ("shop", "frontend"):
                item["status"] = {"loadBalancer": {"ingress": [{"ip": "203.0.113.10", "ipMode": "VIP"}]}}
            version, kind = _KINDS[resource]
            documents.append({**item, "apiVersion": version, "kind": kind})
    return documents


def _load_rules(mode: str) -> None:
    rules.load(mode, lab=True)


def _leftovers() -> tuple[bool, list[str]]:
    return bool(leftovers.find()), conntrack_hold.find()


def broken(connections: list[LongConnection]) -> dict[str, str]:
    """Returns the errors of connections that are not alive, by name."""
    return {each.name: error for each in connections if (error := each.check()) != "alive"}
