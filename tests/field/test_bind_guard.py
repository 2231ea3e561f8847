"""bind() to NodePorts, with and without ``--nodeport-guard``."""

from __future__ import annotations

import errno
import os
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from ebpfproxy.datapath.abi import uapi
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.roots import pin_folder
from ebpfproxy.datapath.programs.attach import LINKS
from tests.lab import Lab, LabNode, manifests
from tests.lab.waiting import until

pytestmark = pytest.mark.root

PORTS = range(20000, 20200)
BINDS = 20_000
ANY = ("0.0.0.0", "::", "::ffff:0.0.0.0")


class Nodes(NamedTuple):
    """Two nodes with the same 200 NodePorts, one with default options and one with the guard."""

    plain: LabNode
    guarded: LabNode
    folder: Path


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with Lab() as lab:
        plain, guarded = lab.node("node-a"), lab.node("node-b")
        folder = lab.folder / "manifests"
        for protocol in ("TCP", "UDP"):
            ports = [
                {"name": f"p{port}", "port": port, "nodePort": port, "protocol": protocol} for port in PORTS
            ]
            name = f"many-{protocol.lower()}"
            last = "10" if protocol == "TCP" else "11"
            addresses = [f"10.96.0.{last}", f"fd00:10:96::{last}"]
            service = manifests.service(name, type="NodePort", clusterIPs=addresses, ports=ports)
            manifests.write(folder / f"{name}.yaml", service)
        plain.agent(manifests=folder).start()
        guarded.agent("--nodeport-guard", manifests=folder).start()
        yield Nodes(plain, guarded, folder)


def bind(address: str, port: int, kind: int = socket.SOCK_STREAM) -> str:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, kind) as sock:
        try:
            sock.bind((address, port))
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error))
    return "bound"


def bind_any_port(count: int) -> Counter[str]:
    """The results of bind() to port 0, where half of ip_local_port_range is NodePorts."""
    Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("20000 20399")
    found: Counter[str] = Counter()
    for number in range(count):
        kind = (socket.SOCK_STREAM, socket.SOCK_DGRAM)[number % 2]
        found[bind(ANY[number % 3], 0, kind)] += 1
    return found


def link_ids(node: LabNode) -> set[str]:
    return {path.name for path in (pin_folder(node.bpf_root) / LINKS).iterdir()}


@pytest.mark.parametrize("which", ["plain", "guarded"])
def test_bind_to_port_0_never_fails(nodes: Nodes, which: str) -> None:
    """A port that the kernel chooses is never refused, even if many of its range are NodePorts."""
    node: LabNode = getattr(nodes, which)
    assert node.call(bind_any_port, BINDS) == {"bound": BINDS}


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_bind_to_a_node_port_succeeds_without_the_guard(nodes: Nodes, kind: int) -> None:
    """As with kube-proxy, bind() to a NodePort succeeds; without the option no bind hook is attached."""
    for address in (*ANY, nodes.plain.address, nodes.plain.address6, "127.0.0.1"):
        assert nodes.plain.call(bind, address, PORTS[0], kind) == "bound"
    assert not link_ids(nodes.plain) & {"bind4", "bind6", "post_bind4", "post_bind6"}


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_guard_refuses_bind_to_a_node_port_in_the_host_namespace(nodes: Nodes, kind: int) -> None:
    """bind() to a NodePort fails at every address that serves it."""
    node = nodes.guarded
    for address in (*ANY, node.address, node.address6, f"::ffff:{node.address}", "127.0.0.1"):
        assert node.call(bind, address, PORTS[0], kind) == "EADDRINUSE", address
    assert node.call(bind, "0.0.0.0", PORTS[-1] + 1, kind) == "bound"
    assert node.call(bind, "127.0.0.2", PORTS[-1] + 1, kind) == "bound"


def test_guard_does_not_apply_to_other_protocols_and_pods(nodes: Nodes) -> None:
    """A NodePort belongs to one protocol and to the host's network namespace."""
    pod = nodes.guarded.pod("free")
    assert pod.call(bind, "0.0.0.0", PORTS[0]) == "bound"
    (nodes.folder / "many-udp.yaml").unlink()
    until(
        lambda: nodes.guarded.call(bind, "0.0.0.0", PORTS[0], socket.SOCK_DGRAM) == "bound",
        "the port of a removed UDP Service is still refused",
    )
    assert nodes.guarded.call(bind, "0.0.0.0", PORTS[0]) == "EADDRINUSE"


def test_bind_programs_of_an_older_agent_are_detached_at_start(nodes: Nodes) -> None:
    """At start an agent detaches links of hooks that its version or its options do not have."""
    links = pin_folder(nodes.guarded.bpf_root) / LINKS
    agent = nodes.guarded.lab.agents[-1]
    agent.stop()
    cgroup = os.open(nodes.guarded.cgroup, os.O_RDONLY | os.O_DIRECTORY)
    refusing = bpf.prog_load(
        uapi.PROG_CGROUP_SOCK, 12, "test", bytes.fromhex("b700000000000000 9500000000000000")
    )
    link = bpf.link_create(refusing, cgroup, 12)
    bpf.pin(link, links / "post_bind4")
    for fd in (cgroup, refusing, link):
        os.close(fd)
    assert nodes.guarded.call(bind, "0.0.0.0", 0) == "EPERM"
    nodes.guarded.agent("--no-nodeport-guard", manifests=nodes.folder).start()
    assert not link_ids(nodes.guarded) & {"bind4", "bind6", "post_bind4", "post_bind6"}
    assert nodes.guarded.call(bind, "0.0.0.0", 0) == "bound"
    assert nodes.guarded.call(bind, "0.0.0.0", PORTS[0]) == "bound"
