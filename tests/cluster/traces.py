"""The state that a service proxy can leave on a node and in the API, for comparison."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from tests.cluster.cluster import Cluster, Node
from tests.deploy.runtime import install

#: runc attaches these to every container's cgroup where the node has cgroup v2.
_OF_CONTAINERS = ("cgroup_device", "device")
#: These are counters and random numbers, not settings.
_MOVING = re.compile(r"nf_conntrack_count|conntrack_count|random|entropy|ipfrag|ip6frag")


class Traces(NamedTuple):
    """``programs``: attached to cgroups and devices; ``pinned``: below the bpffs."""

    pinned: list[str]
    programs: list[str]
    devices: list[str]
    rules: list[str]
    tables: list[str]
    settings: dict[str, str]
    files: list[str]
    processes: list[str]


def of_node(node: Node) -> Traces:
    install("bpftool", "bpftool")
    pinned = node.run(["find", "/sys/fs/bpf", "-mindepth", "1"]).split()
    settings = {}
    for line in node.run(["sysctl", "-a"], check=False).splitlines():
        name, _, value = line.partition(" = ")
        # Devices of pods are added and removed at any time.
        if name.startswith("net.") and not _MOVING.search(name) and ".veth" not in name:
            settings[name] = value
    found = ["find", "/run", "/var", "/etc", "/usr/local", "-xdev", "-iname", "*ebpfproxy*"]
    # Folders, logs and images of pods belong to the kubelet and containerd.
    theirs = re.compile(r"^/(var/log/(pods|containers)|var/lib/(kubelet|containerd)|run/containerd)/")
    return Traces(
        pinned=sorted(pinned),
        programs=_attached(node),
        devices=sorted(
            name
            for each in json.loads(node.run(["ip", "-j", "link"]))
            if not (name := each["ifname"]).startswith("veth")
        ),
        rules=sorted([*node.run(["ip", "rule"]).splitlines(), *node.run(["ip", "-6", "rule"]).splitlines()]),
        tables=sorted(node.run(["nft", "list", "tables"]).splitlines()),
        settings=settings,
        files=sorted(each for each in node.run(found, check=False).split() if not theirs.match(each)),
        processes=[
            each
            for each in node.run(["ps", "-e", "-o", "args"]).splitlines()
            if re.search(r"/ebpfproxy (run|migrate)", each)
        ],
    )


def _attached(node: Node) -> list[str]:
    found = []
    for line in node.run(["bpftool", "cgroup", "tree"], check=False).splitlines():
        words = line.split()
        if len(words) > 2 and words[0].isdecimal() and words[1] not in _OF_CONTAINERS:
            found.append(f"cgroup {words[1]} {words[-1]}")
    for each in json.loads(node.run(["bpftool", "-j", "net"])):
        for kind in ("xdp", "tc", "flow_dissector"):
            found += [f"{kind} {json.dumps(at, sort_keys=True)}" for at in each.get(kind, ())]
    return sorted(found)


def program_ids(node: Node) -> set[int]:
    """Returns the ids of programs whose pins are on the node."""
    found: list[dict[str, Any]] = json.loads(node.run(["bpftool", "-j", "-f", "prog"]))
    return {each["id"] for each in found if any("ebpfproxy" in path for path in each.get("pinned", ()))}


def living(node: Node, ids: set[int]) -> set[int]:
    """Returns the ids that the kernel still has."""
    return {each["id"] for each in json.loads(node.run(["bpftool", "-j", "prog"]))} & ids


def in_api(cluster: Cluster) -> list[str]:
    """Returns every object of every kind that the API server lists, by name, without events and leases of hosts."""
    kinds = cluster.kubectl("api-resources", "--verbs=list", "-o", "name").split()
    listed = ",".join(each for each in kinds if not each.startswith("events"))
    names = cluster.kubectl("get", listed, "-A", "-o", "name", "--ignore-not-found").split()
    marks = [
        f"{each['metadata']['name']}: {key}"
        for each in cluster.get("nodes")["items"]
        for kind in ("labels", "annotations")
        for key in each["metadata"].get(kind, {})
        if "ebpfproxy" in key
    ]
    return sorted({each for each in names if "ebpfproxy" in each} | set(marks))
