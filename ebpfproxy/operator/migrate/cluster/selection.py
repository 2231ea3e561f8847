"""Selects the nodes that a command works on, and their order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from ebpfproxy.operator.api import Object
from ebpfproxy.operator.migrate.switches import AGENT, KUBE_PROXY

_CONTROL_PLANE = "node-role.kubernetes.io/control-plane"
_OS = "kubernetes.io/os"


class NodesError(Exception):
    """The options select no node, or name one that does not exist."""


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """The facts of a Node that decide."""

    name: str
    ready: bool
    kube_proxy_off: bool
    agent_off: bool
    control_plane: bool = False


def read(node: Object) -> Node:
    conditions = node.get("status", {}).get("conditions", ())
    return Node(
        name=node["metadata"]["name"],
        ready=any(each["type"] == "Ready" and each["status"] == "True" for each in conditions),
        kube_proxy_off=KUBE_PROXY.is_off(node),
        agent_off=AGENT.is_off(node),
        control_plane=_CONTROL_PLANE in (node["metadata"].get("labels") or {}),
    )


def choose(found: Iterable[Object], names: Sequence[str]) -> list[Node]:
    """Returns those named, in that order; without names all Linux nodes: workers first, by name.

    Raises NodesError.
    """
    linux = [each for each in found if (each["metadata"].get("labels") or {}).get(_OS, "linux") == "linux"]
    by_name = {node.name: node for node in map(read, linux)}
    if missing := [name for name in names if name not in by_name]:
        raise NodesError(f"--node {missing[0]}: no such node with Linux, or not selected")
    if names:
        return [by_name[name] for name in dict.fromkeys(names)]
    if not by_name:
        raise NodesError("no node with Linux is selected")
    return sorted(by_name.values(), key=lambda node: (node.control_plane, node.name))
