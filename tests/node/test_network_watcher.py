"""The node's network as the kernel tells of it, in network namespaces."""

from __future__ import annotations

import resource
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from ebpfproxy.netlink.rtnetlink import ROUTE_GROUPS
from ebpfproxy.node import network as rules
from ebpfproxy.node import network_watcher as module
from ebpfproxy.node.facts import Facts, NodeFacts
from ebpfproxy.node.kernel_tables import dump_routes
from ebpfproxy.node.network import Network
from ebpfproxy.node.network_watcher import NetworkWatcher
from tests.lab import Lab
from tests.lab.waiting import until
from tests.node.test_network import V4, _text, packed, roles


def _into(seen: list[Network]) -> Callable[[Facts], None]:
    return lambda facts: seen.append(rules.network_of(facts, NodeFacts()))


def _follow(script: list[tuple[str, str]]) -> None:
    """Runs commands and waits after each for the expected state, which only events report: nothing is polled."""
    seen: list[Network] = []
    watcher = NetworkWatcher(_into(seen))
    watcher.start()
    assert seen, "the first state is delivered before start returns"
    for command, expected in script:
        deadline = time.monotonic() + 60
        subprocess.run(command.split(), check=True)
        while time.monotonic() < deadline:
            shown = {
                "devices": {d.name: d.role.name for d in seen[-1].devices},
                "addresses": sorted(map(_text, seen[-1].addresses)),
            }
            if _holds(shown, expected):
                break
            time.sleep(0.005)
        else:
            raise AssertionError(f"after {command!r}: {shown}")


def _holds(shown: dict[str, Any], expected: str) -> bool:
    absent = expected.startswith("no ")
    name, _, role = expected.removeprefix("no ").partition("=")
    there = name in shown["addresses"] or shown["devices"].get(name) == (
        role or shown["devices"].get(name, 0)
    )
    return there != absent


@pytest.mark.root
def test_added_and_removed_devices_and_addresses_are_followed() -> None:
    script = [
        ("ip link add hot type veth peer name hot-peer", "hot=LOCAL"),
        ("ip link set hot up", "hot=LOCAL"),
        ("ip address add 192.0.2.7/24 dev hot", "192.0.2.7"),
        ("ip route add default via 192.0.2.254 dev hot metric 5", "hot=UPLINK"),
        ("ip link set hot down", "hot=OUTSIDE"),
        ("ip link set hot name wan", "wan=OUTSIDE"),
        ("ip link add br7 type bridge", "br7=LOCAL"),
        ("ip link set wan master br7", "wan=LOCAL"),
        ("ip address add fd00::7/128 dev br7 nodad", "fd00::7"),
        ("ip address del fd00::7/128 dev br7", "no fd00::7"),
        ("ip link add vx7 type vxlan id 7 dstport 4789 remote 192.0.2.9", "vx7=TUNNEL"),
        ("ip link del wan", "no wan"),
    ]
    with Lab() as lab:
        node = lab.node("node-a")
        node.call(_follow, script, timeout=240)


@pytest.mark.root
def test_bridge_becomes_the_uplink_and_its_ports_lose_their_role() -> None:
    script = [
        ("ip link add wan8 type veth peer name wan8-peer", "wan8=LOCAL"),
        ("ip link add br8 type bridge", "br8=LOCAL"),
        ("ip link set br8 up", "br8=LOCAL"),
        ("ip address add 198.51.100.1/24 dev br8", "198.51.100.1"),
        ("ip link set wan8 master br8", "wan8=LOCAL"),
        ("ip route add default via 198.51.100.254 dev br8 metric 5", "br8=UPLINK"),
        ("ip link set wan8 up", "no wan8"),
        ("ip link set wan8 nomaster", "wan8=LOCAL"),
        ("ip tuntap add tun8 mode tun", "tun8=TUNNEL"),
        ("ip tuntap add tap8 mode tap", "tap8=LOCAL"),
    ]
    with Lab() as lab:
        lab.node("node-a").call(_follow, script, timeout=240)


def _run(*commands: str) -> None:
    subprocess.run(["ip", "-batch", "-"], input="\n".join(commands).encode(), check=True)


def _read_after(*commands: str) -> Network:
    _run(*commands)
    return _read()


OTHER = ("link add other type veth peer name peer", "link set other up", "link set peer up")


@pytest.mark.root
def test_default_routes_of_other_tables_make_no_uplink() -> None:
    routes = (
        "address add 203.0.113.1/24 dev other",
        "route add default via 203.0.113.254 dev other table 100",
        "route add default dev other table 100 metric 5",
    )
    with Lab() as lab:
        network = lab.node("node-a").call(_read_after, *OTHER, *routes)
    assert roles(network) == {"eth0": "UPLINK", "other": "OUTSIDE", "peer": "LOCAL"}


@pytest.mark.root
def test_every_nexthop_of_a_multipath_default_route_is_an_uplink_and_its_source_is_primary() -> None:
    routes = (
        "address add 203.0.113.1/24 dev other",
        "address add 203.0.113.9/32 dev lo",
        "route replace default src 203.0.113.9"
        " nexthop via 203.0.113.254 dev other nexthop via 172.18.0.254 dev eth0",
    )
    with Lab() as lab:
        network = lab.node("node-a").call(_read_after, *OTHER, *routes)
    assert roles(network) == {"eth0": "UPLINK", "other": "UPLINK", "peer": "LOCAL"}
    assert network.primary[0] == packed("203.0.113.9")


@pytest.mark.root
def test_masquerading_uses_no_secondary_and_no_deprecated_address() -> None:
    addresses = (
        "address add 2001:db8::1/64 dev other nodad preferred_lft 0",
        "address add 2001:db8::2/64 dev other nodad",
        "address add 2001:db8::3/64 dev other nodad preferred_lft 0",
        "address add 203.0.113.1/24 dev other",
        "address add 203.0.113.2/24 dev other",
    )
    with Lab() as lab:
        network = lab.node("node-a").call(_read_after, *OTHER, *addresses)
    other = next(d for d in network.devices if d.name == "other")
    assert (other.address4, other.address6) == (packed("203.0.113.1"), packed("2001:db8::2"))
    assert {packed("203.0.113.2"), packed("2001:db8::3")} <= network.addresses


@pytest.mark.root
def test_kernel_without_an_address_family_has_no_routes_of_it() -> None:
    """A dump of a missing family (here 12, DECnet) has routes of those that the kernel has."""
    with Lab() as lab:
        assert lab.node("node-a").call(_count_default_routes, 12, V4) == [0, 1]


def _count_default_routes(*families: int) -> list[int]:
    return [len(list(dump_routes(family))) for family in families]


@pytest.mark.root
def test_default_route_is_found_among_thousands_of_routes() -> None:
    with Lab() as lab:
        network, seconds, heard = lab.node("node-a").call(_with_many_routes)
    assert roles(network) == {"eth0": "UPLINK"}, "by the IPv6 route, the last of a dump, only"
    assert seconds < 0.5
    assert heard == 1, "only the default route's change is an event"


def _with_many_routes() -> tuple[Network, float, int]:
    """Returns what was read, its processor time, and the events until the default route is removed."""
    many = [f"20.{n >> 8}.{n & 255}.0/24 via 172.18.0.254" for n in range(3000)]
    many += [f"fd01:{n:x}::/64 via fd00:172:18::fe" for n in range(3000)]
    _run("route del default", *(f"route add {route}" for route in many))
    seen: list[Network] = []
    began = time.process_time()
    NetworkWatcher(_into(seen)).start()
    seconds = time.process_time() - began
    first = seen[-1]
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as events:
        module._filter_route_events(events)
        events.bind((0, ROUTE_GROUPS))
        _run(*(f"route del {route}" for route in many[::6]))
        _run("route del default via fd00:172:18::fe")
        until(lambda: seen[-1].devices[0].why != "has a default route")
        heard = 0
        with suppress(BlockingIOError):
            while events.recv(65536, socket.MSG_DONTWAIT):
                heard += 1
    return first, seconds, heard


@pytest.mark.root
def test_burst_of_new_pods_causes_few_reads() -> None:
    with Lab() as lab:
        delivered, took = lab.node("node-a").call(_with_a_burst)
    assert delivered < 5 + took / module._REST_SECONDS, "events are not read one by one"


def _with_a_burst() -> tuple[int, float]:
    """Returns the number of states delivered for a hundred pods and the time that this took."""
    seen: list[Network] = []
    NetworkWatcher(_into(seen)).start()
    began = time.monotonic()
    _run(*(f"link add burst{n} type veth peer name tsrub{n}" for n in range(100)))
    until(lambda: len(seen[-1].devices) >= 201)
    return len(seen), time.monotonic() - began


@pytest.mark.root
def test_changes_during_a_netlink_failure_are_seen() -> None:
    with Lab() as lab:
        lab.node("node-a").call(_lose_netlink)


def _lose_netlink() -> None:
    """Waits for a change whose first read fails."""
    seen: list[Network] = []
    lost: list[OSError] = []

    def lose(events: socket.socket) -> None:
        if not lost:
            lost.append(OSError("lost"))
            raise lost[0]
        discard(events)

    discard = module._discard
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_discard", lose)
        patch.setattr(module, "_RETRY_SECONDS", 0.1)
        NetworkWatcher(_into(seen)).start()
        time.sleep(0.2)
        _run(*OTHER)
        until(lambda: len(seen[-1].devices) >= 3)
    assert lost


@pytest.mark.root
def test_changes_are_seen_by_an_agent_with_many_open_files() -> None:
    with Lab() as lab:
        lab.node("node-a").call(_watch_with_many_files)


def _watch_with_many_files() -> None:
    """select() refuses descriptors above 1023; a watcher that fails reads nothing for a long while here."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    seen: list[Network] = []
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_RETRY_SECONDS", 3600.0)
        while stack.enter_context(Path("/dev/null").open("rb")).fileno() < 1100:
            pass
        NetworkWatcher(_into(seen)).start()
        _run(*OTHER)
        until(lambda: len(seen[-1].devices) >= 3)


@pytest.mark.root
def test_devices_and_addresses_of_a_lab_node() -> None:
    with Lab() as lab:
        node = lab.node("node-a")
        node.pod("pod")
        network = node.call(_read)
    assert roles(network) == {"eth0": "UPLINK", "p1": "LOCAL"}
    assert network.primary == (packed(node.address), packed(node.address6))
    assert {packed("10.244.1.1"), packed("fd00:10:244:1::1")} <= network.addresses
    assert not Path(f"/run/netns/{node.netns}").exists()


def _read() -> Network:
    seen: list[Network] = []
    NetworkWatcher(_into(seen)).start()
    return seen[0]
