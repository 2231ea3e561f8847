"""A Service with a pod on each node, and the backends that reply to a pod, a node and a host outside."""

from __future__ import annotations

import time

from tests.cluster import images, network
from tests.cluster.cluster import Cluster

NAMESPACE = "web"
#: The number of requests in one run of a shell; one of two pods gets none of them once in a million runs.
_ASKED = 20
_PORT = 8080


def _pod(name: str, node: str, arguments: list[str], labels: str = "{}") -> str:
    return f"""
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {NAMESPACE}, labels: {labels}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 0
  containers:
  - {{name: agnhost, image: "{images.AGNHOST}", args: {arguments}}}
"""


_SERVICE = f"""
apiVersion: v1
kind: Service
metadata: {{name: web, namespace: {NAMESPACE}}}
spec:
  type: NodePort
  ipFamilyPolicy: RequireDualStack
  selector: {{app: web}}
  ports: [{{port: 80, targetPort: {_PORT}}}]
"""


class Web:
    """``nodes`` have a server pod each, and one has the client pod ``client-NODE``."""

    def __init__(self, cluster: Cluster, nodes: list[str]) -> None:
        self._cluster = cluster
        self._nodes = nodes
        cluster.apply(f"apiVersion: v1\nkind: Namespace\nmetadata: {{name: {NAMESPACE}}}\n")
        account = ["-n", NAMESPACE, "get", "serviceaccount", "default"]
        while not cluster.succeeds("kubectl", *account):
            time.sleep(0.2)
        cluster.apply("---".join([_SERVICE, *(each for node in nodes for each in self._pods(node))]))

    def add(self, node: str) -> None:
        """Its pods, too."""
        self._nodes.append(node)
        self._cluster.apply("---".join(self._pods(node)))

    @staticmethod
    def _pods(node: str) -> list[str]:
        answers = ["netexec", f"--http-port={_PORT}"]
        return [
            _pod(f"web-{node}", node, answers, "{app: web}"),
            _pod(f"client-{node}", node, ["pause"]),
        ]

    def wait(self) -> None:
        """Waits until all pods are ready and thus endpoints."""
        self._cluster.kubectl(
            "-n", NAMESPACE, "wait", "--for=condition=Ready", "pod", "--all", "--timeout=120s"
        )

    @property
    def pods(self) -> set[str]:
        return {f"web-{node}" for node in self._nodes}

    def cluster_ips(self) -> list[str]:
        """Returns URLs, IPv4's first."""
        found = self._cluster.get("-n", NAMESPACE, "service", "web")["spec"]["clusterIPs"]
        return [_url(address, 80) for address in sorted(found, key=lambda each: ":" in each)]

    def node_ports(self, number: int) -> list[str]:
        """Returns URLs of a node's addresses, IPv4's first."""
        (port,) = self._cluster.get("-n", NAMESPACE, "service", "web")["spec"]["ports"]
        return [_url(address, port["nodePort"]) for address in network.internal_ips(number)]

    # -- requests

    def from_pod(self, url: str, node: str) -> set[str]:
        command = ["-n", NAMESPACE, "exec", f"client-{node}", "--", *_asking(url)]
        return set(self._cluster.kubectl(*command).split())

    def from_node(self, url: str, number: int) -> set[str]:
        return set(self._cluster.nodes[number - 1].run(_asking(url), check=False).split())

    def from_outside(self, url: str) -> set[str]:
        return set(self._cluster.command(_asking(url)).split())

    def answers_everywhere(self) -> dict[str, set[str]]:
        """Returns the pods that replied, by client and URL."""
        found = {}
        for url in self.cluster_ips():
            for number, node in enumerate(self._nodes, start=1):
                found[f"pod on {node} asks {url}"] = self.from_pod(url, node)
                found[f"{node} asks {url}"] = self.from_node(url, number)
        for number, _ in enumerate(self._nodes, start=1):
            for url in self.node_ports(number):
                found[f"outside asks {url}"] = self.from_outside(url)
        return found

    def assert_answers(self) -> None:
        """Asserts that all pods reply in both families to a pod, a node and, by NodePort, a host outside."""
        wrong = {asked: by for asked, by in self.answers_everywhere().items() if by != self.pods}
        assert not wrong, wrong

    def remove(self) -> None:
        self._cluster.kubectl("delete", "namespace", NAMESPACE, "--timeout=60s")


def _asking(url: str) -> list[str]:
    """Prints the names of pods that replied, one per line."""
    script = 'for i in $(seq "$2"); do curl -gs -m 3 "$1/hostname"; echo; done'
    return ["sh", "-c", script, "sh", url, str(_ASKED)]


def _url(address: str, port: int) -> str:
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
