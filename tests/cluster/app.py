"""A Deployment behind a Service of both families, and clients of it in pods on both nodes, on a node and outside."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from tests.cluster import images
from tests.cluster.cluster import Cluster, Node, Object, until
from tests.cluster.network import internal_ips
from tests.cluster.request_load import Client, Way

NAMESPACE = "life"
NODE_PORT, NODE_PORT_UDP = 30080, 30053
#: It is longer than a change of endpoints takes to reach every node, so that no proxy uses a server that has ended. On
#: a busy
#: machine the controller of EndpointSlices took 12 s, since it doubles its pause after each conflict.
_SHUTDOWN_SECONDS = 20

_MANIFESTS = f"""
apiVersion: v1
kind: Namespace
metadata: {{name: {NAMESPACE}}}
---
apiVersion: v1
kind: Service
metadata: {{name: web, namespace: {NAMESPACE}}}
spec:
  type: NodePort
  ipFamilyPolicy: RequireDualStack
  selector: {{app: web}}
  ports:
  - {{name: http, port: 80, targetPort: 8080, nodePort: {NODE_PORT}}}
  - {{name: udp, port: 53, targetPort: 8081, nodePort: {NODE_PORT_UDP}, protocol: UDP}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: web, namespace: {NAMESPACE}}}
spec:
  replicas: 4
  selector: {{matchLabels: {{app: web}}}}
  strategy: {{rollingUpdate: {{maxUnavailable: 0}}}}
  template:
    metadata: {{labels: {{app: web}}}}
    spec:
      topologySpreadConstraints:
      - maxSkew: 1
        topologyKey: kubernetes.io/hostname
        # A node that is drained counts no longer, and one that comes back is filled by what is made anew.
        nodeTaintsPolicy: Honor
        whenUnsatisfiable: DoNotSchedule
        labelSelector: {{matchLabels: {{app: web}}}}
        matchLabelKeys: [pod-template-hash]
      containers:
      - name: web
        image: {images.AGNHOST}
        args: [netexec, --http-port=8080, --udp-port=8081, --delay-shutdown={_SHUTDOWN_SECONDS}]
        # A busy machine must not make it unready, which ends its UDP flows: that is not what is tested.
        readinessProbe: {{httpGet: {{path: /readyz, port: 8080}}, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 30}}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {{name: client, namespace: {NAMESPACE}}}
spec:
  selector: {{matchLabels: {{app: client}}}}
  template:
    metadata: {{labels: {{app: client}}}}
    spec:
      terminationGracePeriodSeconds: 0
      containers: [{{name: client, image: {images.BUSYBOX}, command: [sleep, infinity]}}]
"""


class App:
    """A Deployment in its own namespace; :meth:`remove` deletes it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        cluster.apply(_MANIFESTS)
        self.wait()
        spec = cluster.get("-n", NAMESPACE, "service", "web")["spec"]
        self.cluster_ips: list[str] = spec["clusterIPs"]

    def wait(self) -> None:
        """Waits until all pods are ready and none is terminating."""
        for what in ("deployment/web", "daemonset/client"):
            self.cluster.kubectl("-n", NAMESPACE, "rollout", "status", what, "--timeout=120s")
        until(lambda: len(self.pods("web")) == 4, "pods of the Deployment that are too many end")

    def spread(self) -> None:
        """Recreates the Deployment's pods, two on each node."""
        self.cluster.kubectl("-n", NAMESPACE, "rollout", "restart", "deployment/web")
        self.wait()

    def remove(self) -> None:
        self.cluster.kubectl("delete", "namespace", NAMESPACE, "--timeout=120s")

    def pods(self, app: str) -> list[Object]:
        found: list[Object] = self.cluster.get("-n", NAMESPACE, "pods", "-l", f"app={app}")["items"]
        return found

    def servers(self, node: Node) -> set[str]:
        """Returns the names of the Deployment's pods on a node."""
        return {
            pod["metadata"]["name"] for pod in self.pods("web") if pod["spec"].get("nodeName") == node.name
        }

    # -- clients

    def everywhere(self) -> list[Client]:
        """Runs clients in pods on both nodes, on the first node, and outside."""
        first, second = self.cluster.nodes
        return [self.in_pod(first), self.in_pod(second), self.on_node(first), self.outside()]

    def in_pod(self, node: Node) -> Client:
        """Runs a client of the ClusterIPs in the network of the node's client pod."""
        (pod,) = (each for each in self.pods("client") if each["spec"]["nodeName"] == node.name)
        container = pod["status"]["containerStatuses"][0]["containerID"].removeprefix("containerd://")
        enter = ["nsenter", f"--net=/proc/{node.pids()[container]}/ns/net"]
        return self._client(f"pod on {node.name}", node, enter, self._cluster_ways())

    def on_node(self, node: Node) -> Client:
        return self._client(node.name, node, [], self._cluster_ways())

    def outside(self) -> Client:
        """Runs a client of the NodePorts of all nodes."""
        ways = [
            way
            for node in self.cluster.nodes
            for address in internal_ips(node.number)
            for way in (("tcp", address, NODE_PORT), ("udp", address, NODE_PORT_UDP))
        ]
        return Client("outside", self.cluster.outside.popen, str(images.TOP), sys.executable, ways)

    def _client(self, name: str, node: Node, enter: list[str], ways: list[Way]) -> Client:
        def popen(command: list[str], **streams: Any) -> subprocess.Popen[Any]:
            return node.popen([*enter, *command], **streams)

        return Client(name, popen, "/opt/checkout", self.cluster.python, ways)

    def _cluster_ways(self) -> list[Way]:
        return [way for ip in self.cluster_ips for way in (("tcp", ip, 80), ("udp", ip, 53))]
