"""Flows between an external client and a backend on another node, which the XDP program forwards.

Devices are veths, whose driver has native XDP; where the kernel does not say if their peers take frames of XDP
programs, the mode is generic. The peers have GRO enabled, without which a veth drops frames of XDP
programs. Checksum offload is disabled for clients and servers: frames with a partial checksum are left to tc.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ebpfproxy.datapath.abi import uapi
from ebpfproxy.datapath.abi.hooks import XDP_ATTACH
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.programs.xdp_places import detach
from ebpfproxy.netlink.xdp_state import XdpState
from tests.e2e import connection_load
from tests.e2e.outside_client import HeldConnection, OutsideClientCluster
from tests.e2e.two_node_cluster import NODE_PORT
from tests.field.records import maps_of
from tests.field.test_check import check
from tests.lab import Agent, Lab, clients, ethtool
from tests.lab.spaces import Space
from tests.lab.waiting import until

pytestmark = pytest.mark.root

UDP_PORT = 30053
#: r0 = XDP_PASS; return.
PASS_ALL = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 2, 0x95, 0, 0, 0)
PACKETS = 20


def _tells_features() -> bool:
    with XdpState() as state:
        return state.features(1) is not None


#: The mode for a veth. Before Linux 6.3 the kernel does not say if its peer takes frames.
TELLS_FEATURES = _tells_features()
MODE = "native" if TELLS_FEATURES else "generic"


class XdpCluster(OutsideClientCluster):
    """The backend of the Service is on node-b, traffic for it comes in on node-a."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.write_web(self.w2)
        for space in (self.outside, self.w2):
            compute_checksums(space, is_done=True)

    def forwarded(self) -> int:
        """The number of packets that XDP has forwarded so far."""
        found = self.status()["packets"]
        return sum(each["packets"] for each in found if each["action"] == "forwarded")

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.a.cli("status", "-o", "json"))
        return found

    def state(self) -> str:
        """The mode of XDP at eth0, or why it has none."""
        return str(next(each["xdp"] for each in self.status()["devices"] if each["device"] == "eth0"))

    def wait_for_state(self, end: str) -> None:
        """A reason is in the agent's record, which it writes a moment after it says that programs are attached."""
        until(lambda: self.state().endswith(end), f"XDP at eth0 is not: {end}")

    def addresses(self) -> tuple[str, str]:
        return self.a.address, self.a.address6


def compute_checksums(space: Space, *, is_done: bool) -> None:
    space.call(ethtool.turn, "eth0", {"tx-checksum": not is_done})


@pytest.fixture(scope="module")
def cluster() -> Iterator[XdpCluster]:
    with Lab(takes_xdp=True) as lab:
        yield XdpCluster(lab)


@pytest.fixture
def agent(cluster: XdpCluster) -> Iterator[Agent]:
    """An agent with native XDP."""
    made = cluster.agent("--xdp", MODE).start()
    yield made
    if made.process is not None and made.process.poll() is None:
        made.stop()


def echo(address: str, port: int, times: int) -> int:
    """Sends datagrams from one socket, each after the answer to the last; returns the number of answers."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(3)
        for _ in range(times):
            sock.sendto(b"echo", (address, port))
            data, source = sock.recvfrom(100)
            assert (data, source[:2]) == (b"echo", (address, port))
    return times


def test_packets_of_a_flow_to_another_node_pass_xdp_in_both_directions(
    cluster: XdpCluster, agent: Agent
) -> None:
    """All packets but the first, which creates the flow at tc. The client sees only the frontend's address.

    At intervals a packet to each of the two next hops is left to the kernel.
    """
    assert cluster.state() == MODE
    for address in cluster.addresses():
        before = cluster.forwarded()
        assert cluster.outside.call(echo, address, UDP_PORT, PACKETS) == PACKETS
        assert PACKETS < cluster.forwarded() - before <= 2 * PACKETS - 1
        reply = cluster.outside.call(clients.ask_tcp, address, NODE_PORT)
        assert (reply["name"], reply["peer"]) == ("w2", address)
        assert tuple(reply["getpeername"]) == (address, NODE_PORT)


def test_data_in_both_directions_is_intact_and_the_flow_ends(cluster: XdpCluster, agent: Agent) -> None:
    """Every checksum is right: the receivers compute them. Commands see the flow as any other."""
    for address in cluster.addresses():
        before = cluster.forwarded()
        assert cluster.outside.call(clients.is_echoed, address, NODE_PORT, 2_000_000)
        assert cluster.forwarded() - before > 1000
    flows = json.loads(cluster.a.cli("conntrack", "list", "-o", "json"))
    assert flows


def test_packets_with_a_partial_checksum_are_left_to_tc(cluster: XdpCluster, agent: Agent) -> None:
    """The sender's kernel leaves the checksum to its device; an XDP program has no flag for that."""
    for space in (cluster.outside, cluster.w2):
        compute_checksums(space, is_done=False)
    try:
        for address in cluster.addresses():
            before = cluster.forwarded()
            assert cluster.outside.call(echo, address, UDP_PORT, PACKETS) == PACKETS
            assert cluster.outside.call(clients.is_echoed, address, NODE_PORT, 500_000)
            # One packet in 65,536 looks as if it had its checksum.
            assert cluster.forwarded() - before < 3
    finally:
        for space in (cluster.outside, cluster.w2):
            compute_checksums(space, is_done=True)


def test_flow_alternates_between_xdp_and_tc(cluster: XdpCluster, agent: Agent) -> None:
    """XDP passes a packet whose next hop has no link address; at tc the kernel resolves it."""
    for address, hops in zip(
        cluster.addresses(),
        ((cluster.b.address, cluster.outside.address), (cluster.b.address6, cluster.outside.address6)),
        strict=True,
    ):
        held = HeldConnection(cluster.outside, address, NODE_PORT)
        for hop in hops * 2:
            before = cluster.forwarded()
            assert held.ask() == "alive"
            assert cluster.forwarded() > before
            cluster.a.run(["ip", "neighbour", "flush", "to", hop, "dev", "eth0"])
            assert held.ask() == "alive"


@pytest.mark.parametrize("arguments", [("--xdp", MODE), ("--bypass-netfilter",)], ids=lambda each: each[0])
def test_next_hops_are_verified_while_programs_send_to_them(
    cluster: XdpCluster, agent: Agent, arguments: tuple[str, ...]
) -> None:
    """The new link address of a node is found, as where the kernel forwards."""
    agent.stop()
    other = cluster.agent(*arguments).start()
    try:
        held = [HeldConnection(cluster.outside, address, NODE_PORT) for address in cluster.addresses()]
        link_address = cluster.b.run(["ip", "-o", "link", "show", "dev", "eth0"]).split("link/ether ")[1][:17]
        hops = (cluster.b.address, cluster.b.address6)
        for hop in hops:
            entry = [hop, "lladdr", link_address, "dev", "eth0", "nud", "stale"]
            cluster.a.run(["ip", "neighbour", "replace", *entry])

        def verified() -> bool:
            assert [each.ask() for each in held] == ["alive", "alive"]
            return all("STALE" not in cluster.a.run(["ip", "neighbour", "show", "to", hop]) for hop in hops)

        until(verified, "a next hop stays stale")
    finally:
        other.stop()


def names_of(cluster: XdpCluster) -> set[str]:
    return set(cluster.outside.call(clients.spread_tcp, cluster.a.address, NODE_PORT, clients.ENOUGH))


def test_a_backend_on_this_node_is_not_forwarded(cluster: XdpCluster, agent: Agent) -> None:
    """Netfilter sees the flow, as without XDP."""
    cluster.write_web(cluster.w1)
    try:
        until(lambda: names_of(cluster) == {"w1"})
        before = cluster.forwarded()
        assert cluster.outside.call(echo, cluster.a.address, UDP_PORT, PACKETS) == PACKETS
        assert cluster.outside.call(clients.ask_tcp, cluster.a.address, NODE_PORT)["peer"] == "10.244.1.1"
        assert cluster.forwarded() == before
    finally:
        cluster.write_web(cluster.w2)
        until(lambda: names_of(cluster) == {"w2"})


def test_packets_with_few_hops_left_or_options_are_left_to_tc(cluster: XdpCluster, agent: Agent) -> None:
    address = cluster.a.address
    cluster.outside.call(echo, address, UDP_PORT, 2)
    before = cluster.forwarded()
    assert cluster.outside.call(_with_options, address, UDP_PORT) == b"echo"
    # The answer has no options.
    assert cluster.forwarded() - before <= 1


def _with_options(address: str, port: int) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(3)
        # Four times IPOPT_NOOP.
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, b"\1" * 4)
        sock.sendto(b"echo", (address, port))
        return sock.recv(100)


def test_restarts_and_a_change_of_options_lose_no_connection(cluster: XdpCluster, agent: Agent) -> None:
    """The program is replaced atomically, detached, and attached again; tc translates the flows in the meantime."""
    with connection_load.running(cluster.outside, cluster.a.address, NODE_PORT) as running:
        agent.kill()
        agent.start()
        agent.stop()
        without = cluster.agent().start()
        until(lambda: not list(links(cluster)), "the program stays")
        held = HeldConnection(cluster.outside, cluster.a.address, NODE_PORT)
        without.stop()
        # Other constants make another program.
        other = cluster.agent("--xdp", MODE, "--masquerade-all").start()
        until(lambda: cluster.state() == MODE)
        assert held.ask() == "alive"
        other.stop()
        agent.start()
    assert running.result["errors"] == []
    assert running.result["count"] > 50


def links(cluster: XdpCluster) -> Iterator[Path]:
    return (cluster.a.bpf_root / "ebpfproxy" / "links").glob("xdp-*")


def test_a_foreign_program_stays(cluster: XdpCluster, agent: Agent) -> None:
    """tc serves the Services; the agent attaches its program once the foreign one is gone."""
    agent.stop()
    cluster.a.cli("cleanup")
    assert list(links(cluster)) == []
    pin = cluster.a.bpf_root.parent / "foreign"
    number = cluster.a.call(_attach_foreign, str(pin))
    other = cluster.agent("--xdp", MODE).start()
    try:
        cluster.wait_for_state(f"another XDP program is attached (id {number})")
        assert f"another XDP program is attached (id {number})" in cluster.a.cli("status")
        before = cluster.forwarded()
        assert cluster.outside.call(echo, cluster.a.address, UDP_PORT, PACKETS) == PACKETS
        assert cluster.forwarded() == before
    finally:
        pin.unlink()
    until(lambda: cluster.state() == MODE, "the program is not attached")
    assert cluster.outside.call(echo, cluster.a.address, UDP_PORT, PACKETS) == PACKETS
    assert cluster.forwarded() > before
    other.stop()


def _attach_foreign(pin: str) -> int:
    program = bpf.prog_load(uapi.PROG_XDP, XDP_ATTACH, "foreign", PASS_ALL)
    link = bpf.link_create(program, socket.if_nametoindex("eth0"), XDP_ATTACH, 1 << 2)
    bpf.pin(link, Path(pin))
    number = int(bpf.prog_info(program).id)
    os.close(link)
    os.close(program)
    return number


def test_a_detached_program_leaves_its_device_at_once(cluster: XdpCluster) -> None:
    """The kernel frees a link a moment after its last reference, and until then refuses another mode."""
    pin = cluster.a.bpf_root / "xdp-link"
    pin.parent.mkdir(parents=True, exist_ok=True)
    assert cluster.a.call(_attach_often, str(pin), 50) == 50


def _attach_often(pin: str, count: int) -> int:
    program = bpf.prog_load(uapi.PROG_XDP, XDP_ATTACH, "passes", PASS_ALL)
    for at in range(count):
        link = bpf.link_create(program, socket.if_nametoindex("p1"), XDP_ATTACH, 1 << (1 + at % 2))
        bpf.pin(link, Path(pin))
        os.close(link)
        detach(Path(pin))
    os.close(program)
    return count


@pytest.mark.skipif(TELLS_FEATURES, reason="this kernel says if a veth's peer takes frames of XDP programs")
def test_veth_has_no_native_program_where_the_kernel_does_not_tell_about_its_peer(
    cluster: XdpCluster, agent: Agent
) -> None:
    agent.stop()
    other = cluster.agent("--xdp", "native").start()
    try:
        cluster.wait_for_state("does not say if its peer takes frames of XDP programs: Linux 6.3 does")
        before = cluster.forwarded()
        assert cluster.outside.call(echo, cluster.a.address, UDP_PORT, PACKETS) == PACKETS
        assert cluster.forwarded() == before
    finally:
        other.stop()


@pytest.mark.skipif(
    not TELLS_FEATURES, reason="this kernel does not say if a veth's peer takes frames of XDP programs"
)
@pytest.mark.parametrize("mode", ["native", "generic"])
def test_veth_whose_peer_receives_no_xdp_frames_gets_no_native_program(
    cluster: XdpCluster, agent: Agent, mode: str
) -> None:
    agent.stop()
    cluster.lab.switch.call(ethtool.turn, "n1", {"gro": False})
    other = cluster.agent("--xdp", mode).start()
    try:
        reason = "its peer takes no frames of XDP programs: it has neither such a program nor GRO"
        cluster.wait_for_state(reason if mode == "native" else "generic")
        before = cluster.forwarded()
        assert cluster.outside.call(echo, cluster.a.address, UDP_PORT, PACKETS) == PACKETS
        # Generic XDP runs where a packet buffer exists.
        assert (cluster.forwarded() > before) == (mode == "generic")
        cluster.lab.switch.call(ethtool.turn, "n1", {"gro": True})
        until(lambda: cluster.state() == MODE, "the program is not attached")
        assert cluster.outside.call(echo, cluster.a.address, UDP_PORT, PACKETS) == PACKETS
    finally:
        cluster.lab.switch.call(ethtool.turn, "n1", {"gro": True})
        other.stop()


def _detach(cluster: XdpCluster) -> None:
    (pin,) = links(cluster)
    cluster.a.run(["bpftool", "link", "detach", "pinned", str(pin)])


def _replace(cluster: XdpCluster) -> None:
    (pin,) = links(cluster)
    program = bpf.prog_load(uapi.PROG_XDP, XDP_ATTACH, "foreign", PASS_ALL)
    with bpf.opened(pin) as link:
        bpf.link_update(link, program)
    os.close(program)


def _forget_devices(cluster: XdpCluster) -> None:
    with maps_of(cluster.a) as maps:
        for key, _ in list(maps["xdp_devices"].items()):
            bpf.map_delete(maps["xdp_devices"].fd, key)


TAMPERED = [
    (_detach, ("devices", "detached", "eth0 xdp")),
    (_replace, ("devices", "replaced", "eth0 xdp")),
    (_forget_devices, ("xdp_devices", "missing", "device ")),
]


def findings_of(found: dict[str, Any], where: str = "findings") -> list[tuple[str, str, str]]:
    return [
        (each["where"], each["kind"], each["what"].rstrip("0123456789"))
        for each in found[where]
        if not each["warning"]
    ]


def is_forwarding(cluster: XdpCluster) -> bool:
    before = cluster.forwarded()
    cluster.outside.call(echo, cluster.a.address, UDP_PORT, PACKETS)
    return cluster.forwarded() > before


@pytest.mark.parametrize(("tamper", "expected"), TAMPERED)
def test_drift_of_xdp_is_reported_and_repaired(
    cluster: XdpCluster, tamper: Callable[[XdpCluster], None], expected: tuple[str, str, str]
) -> None:
    """The agent compares only at a request, but attaches lost programs every ten seconds: then the test tampers again."""
    agent = cluster.agent("--xdp", MODE, "--drift-check-seconds", "0").start()

    def check_after_tampering(where: str, *arguments: str) -> list[tuple[str, str, str]]:
        tamper(cluster)
        return findings_of(json.loads(cluster.a.cli("check", "-o", "json", *arguments, check=False)), where)

    try:
        until(lambda: is_forwarding(cluster))
        until(lambda: check_after_tampering("findings") == [expected])
        until(lambda: check_after_tampering("repaired", "--repair") == [expected])
        assert is_forwarding(cluster)
        assert findings_of(check(cluster.a, good=True)) == []
    finally:
        agent.stop()


@pytest.mark.parametrize("kind", ["detached", "replaced"])
def test_lost_program_is_reported_without_an_agent(cluster: XdpCluster, agent: Agent, kind: str) -> None:
    cluster.state()
    agent.stop()
    {"detached": _detach, "replaced": _replace}[kind](cluster)
    found = check(cluster.a, good=False)
    assert findings_of(found) == [("agent", "missing", "not running"), ("devices", kind, "eth0 xdp")]
    foreign = [each["what"] for each in found["findings"] if each["kind"] == "foreign"]
    assert foreign == []


def test_foreign_program_is_a_warning(cluster: XdpCluster, agent: Agent) -> None:
    agent.stop()
    cluster.a.cli("cleanup")
    pin = cluster.a.bpf_root.parent / "foreign"
    number = cluster.a.call(_attach_foreign, str(pin))
    other = cluster.agent("--xdp", MODE).start()
    try:
        (found,) = [each for each in check(cluster.a, good=True)["findings"] if each["kind"] == "foreign"]
        assert (found["where"], found["what"]) == ("devices", f"eth0 xdp: program {number} foreign")
    finally:
        pin.unlink()
        other.stop()


def test_native_mode_is_not_tried_again_with_a_driver_that_refuses_it(
    cluster: XdpCluster, agent: Agent
) -> None:
    """A device has one XDP program: each attempt would detach the generic one."""
    agent.stop()
    cluster.a.cli("cleanup")
    until(lambda: "xdp" not in cluster.a.run(["ip", "link", "show", "dev", "eth0"]))
    cluster.lab.switch.run(["ip", "link", "set", "n1", "mtu", "9000"])
    other = cluster.agent("--xdp", "generic").start()
    try:
        assert cluster.state() == "generic"
        (pin,) = links(cluster)
        with bpf.opened(pin) as link:
            for name in ("one", "two"):
                # Each change of the node's devices has the program attached where it is not.
                cluster.a.run(["ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}-peer"])
                until(partial(_has_device, cluster, name))
            assert bpf.xdp_link_info(link).ifindex
    finally:
        cluster.lab.switch.run(["ip", "link", "set", "n1", "mtu", "1500"])
        for name in ("one", "two"):
            cluster.a.run(["ip", "link", "delete", name], check=False)
        other.stop()


def test_pin_of_an_agent_killed_while_attaching_is_not_taken_for_foreign(
    cluster: XdpCluster, agent: Agent
) -> None:
    agent.kill()
    (pin,) = links(cluster)
    pin.rename(pin.with_name(f"{pin.name}-new"))
    other = cluster.agent("--xdp", MODE).start()
    try:
        assert cluster.state() == MODE
        assert list(links(cluster)) == [pin]
    finally:
        other.stop()


def _has_device(cluster: XdpCluster, name: str) -> bool:
    return any(each["device"] == name for each in cluster.status()["devices"])


def test_cleanup_detaches_the_program(cluster: XdpCluster, agent: Agent) -> None:
    assert len(list(links(cluster))) == 1
    agent.stop()
    assert "detached xdp-" in cluster.a.cli("cleanup")
    assert "prog/xdp" not in cluster.a.run(["ip", "link", "show", "dev", "eth0"])
