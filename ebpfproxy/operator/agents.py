"""The agents' pods: which one is on a node, or on the node of another pod, and commands in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ebpfproxy.kube.exec import Exec
from ebpfproxy.operator import pod_status
from ebpfproxy.operator.api import Api, ApiError, Object, shown

#: A command that does not end by itself ends with its standard input, which the connection's end closes.
PROGRAM = ("ebpfproxy", "--end-with-input")


class AgentsError(Exception):
    """No agent's pod is meant, or not one alone; the message says what to name."""


class Client(NamedTuple):
    """Another pod: its node and its address, which is empty where that is its node's."""

    node: str
    address: str


class Agents:
    """The pods of one DaemonSet. Methods raise ApiError and AgentsError."""

    def __init__(self, api: Api, daemon_set: str) -> None:
        """``daemon_set``: ``NAMESPACE/NAME``."""
        self._api = api
        self.namespace, slash, self.name = daemon_set.partition("/")
        if not slash:
            raise AgentsError(f"--daemonset {daemon_set} is not NAMESPACE/NAME")
        found = pod_status.of_daemon_set(api, self.namespace, self.name)
        # Where a node has two, one of them is about to end.
        self.pods = {pod_status.node_of(pod): pod for pod in sorted(found, key=pod_status.is_ready)}
        if not self.pods:
            raise AgentsError(f"there is no pod of {shown('DaemonSet', self.namespace, self.name)}")

    def chosen(self, nodes: Iterable[str]) -> list[str]:
        """Returns these nodes, or all that have an agent, by name."""
        wanted = list(dict.fromkeys(nodes))
        if missing := [node for node in wanted if node not in self.pods]:
            raise AgentsError(f"--node {missing[0]}: no pod of the agent is there; {self._nodes()}")
        return wanted or sorted(self.pods)

    def only(self) -> str:
        """Returns the node of the only agent."""
        if len(self.pods) > 1:
            raise AgentsError(f"name a --node; {self._nodes()}")
        return next(iter(self.pods))

    def _nodes(self) -> str:
        return f"agents are on {', '.join(sorted(self.pods))}"

    def client(self, text: str) -> Client:
        """Finds a pod by ``NAMESPACE/NAME``, its name alone, or its address."""
        namespace, _, name = text.strip("[]").rpartition("/")
        found = self._api.list("Pod", namespace, fieldSelector=f"metadata.name={name}")
        if not found and not namespace:
            found = self._api.list("Pod", "", fieldSelector=f"status.podIP={name}")
            found = [pod for pod in found if not pod["spec"].get("hostNetwork")]
        found = [pod for pod in found if (pod.get("spec") or {}).get("nodeName")]
        if not found:
            raise AgentsError(f"no pod {text} is on any node; name a --node for other clients")
        if len(found) > 1:
            names = sorted(f"{pod['metadata']['namespace']}/{pod['metadata']['name']}" for pod in found)
            raise AgentsError(f"several pods are meant by {text}: {', '.join(names)}")
        spec, status = found[0]["spec"], found[0].get("status") or {}
        return Client(str(spec["nodeName"]), "" if spec.get("hostNetwork") else str(status.get("podIP", "")))

    def start(self, node: str, command: Sequence[str]) -> Exec:
        """Starts ``ebpfproxy COMMAND`` in the agent's container of a node."""
        (node,) = self.chosen([node])
        pod: Object = self.pods[node]
        try:
            return self._api.start(
                self.namespace,
                pod["metadata"]["name"],
                pod["spec"]["containers"][0]["name"],
                [*PROGRAM, *command],
            )
        except ApiError as error:
            raise ApiError(self.told(node, error), error.status) from error

    def told(self, node: str, error: Exception) -> str:
        """The error of a command, and why the agent's pod is not ready."""
        trouble = pod_status.trouble(self.pods[node])
        return f"{error} ({trouble})" if trouble else str(error)
