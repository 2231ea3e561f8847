"""XDP on virtio-net, whose driver has conditions of its own: ``make test-kernels`` boots with such devices.

node-a's uplinks are NICs of the emulator (:mod:`tests.kernels.network`), with another NIC at the other end of each
wire: in the bridge of the nodes, and in the client's namespace.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.e2e import connection_load
from tests.e2e.two_node_cluster import NODE_PORT
from tests.field.test_xdp_forwarding import (
    PACKETS,
    TELLS_FEATURES,
    UDP_PORT,
    XdpCluster,
    compute_checksums,
    echo,
)
from tests.kernels import network
from tests.lab import Lab, clients
from tests.lab.lab import OUTSIDE, OUTSIDE6
from tests.lab.spaces import Space
from tests.lab.waiting import until

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(
        "EBPFPROXY_OWN_MACHINE" not in os.environ,
        reason="has no virtio-net devices to itself: make test-kernels",
    ),
]

#: The node and the client have another Ethernet in common.
_SECOND = {"node": ("172.19.0.1", "fd00:172:19::1"), "client": ("172.19.0.254", "fd00:172:19::fe")}
_FIRST_PROCESS = "1"


class VirtioCluster(XdpCluster):
    """The bridge of the nodes is at one end of a wire; :meth:`uplink` puts a NIC at the other, as node-a's eth0."""

    def __init__(self, lab: Lab, stack: ExitStack) -> None:
        super().__init__(lab)
        lab.switch.run(["ip", "link", "delete", "n1"])
        stack.enter_context(lent("switch", lab.switch, "n1"))
        lab.switch.run(["ip", "link", "set", "n1", "master", "br0", "up"])

    @contextmanager
    def uplink(self, nic: str, *, mtu: int = 1500) -> Iterator[None]:
        with lent(nic, self.a, "eth0"):
            self.a.run(["ip", "link", "set", "eth0", "mtu", str(mtu), "up"])
            add_addresses(self.a, "eth0", (self.a.address, self.a.address6))
            for to, via in (
                *(("default", via) for via in (OUTSIDE, OUTSIDE6)),
                *(
                    (f"10.244.{self.b.number}.0/24", self.b.address),
                    (f"fd00:10:244:{self.b.number}::/64", self.b.address6),
                ),
            ):
                self.a.run(
                    ["ip", "-6" if ":" in via else "-4", "route", "add", to, "via", via, "dev", "eth0"]
                )
            # The NIC before had another link address.
            for space in (self.b, self.outside):
                space.run(["ip", "neighbour", "flush", "dev", "eth0"])
            yield

    @contextmanager
    def second_uplink(self, nic: str) -> Iterator[tuple[str, str]]:
        """A wire between node-a and the client; yields the node's addresses there."""
        with lent("client", self.outside, "eth1"), lent(nic, self.a, "eth1"):
            for space, addresses in zip((self.a, self.outside), _SECOND.values(), strict=True):
                space.run(["ip", "link", "set", "eth1", "up"])
                add_addresses(space, "eth1", addresses)
            yield _SECOND["node"]

    def attached(self, device: str = "eth0") -> str:
        """How the kernel calls the program's mode, empty without one."""
        words = self.a.run(["ip", "-o", "link", "show", "dev", device]).split()
        return next((word for word in words if word.startswith("xdp")), "")

    def is_served(self, *, is_forwarded: bool, addresses: tuple[str, str] | None = None) -> None:
        """Asserts that clients reach the backend in both families, and if XDP forwards their packets.

        The first packet of a flow is tc's, and at intervals one to each of the two next hops.
        """
        for address in addresses or self.addresses():
            before = self.forwarded()
            assert self.outside.call(echo, address, UDP_PORT, PACKETS) == PACKETS
            assert self.outside.call(clients.is_echoed, address, NODE_PORT, 200_000)
            count = self.forwarded() - before
            assert count > 2 * PACKETS if is_forwarded else count == 0


def add_addresses(space: Space, device: str, addresses: tuple[str, str]) -> None:
    for address, prefix in zip(addresses, (24, 64), strict=True):
        nodad = ["nodad"] if ":" in address else []
        space.run(["ip", "address", "add", f"{address}/{prefix}", "dev", device, *nodad])


@contextmanager
def lent(nic: str, space: Space, name: str) -> Iterator[None]:
    """Moves a NIC into a namespace, with another name, and back."""
    wanted = network.address_of(nic)
    found = next(
        each.name
        for each in Path("/sys/class/net").iterdir()
        if (each / "address").read_text().strip() == wanted
    )
    subprocess.run(["ip", "link", "set", found, "name", nic, "netns", space.netns], check=True)
    try:
        space.run(["ip", "link", "set", nic, "name", name])
        yield
    finally:
        space.run(["ip", "link", "set", name, "down", "mtu", "1500"])
        space.run(["ip", "link", "set", name, "name", nic])
        space.run(["ip", "link", "set", nic, "netns", _FIRST_PROCESS])


@pytest.fixture(scope="module")
def cluster() -> Iterator[VirtioCluster]:
    with Lab() as lab, ExitStack() as stack:
        yield VirtioCluster(lab, stack)


@contextmanager
def agent_of(cluster: VirtioCluster, mode: str = "native") -> Iterator[None]:
    made = cluster.agent("--xdp", mode).start()
    try:
        yield
    finally:
        made.stop()
        cluster.a.cli("cleanup")


@pytest.mark.parametrize("nic", ["uplink", "one-queue", "unmerged"])
def test_packets_of_a_flow_are_sent_back_by_the_driver(cluster: VirtioCluster, nic: str) -> None:
    """With too few queues for one a CPU as well: then CPUs take turns with the queues of the stack."""
    with cluster.uplink(nic), agent_of(cluster):
        assert cluster.state() == "native"
        assert cluster.attached() == "xdp"
        cluster.is_served(is_forwarded=True)


def test_checksums_are_complete_whoever_was_to_compute_them(cluster: VirtioCluster) -> None:
    """The driver has its host compute them while it has a program."""
    for space in (cluster.outside, cluster.w2):
        compute_checksums(space, is_done=False)
    try:
        with cluster.uplink("uplink"), agent_of(cluster):
            cluster.is_served(is_forwarded=True)
    finally:
        for space in (cluster.outside, cluster.w2):
            compute_checksums(space, is_done=True)


def test_restarts_and_the_end_of_the_program_lose_no_connection(cluster: VirtioCluster) -> None:
    with cluster.uplink("uplink"):
        agent = cluster.agent("--xdp", "native").start()
        with connection_load.running(cluster.outside, cluster.a.address, NODE_PORT) as running:
            agent.kill()
            agent.start()
            agent.stop()
            without = cluster.agent().start()
            until(lambda: not cluster.attached(), "the program stays")
            without.stop()
            agent.start()
            assert cluster.attached() == "xdp"
        agent.stop()
        cluster.a.cli("cleanup")
    assert running.result["errors"] == []
    assert running.result["count"] > 50


def test_packets_go_from_one_device_to_another(cluster: VirtioCluster) -> None:
    """The kernel tells that the other driver takes them since Linux 6.3."""
    with cluster.uplink("uplink"), cluster.second_uplink("second") as addresses, agent_of(cluster):
        assert (cluster.attached("eth0"), cluster.attached("eth1")) == ("xdp", "xdp")
        cluster.is_served(is_forwarded=TELLS_FEATURES, addresses=addresses)


@pytest.mark.parametrize("mode", ["native", "generic"])
def test_a_driver_that_cannot_stop_its_host_from_merging_has_no_program(
    cluster: VirtioCluster, mode: str
) -> None:
    with cluster.uplink("fixed"), agent_of(cluster, mode):
        if mode == "native":
            cluster.wait_for_state(
                "Can't set XDP while host is implementing GRO_HW/CSUM, disable GRO_HW/CSUM first"
            )
        else:
            assert cluster.state() == "generic"
        cluster.is_served(is_forwarded=mode == "generic")


def set_mtus(cluster: VirtioCluster, mtu: int) -> None:
    """Sets those of all devices of client, wire, node-b and backend: what is larger than the next one's is lost."""
    for space, device in (
        *((cluster.lab.switch, port) for port in ("n1", "n2", "outside")),
        *((cluster.outside, "eth0"), (cluster.b, "eth0"), (cluster.b, "p1"), (cluster.w2, "eth0")),
    ):
        space.run(["ip", "link", "set", device, "mtu", str(mtu)])


def test_a_device_with_a_large_mtu_has_no_program_as_long_as_it_is_large(cluster: VirtioCluster) -> None:
    """The driver refuses a program then, but lets the MTU grow later.

    Then it drops what is too large for a program, and on Linux 6.1 without a program, too, once it has had one.
    """
    refused = "virtio_net: MTU too large to enable XDP"
    set_mtus(cluster, 9000)
    try:
        with cluster.uplink("large", mtu=9000), agent_of(cluster):
            until(lambda: refused in cluster.state(), "the program is not refused")
            cluster.is_served(is_forwarded=False)
            set_mtus(cluster, 3000)
            cluster.a.run(["ip", "link", "set", "eth0", "mtu", "3000"])
            until(lambda: cluster.state() == "native", "the program is not attached")
            cluster.is_served(is_forwarded=True)
            cluster.a.run(["ip", "link", "set", "eth0", "mtu", "9000"])
            until(lambda: refused in cluster.state(), "the program stays")
            assert cluster.attached() == ""
    finally:
        set_mtus(cluster, 1500)


def test_a_driver_with_buffers_of_one_packet_leaves_packets_to_tc(cluster: VirtioCluster) -> None:
    """It takes the program, but has no place in these buffers for what the program needs, and does not run it."""
    with cluster.uplink("small"), agent_of(cluster):
        assert cluster.state() == "native"
        cluster.is_served(is_forwarded=False)
