"""Two nodes with a real kube-proxy's rules on the first, its Services, and clients that stay connected."""

from __future__ import annotations

import json
import time
from pathlib import Path

from ebpfproxy.kube.objects import Resource
from tests import recordings
from tests.lab import Agent, Lab, LabNode, Outside, Pod, manifests, servers
from tests.lab.spaces import Space
from tests.operator.migrate import rules, rules6
from tests.operator.migrate.asking import Held, Load
from tests.operator.migrate.commands import Migration

_KINDS = {
    Resource.SERVICES: ("v1", "Service"),
    Resource.ENDPOINTSLICES: ("discovery.k8s.io/v1", "EndpointSlice"),
    Resource.NODES: ("v1", "Node"),
}
#: An orders pod and DNS listen at these ports.
TARGET_PORT, DNS_PORT = 8080, 53


#: The client, the protocol, host and port.
Way = tuple[Space, str, str, int]


class World(Migration):
    """``dual_stack``: all Services, endpoints and rules of both families."""

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
        return rules6.both_families(cluster()) if self.dual_stack else cluster()

    def remove_service(self, namespace: str, name: str) -> None:
        kept = [
            each
            for each in self._documents()
            if (each["metadata"].get("namespace"), each["metadata"]["name"]) != (namespace, name)
        ]
        manifests.write(self.manifests / "cluster.yaml", *kept)

    def wait_frontends(self, count: int) -> None:
        """Waits until the maps serve so many; all addresses of a NodePort count as one."""
        deadline = time.monotonic() + 60
        while len(found := self._frontends()) != count:
            assert time.monotonic() < deadline, sorted(found)
            time.sleep(0.2)

    def _frontends(self) -> set[str]:
        rows = json.loads(self.a.cli("service", "list", "-o", "json"))
        return {
            row["frontend"].rpartition(":")[2] if row["type"] == "NodePort" else row["frontend"]
            for row in rows
        }

    def kube_proxy(self, mode: str) -> None:
        """Its rules on node-a1, as if it had run there."""
        if self.dual_stack:
            self.a.call(rules6.load, mode)
        else:
            self.a.call(_load_rules, mode)

    def held(self) -> list[Held]:
        """Some of each kind: which endpoint each gets is chance."""
        ways: list[Way] = [
            (self.client, "tcp", rules.ORDERS, 80),
            (self.client, "tcp", rules.PAYMENTS, 3001),
            (self.client, "udp", rules.DNS, 53),
            (self.a, "tcp", rules.ORDERS, 80),
            (self.a, "udp", rules.DNS, 53),
            (self.outside, "tcp", self.a.address, rules.PAYMENTS_NODE_PORT),
            (self.outside, "udp", self.a.address, rules.DNS_NODE_PORT),
        ]
        return [Held(*way) for way in self._of_families(ways) for _ in range(5)]

    def loads(self) -> list[Load]:
        ways: list[Way] = [
            (self.client, "tcp", rules.ORDERS, 80),
            (self.client, "udp", rules.DNS, 53),
            (self.outside, "tcp", self.a.address, rules.PAYMENTS_NODE_PORT),
            (self.outside, "udp", self.a.address, rules.DNS_NODE_PORT),
        ]
        return [Load(*way) for way in self._of_families(ways)]

    def _of_families(self, ways: list[Way]) -> list[Way]:
        if not self.dual_stack:
            return ways
        return ways + [(space, kind, rules6.address(host), port) for space, kind, host, port in ways]


def cluster() -> list[manifests.Document]:
    """The recorded objects that the dumps were made of, changed as the dumps are for the lab."""
    made = []
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
            made.append({**item, "apiVersion": version, "kind": kind})
    return made


def _load_rules(mode: str) -> None:
    rules.load(mode, lab=True)


def how(held: list[Held]) -> dict[str, str]:
    """Returns those that are not alive, by name."""
    return {each.name: said for each in held if (said := each.ask()) != "alive"}
