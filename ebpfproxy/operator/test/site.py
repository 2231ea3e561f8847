"""The cluster as far as the test needs it: nodes with their addresses, and the agents' image and pods."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence

import msgspec

from ebpfproxy.config import load
from ebpfproxy.config.documents import ConfigurationError
from ebpfproxy.config.node_port_addresses import KEYWORDS, LOCALHOST
from ebpfproxy.operator import pod_status
from ebpfproxy.operator.api import Api, Object, shown
from ebpfproxy.operator.image import Image, image_of
from ebpfproxy.operator.names import AGENT

_OS = "kubernetes.io/os"


class CannotTestError(Exception):
    """Services cannot be tested; the message has a line for each reason."""


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """The command's options; ``seconds`` bound each step."""

    namespace: str
    agent_namespace: str
    daemon_set: str
    image: str | None
    nodes: tuple[str, ...]
    restart: bool
    keep: bool
    seconds: float


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """``addresses``: those that it has in the cluster; ``node_ports``: where NodePorts answer."""

    name: str
    addresses: tuple[str, ...]
    node_ports: tuple[str, ...]
    #: The name of the agent's pod there; empty where there is none.
    agent: str = ""


class Site(msgspec.Struct, frozen=True, kw_only=True):
    image: Image
    nodes: tuple[Node, ...]
    #: Why nodes are left out.
    remarks: tuple[str, ...] = ()


def read(api: Api, wanted: Wanted) -> Site:
    """Raises CannotTestError and ApiError."""
    daemon_set = api.get("DaemonSet", wanted.agent_namespace, wanted.daemon_set)
    if daemon_set is None and wanted.image is None:
        what = shown("DaemonSet", wanted.agent_namespace, wanted.daemon_set)
        raise CannotTestError(
            f"there is no {what}: name it with --daemonset, or an --image for the test's pods"
        )
    image = image_of(daemon_set) if daemon_set is not None else Image(name=str(wanted.image))
    if wanted.image is not None:
        image = msgspec.structs.replace(image, name=wanted.image)
    agents = {}
    if daemon_set is not None:
        for pod in pod_status.of_daemon_set(api, wanted.agent_namespace, wanted.daemon_set):
            agents[pod_status.node_of(pod)] = pod
    selection = _node_port_addresses(api, wanted.agent_namespace)
    nodes, remarks = [], []
    for item in _chosen(api.list("Node", ""), wanted.nodes):
        name = item["metadata"]["name"]
        if reason := _against(item, agents.get(name), needs_agent=daemon_set is not None):
            remarks.append(f"node {name} is not tested: {reason}")
            continue
        addresses = _addresses(item)
        node_ports = tuple(each for each in addresses if _answers(each, selection))
        agent = str(agents[name]["metadata"]["name"]) if name in agents else ""
        nodes.append(Node(name=name, addresses=addresses, node_ports=node_ports, agent=agent))
    if not nodes:
        raise CannotTestError("\n".join(["no node can be tested", *remarks]))
    return Site(image=image, nodes=tuple(nodes), remarks=tuple(remarks))


def _chosen(found: Iterable[Object], names: Sequence[str]) -> list[Object]:
    linux = {
        each["metadata"]["name"]: each
        for each in found
        if (each["metadata"].get("labels") or {}).get(_OS, "linux") == "linux"
    }
    if missing := [name for name in names if name not in linux]:
        raise CannotTestError(f"--node {missing[0]}: no such node with Linux")
    return [linux[name] for name in (dict.fromkeys(names) or sorted(linux))]


def _against(node: Object, agent: Object | None, *, needs_agent: bool) -> str:
    """Returns why a node is left out; empty where it is not."""
    conditions = (node.get("status") or {}).get("conditions") or ()
    if any(each["type"] == "Ready" and each["status"] != "True" for each in conditions):
        return "it is not Ready"
    if agent is None:
        return "no agent runs there" if needs_agent else ""
    return f"its agent is not ready: {pod_status.trouble(agent)}" if pod_status.trouble(agent) else ""


def _addresses(node: Object) -> tuple[str, ...]:
    found = (node.get("status") or {}).get("addresses") or ()
    return tuple(each["address"] for each in found if each["type"] == "InternalIP")


def _node_port_addresses(api: Api, namespace: str) -> tuple[str, ...]:
    """Returns what the agents are configured for; empty, which is all, where that cannot be read."""
    text = api.config(namespace, AGENT, "config.yaml")
    try:
        return load.parse(text, "config.yaml").kube_proxy.node_port_addresses or () if text else ()
    except ConfigurationError:
        return ()


def _answers(address: str, selection: tuple[str, ...]) -> bool:
    """A node's addresses in the cluster are its primary ones."""
    found = ipaddress.ip_address(address)
    return not selection or any(
        text != LOCALHOST if text in KEYWORDS else found in ipaddress.ip_network(text, strict=False)
        for text in selection
    )
