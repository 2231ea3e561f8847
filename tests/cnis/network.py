"""What a network of pods is, for the tests of this folder; each kind is a subclass."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from tests.lab import Agent, LabNode, Pod
from tests.lab.spaces import Space

FAMILIES = ("IPv4", "IPv6")
CLUSTER_CIDRS = {"IPv4": "10.244.0.0/16", "IPv6": "fd00:10:244::/48"}
SERVICE_CIDRS = {"IPv4": "10.96.0.0/16", "IPv6": "fd00:10:96::/112"}


def pod_cidr(node: LabNode, family: str) -> str:
    """Returns the node's podCIDR."""
    return f"10.244.{node.number}.0/24" if family == "IPv4" else f"fd00:10:244:{node.number}::/64"


def ip(space: Space, *commands: str) -> None:
    """Runs commands of iproute2, which are written without their ``ip``."""
    for command in commands:
        space.run(["ip", *command.split()])


def sysctl(space: Space, **values: object) -> None:
    """Sets sysctls below net of the namespace; ``__`` in a name stands for a slash."""
    space.call(_write, {name.replace("__", "/"): str(value) for name, value in values.items()})


def _write(values: dict[str, str]) -> None:
    for name, value in values.items():
        for path in Path("/proc/sys/net").glob(name):
            path.write_text(value)


def load(space: Space, command: list[str], rules: str) -> None:
    """Gives rules to iptables-restore or nft. Raises RuntimeError with what it says."""
    process = space.popen(command, join_cgroup=False, stdin=-1, stdout=-1, stderr=-1)
    output, errors = process.communicate(rules.encode())
    if process.returncode:
        raise RuntimeError(f"{command}: {output.decode()}{errors.decode()}\n{rules}")


class Network:
    """Connects pods. ``title`` is that of a row in docs/tested.md."""

    families: ClassVar[tuple[str, ...]] = FAMILIES
    #: Checks that no service proxy can pass in this network, each with the reason.
    lacks: Mapping[str, str] = {}
    #: The port of the node that leads to port 8080 of the pod w1; 0: there is none.
    host_port = 0
    #: Options of the agents where the defaults are not what is to be shown.
    options: tuple[str, ...] = ()
    #: The network's own masquerading replaces a pod's address towards pods of other nodes.
    masks_pods = False
    #: Endpoints see the node's address where a pod's packets passed no socket hook.
    masks_packets = False
    #: Endpoints see the address of a client outside where a service proxy would masquerade it.
    shows_clients = False
    #: Nodes route to each other's pods as the lab does by itself.
    routes_pods = True

    def __init__(self, title: str) -> None:
        self.title = title

    def prepare(self, node: LabNode) -> None:
        """Sets up a node before it has pods. The other nodes need not exist yet."""

    def connect(self, node: LabNode, name: str) -> Pod:
        """Creates a connected pod."""
        return node.pod(name)

    def join(self, node: LabNode, other: LabNode) -> None:
        """Leads from a node to the pods of another one."""

    def finish(self, node: LabNode) -> None:
        """Completes a node that has its pods, before its agent starts."""

    def attach_late(self, node: LabNode) -> None:
        """Does what the CNI does after the agent has started."""

    def settle(self, agent: Agent) -> None:
        """Waits until the agent has noticed that."""
