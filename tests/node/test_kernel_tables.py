"""Devices and addresses are read as ip(8) shows them."""

from __future__ import annotations

import json
import socket
import subprocess
from typing import Any

import pytest

from ebpfproxy.netlink.rtnetlink import Rtnetlink
from ebpfproxy.node.facts import Facts
from ebpfproxy.node.kernel_tables import read_facts
from tests.lab import Lab

pytestmark = pytest.mark.root

_ARPHRD = {"ether": 1, "loopback": 772, "none": 65534, "ipip": 768}
_COMMANDS = (
    "link add other type veth peer name peer",
    "link add br0 type bridge",
    "link set peer master br0 mtu 1400",
    "link add mac0 link other type macvlan mode passthru",
    "link add low type veth peer name end",
    "link add mac1 link low type macvlan mode bridge",
    "tuntap add tun0 mode tun",
    "link set low up",
    "address add 203.0.113.1/24 dev low",
    "address add 203.0.113.9/24 dev low",
    "address add 192.0.2.1 peer 192.0.2.2/32 dev low",
    "address add 198.51.100.1/24 dev low scope link",
    "address add 2001:db8::1/64 dev low nodad preferred_lft 0",
    "address add 2001:db8::2/128 dev low nodad",
)


def _ip(*words: str) -> Any:
    text = subprocess.run(["ip", "-j", *words], check=True, capture_output=True, text=True).stdout
    return json.loads(text or "[]")


def _read() -> tuple[Facts, Any, Any]:
    for command in _COMMANDS:
        subprocess.run(["ip", *command.split()], check=True)
    with Rtnetlink() as netlink:
        return read_facts(netlink), _ip("-d", "link"), _ip("address")


def test_links_and_addresses_equal_those_of_ip() -> None:
    with Lab() as lab:
        facts, links, addresses = lab.node("node-a").call(_read)
    indexes = {each["ifname"]: each["ifindex"] for each in links}
    shown = {
        (
            each["ifindex"],
            each["ifname"],
            each.get("linkinfo", {}).get("info_kind"),
            _ARPHRD[each["link_type"]],
            indexes.get(each.get("master"), 0),
            each["mtu"],
            indexes.get(each.get("link"), 0),
            each.get("linkinfo", {}).get("info_data", {}).get("mode") == "passthru",
            bytes.fromhex(each.get("address", "").replace(":", "")),
        )
        for each in links
    }
    assert {tuple(each) for each in facts.links} == shown

    found = {(each.ifindex, each.address, each.length): each.fit for each in facts.addresses}
    listed = [(each["ifindex"], info) for each in addresses for info in each["addr_info"]]
    assert set(found) == {
        (
            index,
            socket.inet_pton(getattr(socket, f"AF_{info['family'].upper()}"), info["local"]),
            info["prefixlen"],
        )
        for index, info in listed
    }
    fit = {address for (index, address, _), good in found.items() if good and index == indexes["low"]}
    assert fit == {
        socket.inet_aton("203.0.113.1"),
        socket.inet_aton("192.0.2.1"),
        socket.inet_pton(10, "2001:db8::2"),
    }


def _routes_by_source() -> bool:
    with Rtnetlink() as netlink:
        return read_facts(netlink).routes_by_source


def test_rules_for_sources_are_told_from_others() -> None:
    """Those that the kernel has made itself, or that are for destinations, devices and marks, are no such rules."""
    with Lab() as lab:
        node = lab.node("node-a")
        for rule in (
            "to 192.0.2.0/24 lookup 7",
            "iif eth0 lookup 7",
            "fwmark 7 lookup 7",
            "from 192.0.2.9 unreachable",
        ):
            node.run(["ip", "rule", "add", *rule.split()])
            assert not node.call(_routes_by_source), rule
        for family, source in (("-4", "192.0.2.1"), ("-6", "2001:db8::/64")):
            node.run(["ip", family, "rule", "add", "from", source, "lookup", "7"])
            assert node.call(_routes_by_source), source
            node.run(["ip", family, "rule", "del", "from", source, "lookup", "7"])
            assert not node.call(_routes_by_source), source
