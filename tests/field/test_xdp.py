"""Flows between a client outside and a backend on another node, forwarded by the XDP program.

Devices are veths, whose driver has native XDP. The other ends have GRO, without which they take no frames of
XDP programs. Clients and servers compute checksums by themselves: what a veth carries without is tc's.
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
from ebpfproxy.datapath.programs.xdp import XdpAttacher
from tests.e2e import load
from tests.e2e.outer import Held, Outer
from tests.e2e.test_outside import _stream as stream
from tests.e2e.world import NODE_PORT
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


class World(Outer):
    """The backend of the Service is on node-b, traffic for it comes in on node-a."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.write_web(self.w2)
        for space in (self.outside, self.w2):
            compute_checksums(space, is_done=True)

    def forwarded(self) -> int:
        """Packets so far."""
        found = self.status()["packets"]
        return sum(each["packets"] for each in found if each["action"] == "forwarded")

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.a.cli("status", "-o", "json"))
        return found

    def state(self) -> str:
        """The mode of XDP at eth0, or why it has none."""
        return str(next(each["xdp"] for each in self.status()["devices"] if each["device"] == "eth0"))

    def addresses(self) -> tuple[str, str]:
        return self.a.address, self.a.address6


def compute_checksums(space: Space, *, is_done: bool) -> None:
    space.call(ethtool.turn, "eth0", {"tx-checksum": not is_done})


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with Lab(takes_xdp=True) as lab:
        yield World(lab)


@pytest.fixture
def agent(world: World) -> Iterator[Agent]:
    """An agent with native XDP."""
    made = world.agent("--xdp", "native").start()
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


def test_packets_of_a_flow_to_another_node_pass_xdp_in_both_directions(world: World, agent: Agent) -> None:
    """All but the first packet, which creates the flow at tc; the client sees the frontend alone.

    Once in a while the kernel sends a packet to each of the two next hops.
    """
    assert world.state() == "native"
    for address in world.addresses():
        before = world.forwarded()
        assert world.outside.call(echo, address, UDP_PORT, PACKETS) == PACKETS
        assert PACKETS < world.forwarded() - before <= 2 * PACKETS - 1
        reply = world.outside.call(clients.ask_tcp, address, NODE_PORT)
        assert (reply["name"], reply["peer"]) == ("w2", address)
        assert tuple(reply["getpeername"]) == (address, NODE_PORT)


def test_data_in_both_directions_is_intact_and_the_flow_ends(world: World, agent: Agent) -> None:
    """Every checksum is right: the receivers compute them. Commands see the flow as any other."""
    for address in world.addresses():
        before = world.forwarded()
        assert world.outside.call(stream, address, NODE_PORT, 2_000_000)
        assert world.forwarded() - before > 1000
    flows = json.loads(world.a.cli("conntrack", "list", "-o", "json"))
    assert flows


def test_packets_without_a_checksum_yet_are_left_to_tc(world: World, agent: Agent) -> None:
    """The sender's kernel leaves it to its device: no hint of that reaches the program."""
    for space in (world.outside, world.w2):
        compute_checksums(space, is_done=False)
    try:
        for address in world.addresses():
            before = world.forwarded()
            assert world.outside.call(echo, address, UDP_PORT, PACKETS) == PACKETS
            assert world.outside.call(stream, address, NODE_PORT, 500_000)
            # One packet in 65,536 looks as if it had its checksum.
            assert world.forwarded() - before < 3
    finally:
        for space in (world.outside, world.w2):
            compute_checksums(space, is_done=True)


def test_a_flow_goes_on_where_xdp_and_tc_take_turns(world: World, agent: Agent) -> None:
    """XDP leaves a packet alone whose next hop has no link address; tc has it asked for."""
    for address, hops in zip(
        world.addresses(),
        ((world.b.address, world.outside.address), (world.b.address6, world.outside.address6)),
        strict=True,
    ):
        held = Held(world.outside, address, NODE_PORT)
        for hop in hops * 2:
            before = world.forwarded()
            assert held.ask() == "alive"
            assert world.forwarded() > before
            world.a.run(["ip", "neighbour", "flush", "to", hop, "dev", "eth0"])
            assert held.ask() == "alive"


@pytest.mark.parametrize(
    "arguments", [("--xdp", "native"), ("--bypass-netfilter",)], ids=lambda each: each[0]
)
def test_next_hops_are_verified_while_programs_send_to_them(
    world: World, agent: Agent, arguments: tuple[str, ...]
) -> None:
    """A node that gets another link address is found, as where the kernel forwards."""
    agent.stop()
    other = world.agent(*arguments).start()
    try:
        held = [Held(world.outside, address, NODE_PORT) for address in world.addresses()]
        link_address = world.b.run(["ip", "-o", "link", "show", "dev", "eth0"]).split("link/ether ")[1][:17]
        hops = (world.b.address, world.b.address6)
        for hop in hops:
            entry = [hop, "lladdr", link_address, "dev", "eth0", "nud", "stale"]
            world.a.run(["ip", "neighbour", "replace", *entry])

        def verified() -> bool:
            assert [each.ask() for each in held] == ["alive", "alive"]
            return all("STALE" not in world.a.run(["ip", "neighbour", "show", "to", hop]) for hop in hops)

        until(verified, "a next hop stays stale")
    finally:
        other.stop()


def test_a_backend_on_this_node_is_not_forwarded(world: World, agent: Agent) -> None:
    """Its flow is netfilter's, as without XDP."""
    world.write_web(world.w1)
    try:
        until(lambda: world.outside.call(clients.ask_tcp, world.a.address, NODE_PORT)["name"] == "w1")
        before = world.forwarded()
        assert world.outside.call(echo, world.a.address, UDP_PORT, PACKETS) == PACKETS
        assert world.outside.call(clients.ask_tcp, world.a.address, NODE_PORT)["peer"] == "10.244.1.1"
        assert world.forwarded() == before
    finally:
        world.write_web(world.w2)
        until(lambda: world.outside.call(clients.ask_tcp, world.a.address, NODE_PORT)["name"] == "w2")


def test_packets_with_few_hops_left_or_options_are_left_to_tc(world: World, agent: Agent) -> None:
    address = world.a.address
    world.outside.call(echo, address, UDP_PORT, 2)
    before = world.forwarded()
    assert world.outside.call(_with_options, address, UDP_PORT) == b"echo"
    # The answer has no options.
    assert world.forwarded() - before <= 1


def _with_options(address: str, port: int) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(3)
        # Four times IPOPT_NOOP.
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, b"\1" * 4)
        sock.sendto(b"echo", (address, port))
        return sock.recv(100)


def test_restarts_and_a_change_of_options_lose_no_connection(world: World, agent: Agent) -> None:
    """The program is replaced in one step, taken away, and attached again; flows go on at tc meanwhile."""
    with load.running(world.outside, world.a.address, NODE_PORT) as running:
        agent.kill()
        agent.start()
        agent.stop()
        without = world.agent().start()
        until(lambda: not list(links(world)), "the program stays")
        held = Held(world.outside, world.a.address, NODE_PORT)
        without.stop()
        # Other constants make another program.
        other = world.agent("--xdp", "native", "--masquerade-all").start()
        until(lambda: world.state() == "native")
        assert held.ask() == "alive"
        other.stop()
        agent.start()
    assert running.result["errors"] == []
    assert running.result["count"] > 50


def links(world: World) -> Iterator[Path]:
    return (world.a.bpf_root / "ebpfproxy" / "links").glob("xdp-*")


def test_a_foreign_program_stays(world: World, agent: Agent) -> None:
    """Services are served at tc; ours is attached once the other one is gone."""
    agent.stop()
    world.a.cli("cleanup")
    assert list(links(world)) == []
    pin = world.a.bpf_root.parent / "foreign"
    number = world.a.call(_attach_foreign, str(pin))
    other = world.agent("--xdp", "native").start()
    try:
        assert world.state() == f"another XDP program is attached (id {number})"
        assert f"another XDP program is attached (id {number})" in world.a.cli("status")
        assert world.outside.call(echo, world.a.address, UDP_PORT, PACKETS) == PACKETS
        assert world.forwarded() == 0
    finally:
        pin.unlink()
    until(lambda: world.state() == "native", "the program is not attached")
    assert world.outside.call(echo, world.a.address, UDP_PORT, PACKETS) == PACKETS
    assert world.forwarded()
    other.stop()


def _attach_foreign(pin: str) -> int:
    program = bpf.prog_load(uapi.PROG_XDP, XDP_ATTACH, "foreign", PASS_ALL)
    link = bpf.link_create(program, socket.if_nametoindex("eth0"), XDP_ATTACH, 1 << 2)
    bpf.pin(link, Path(pin))
    number = int(bpf.prog_info(program).id)
    os.close(link)
    os.close(program)
    return number


def test_a_detached_program_leaves_its_device_at_once(world: World) -> None:
    """The kernel ends a link a moment after its last reference; another mode has no place until then."""
    pin = world.a.bpf_root / "xdp-link"
    pin.parent.mkdir(parents=True, exist_ok=True)
    assert world.a.call(_attach_often, str(pin), 50) == 50


def _attach_often(pin: str, count: int) -> int:
    program = bpf.prog_load(uapi.PROG_XDP, XDP_ATTACH, "passes", PASS_ALL)
    for at in range(count):
        link = bpf.link_create(program, socket.if_nametoindex("p1"), XDP_ATTACH, 1 << (1 + at % 2))
        bpf.pin(link, Path(pin))
        os.close(link)
        XdpAttacher.detach(Path(pin))
    os.close(program)
    return count


@pytest.mark.parametrize("mode", ["native", "generic"])
def test_a_veth_whose_other_end_takes_no_frames_has_no_native_program(
    world: World, agent: Agent, mode: str
) -> None:
    agent.stop()
    world.lab.switch.call(ethtool.turn, "n1", {"gro": False})
    other = world.agent("--xdp", mode).start()
    try:
        reason = "its peer takes no frames of XDP programs: it has neither such a program nor GRO"
        assert world.state() == (reason if mode == "native" else "generic")
        assert world.outside.call(echo, world.a.address, UDP_PORT, PACKETS) == PACKETS
        # Generic XDP runs where a packet buffer exists.
        assert bool(world.forwarded()) or mode == "native"
        world.lab.switch.call(ethtool.turn, "n1", {"gro": True})
        until(lambda: world.state() == "native", "the program is not attached")
        assert world.outside.call(echo, world.a.address, UDP_PORT, PACKETS) == PACKETS
    finally:
        world.lab.switch.call(ethtool.turn, "n1", {"gro": True})
        other.stop()


def _detach(world: World) -> None:
    (pin,) = links(world)
    world.a.run(["bpftool", "link", "detach", "pinned", str(pin)])


def _replace(world: World) -> None:
    (pin,) = links(world)
    program = bpf.prog_load(uapi.PROG_XDP, XDP_ATTACH, "foreign", PASS_ALL)
    with bpf.opened(pin) as link:
        bpf.link_update(link, program)
    os.close(program)


def _forget_devices(world: World) -> None:
    with maps_of(world.a) as maps:
        for key, _ in list(maps["xdp_devices"].items()):
            bpf.map_delete(maps["xdp_devices"].fd, key)


TAMPERED = [
    (_detach, ("devices", "detached", "eth0 xdp")),
    (_replace, ("devices", "replaced", "eth0 xdp")),
    (_forget_devices, ("xdp_devices", "missing", "device ")),
]


def wrong(found: dict[str, Any], where: str = "findings") -> list[tuple[str, str, str]]:
    return [
        (each["where"], each["kind"], each["what"].rstrip("0123456789"))
        for each in found[where]
        if not each["warning"]
    ]


def forwards(world: World) -> bool:
    before = world.forwarded()
    world.outside.call(echo, world.a.address, UDP_PORT, PACKETS)
    return world.forwarded() > before


@pytest.mark.parametrize(("tamper", "expected"), TAMPERED)
def test_what_somebody_changes_is_named_and_repaired(
    world: World, tamper: Callable[[World], None], expected: tuple[str, str, str]
) -> None:
    """The agent compares only when it is asked to, but attaches every ten seconds what is lost: then again."""
    agent = world.agent("--xdp", "native", "--drift-check-seconds", "0").start()

    def said(where: str, *arguments: str) -> list[tuple[str, str, str]]:
        tamper(world)
        return wrong(json.loads(world.a.cli("check", "-o", "json", *arguments, check=False)), where)

    try:
        until(lambda: forwards(world))
        until(lambda: said("findings") == [expected])
        until(lambda: said("repaired", "--repair") == [expected])
        assert forwards(world)
        assert wrong(check(world.a, good=True)) == []
    finally:
        agent.stop()


@pytest.mark.parametrize("kind", ["detached", "replaced"])
def test_without_an_agent_a_lost_program_is_named(world: World, agent: Agent, kind: str) -> None:
    world.state()
    agent.stop()
    {"detached": _detach, "replaced": _replace}[kind](world)
    found = check(world.a, good=False)
    assert wrong(found) == [("agent", "missing", "not running"), ("devices", kind, "eth0 xdp")]
    foreign = [each["what"] for each in found["findings"] if each["kind"] == "foreign"]
    assert foreign == []


def test_a_program_of_somebody_else_is_a_warning(world: World, agent: Agent) -> None:
    agent.stop()
    world.a.cli("cleanup")
    pin = world.a.bpf_root.parent / "foreign"
    number = world.a.call(_attach_foreign, str(pin))
    other = world.agent("--xdp", "native").start()
    try:
        (found,) = [each for each in check(world.a, good=True)["findings"] if each["kind"] == "foreign"]
        assert (found["where"], found["what"]) == ("devices", f"eth0 xdp: program {number} foreign")
    finally:
        pin.unlink()
        other.stop()


def test_a_driver_that_refuses_the_program_is_not_asked_again_and_again(world: World, agent: Agent) -> None:
    """The device has one program: each question would take the generic one away."""
    agent.stop()
    world.a.cli("cleanup")
    until(lambda: "xdp" not in world.a.run(["ip", "link", "show", "dev", "eth0"]))
    world.lab.switch.run(["ip", "link", "set", "n1", "mtu", "9000"])
    other = world.agent("--xdp", "generic").start()
    try:
        assert world.state() == "generic"
        (pin,) = links(world)
        with bpf.opened(pin) as link:
            for name in ("one", "two"):
                # Each change of the node's devices has the program attached where it is not.
                world.a.run(["ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}-peer"])
                until(partial(_has_device, world, name))
            assert bpf.xdp_link_info(link).ifindex
    finally:
        world.lab.switch.run(["ip", "link", "set", "n1", "mtu", "1500"])
        for name in ("one", "two"):
            world.a.run(["ip", "link", "delete", name], check=False)
        other.stop()


def test_a_pin_of_an_agent_that_was_killed_while_it_attached_is_no_foreign_program(
    world: World, agent: Agent
) -> None:
    agent.kill()
    (pin,) = links(world)
    pin.rename(pin.with_name(f"{pin.name}-new"))
    other = world.agent("--xdp", "native").start()
    try:
        assert world.state() == "native"
        assert list(links(world)) == [pin]
    finally:
        other.stop()


def _has_device(world: World, name: str) -> bool:
    return any(each["device"] == name for each in world.status()["devices"])


def test_cleanup_detaches_the_program(world: World, agent: Agent) -> None:
    assert len(list(links(world))) == 1
    agent.stop()
    assert "detached xdp-" in world.a.cli("cleanup")
    assert "prog/xdp" not in world.a.run(["ip", "link", "show", "dev", "eth0"])
