"""What a service proxy can leave on a node and in the API, as it is now; two of them are compared."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from tests.cluster.cluster import Cluster, Node
from tests.deploy.runtime import install

#: What runc attaches to every container's cgroup where the node has cgroup v2.
_OF_CONTAINERS = ("cgroup_device", "device")
#: Counters and random numbers, which are no settings.
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
        # Pods' devices come and go.
        if name.startswith("net.") and not _MOVING.search(name) and ".veth" not in name:
            settings[name] = value
    found = ["find", "/run", "/var", "/etc", "/usr/local", "-xdev", "-iname", "*ebpfproxy*"]
    # Pods' folders and logs, and images, are the kubelet's and containerd's.
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
    """Of programs whose pins are on the node."""
    found: list[dict[str, Any]] = json.loads(node.run(["bpftool", "-j", "-f", "prog"]))
    return {each["id"] for each in found if any("ebpfproxy" in path for path in each.get("pinned", ()))}


def living(node: Node, ids: set[int]) -> set[int]:
    """Those that the kernel still has."""
    return {each["id"] for each in json.loads(node.run(["bpftool", "-j", "prog"]))} & ids


def in_api(cluster: Cluster) -> list[str]:
    """Every object of every kind that the API server lists, by name; events and leases of hosts do not count."""
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
