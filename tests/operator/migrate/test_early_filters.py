"""Rules that drop packets by NodePorts before NAT, as the tools of a node print them."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from ebpfproxy.operator.migrate.node import obstacles
from ebpfproxy.operator.migrate.node.early_filters import of_iptables, of_nftables
from ebpfproxy.operator.migrate.node.obstacles import Severity
from ebpfproxy.operator.migrate.node.tools import ToolError
from tests.lab import Lab, LabNode

#: What Calico makes of a policy with preDNAT, and of nothing but pods.
_PRE_DNAT = """*mangle
:PREROUTING ACCEPT [0:0]
:cali-PREROUTING - [0:0]
:cali-fh-eth0 - [0:0]
:cali-from-host-endpoint - [0:0]
:cali-pi-ports - [0:0]
-A PREROUTING -m comment --comment "cali:1" -j cali-PREROUTING
-A cali-PREROUTING -m comment --comment "cali:2" -j cali-from-host-endpoint
-A cali-from-host-endpoint -i eth0 -m comment --comment "cali:3" -g cali-fh-eth0
-A cali-fh-eth0 -m comment --comment "cali:4" -m conntrack --ctstate INVALID -j DROP
-A cali-fh-eth0 -m comment --comment "cali:5" -m mark --mark 0x0/0x20000 -j cali-pi-ports
-A cali-fh-eth0 -m comment --comment "cali:6" -m mark --mark 0x0/0x20000 -j DROP
-A cali-pi-ports -p tcp -m comment --comment "cali:7" -m multiport --dports 30080 -j MARK --set-xmark 0x10000/0x10000
COMMIT
"""
_PODS_ONLY = """*raw
:PREROUTING ACCEPT [0:0]
:cali-PREROUTING - [0:0]
-A PREROUTING -j cali-PREROUTING
-A cali-PREROUTING -p udp -m udp --dport 4789 -m addrtype --dst-type LOCAL -j NOTRACK
-A cali-PREROUTING -m mark --mark 0x40000/0x40000 -m rpfilter --validmark --invert -j DROP
COMMIT
*mangle
:PREROUTING ACCEPT [0:0]
:cali-PREROUTING - [0:0]
-A PREROUTING -j cali-PREROUTING
-A PREROUTING -i eth0 -m addrtype --dst-type LOCAL --limit-iface-in -j CONNMARK --set-xmark 0x80/0x80
-A cali-PREROUTING -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
*filter
:INPUT ACCEPT [0:0]
-A INPUT -p tcp -m tcp --dport 30080 -j DROP
COMMIT
"""


def test_a_policy_before_nat_is_told_from_what_calico_has_anyway() -> None:
    assert of_iptables(_PRE_DNAT) == ["mangle"]
    assert of_iptables(_PODS_ONLY) == []
    # Nothing leads from PREROUTING to it.
    assert of_iptables(_PRE_DNAT.replace("-A PREROUTING", "-A OUTPUT")) == []


@pytest.mark.parametrize("listed", ["", "[]", '{"nftables": [{"rule": {}}]}', '{"nftables": [1]}'])
def test_odd_output_is_an_error(listed: str) -> None:
    with pytest.raises(ToolError):
        of_nftables(listed)


@pytest.fixture(scope="module")
def node() -> Iterator[LabNode]:
    with Lab() as lab:
        yield lab.node("node-a")


@pytest.mark.root
@pytest.mark.parametrize(
    ("rules", "is_found"),
    [
        (
            "chain first { type filter hook prerouting priority dstnat - 10; tcp dport 30000-32767 drop; }",
            True,
        ),
        (
            "chain first { type filter hook prerouting priority mangle; policy drop; jump others; }"
            "; chain others { tcp dport vmap { 30080 : accept }; }",
            True,
        ),
        ("chain first { type filter hook prerouting priority dstnat + 10; tcp dport 30080 drop; }", False),
        ("chain first { type filter hook input priority mangle; tcp dport 30080 drop; }", False),
        (
            "chain first { type filter hook prerouting priority raw; udp dport 4789 notrack;"
            " fib saddr . iif oif missing drop; ct state invalid drop; }",
            False,
        ),
        ("chain first { type filter hook prerouting priority raw; ip saddr 192.0.2.0/24 drop; }", False),
    ],
)
def test_real_tables_are_recognized(node: LabNode, rules: str, is_found: bool) -> None:
    """The conflict names the table, and what becomes of its rules."""
    node.run(["nft", f"table inet firewall {{ chain others {{ }}; {rules}; }}"])
    try:
        found = [each for each in obstacles.find(node.call(obstacles.look)) if "before NAT" in each.what]
    finally:
        node.run(["nft", "delete", "table", "inet", "firewall"])
    assert [each.severity for each in found] == [Severity.WARNS] * is_found
    assert all(each.what.startswith("nftables, table inet firewall") for each in found)


@pytest.mark.root
def test_rules_of_iptables_are_named_once(node: LabNode) -> None:
    rule = ["PREROUTING", "-p", "tcp", "--dport", "30080", "-j", "DROP"]
    node.run(["iptables", "-t", "raw", "-A", *rule])
    try:
        found = [each.what for each in obstacles.find(node.call(obstacles.look)) if "before NAT" in each.what]
    finally:
        node.run(["iptables", "-t", "raw", "-D", *rule])
    assert len(found) == 1, json.dumps(found)
    assert "table raw: rules drop packets" in found[0]
