"""Frontends parsed from kube-proxy's rules are equal in all modes and to those of the agent."""

from __future__ import annotations

import gzip

import pytest

from ebpfproxy.datapath.abi.layout import format_frontend
from ebpfproxy.datapath.dump import BackendRef, FrontendRow
from ebpfproxy.operator.migrate.node import kube_proxy_frontends
from ebpfproxy.services.model import FrontendKind, Policy, format_endpoint
from tests import recordings
from tests.data import SAMPLES
from tests.operator.migrate import rules
from tests.recordings import RecordTracker


def iptables() -> kube_proxy_frontends.Frontends:
    return kube_proxy_frontends.of_iptables(rules.text("iptables-legacy-save.txt"))


def nftables() -> kube_proxy_frontends.Frontends:
    return kube_proxy_frontends.of_nftables(gzip.open(SAMPLES / "nft-list-ruleset.json.gz", "rt").read())


def ours() -> kube_proxy_frontends.Frontends:
    """Returns the agent's frontends for the objects of the dumps."""
    tracker = RecordTracker("node-a1")
    for each in recordings.as_events(recordings.lists("final")):
        tracker.apply(each)
    tracker.drain()
    found: dict[str, set[str]] = {}
    for port in tracker.service_ports():
        for f in port.frontends:
            name = format_frontend(f.address, f.port, f.protocol)
            if f.kind is FrontendKind.NODE_PORT:
                name = f"{'[::]' if ':' in name.rpartition(':')[0] else '0.0.0.0'}:{name.rpartition(':')[2]}"
            used = {
                b
                for p in (f.internal, f.external)
                for b in (port.cluster if p is Policy.CLUSTER else port.local)
            }
            found.setdefault(name, set()).update(format_endpoint(b.address, b.port) for b in used)
    return {name: frozenset(backends) for name, backends in found.items()}


def test_frontends_of_both_modes_of_a_real_kube_proxy_are_equal() -> None:
    assert iptables() == nftables()
    assert len(iptables()) == 19
    assert iptables()["10.96.0.10:53/UDP"] == {"10.244.1.2:53", "10.244.2.2:53"}
    assert iptables()["0.0.0.0:31317/TCP"] == {"10.244.2.6:8080", "10.244.3.6:8080"}
    assert iptables()["10.96.177.53:80/TCP"] == frozenset(), "it is rejected but known"


def test_frontends_of_the_agent_equal_those_of_a_real_kube_proxy() -> None:
    # The load balancer's address was set for the dumps only.
    theirs = {name: found for name, found in iptables().items() if not name.startswith("203.0.113.10:")}
    assert kube_proxy_frontends.missing(theirs, ours()) == {}
    assert kube_proxy_frontends.unserved(ours(), iptables()) == []


def test_ipv6_frontends_are_compared_by_address_and_not_by_spelling() -> None:
    saved = """*nat
:KUBE-SEP-A - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-A - [0:0]
-A KUBE-SEP-A -p tcp -m tcp -j DNAT --to-destination [fd00:10:244:0::1]:8080
-A KUBE-SERVICES -d fd00:10:96:0::1/128 -p tcp -m comment --comment "a/b:c" -m tcp --dport 80 -j KUBE-SVC-A
-A KUBE-SVC-A ! -s fd00::/64 -d fd00:10:96::1/128 -p tcp -m tcp --dport 80 -j KUBE-MARK-MASQ
-A KUBE-SVC-A -j KUBE-SEP-A
COMMIT
"""
    found = kube_proxy_frontends.of_iptables(saved)
    assert found == {"[fd00:10:96:0::1]:80/TCP": {"[fd00:10:244:0::1]:8080"}}
    assert (
        kube_proxy_frontends.missing(found, {"[fd00:10:96::1]:80/TCP": frozenset({"[fd00:10:244::1]:8080"})})
        == {}
    )


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        ({}, "is not in the maps"),
        ({"10.0.0.1:80/TCP": {"10.1.0.1:8080"}}, "kube-proxy also sends to 10.1.0.2:8080"),
        ({"10.0.0.1:80/TCP": {"10.1.0.1:8080", "10.1.0.2:8080", "10.1.0.3:8080"}}, None),
        ({"10.0.0.1:80/UDP": {"10.1.0.1:8080", "10.1.0.2:8080"}}, "is not in the maps"),
    ],
)
def test_frontends_missing_from_maps_are_named(ours: dict[str, set[str]], message: str | None) -> None:
    theirs = {"10.0.0.1:80/TCP": frozenset({"10.1.0.1:8080", "10.1.0.2:8080"})}
    mine = {name: frozenset(backends) for name, backends in ours.items()}
    assert kube_proxy_frontends.missing(theirs, mine) == ({"10.0.0.1:80/TCP": message} if message else {})


def _row(kind: str, frontend: str, scope: str, *backends: str) -> FrontendRow:
    return FrontendRow(
        namespace="a",
        name="b",
        port_name="",
        type=kind,
        scope=scope,
        frontend=frontend,
        algorithm="random",
        affinity=0,
        backends=tuple(BackendRef(each, "active") for each in backends),
    )


def test_node_port_is_one_frontend_in_each_family_whatever_its_addresses_and_scopes() -> None:
    rows = [
        _row("NodePort", "192.168.0.1:30080/TCP", "internal", "10.1.0.1:80"),
        _row("NodePort", "192.168.0.1:30080/TCP", "external", "10.1.0.2:80"),
        _row("NodePort", "[fd00::1]:30080/TCP", "external", "[fd01::1]:80"),
        _row("ClusterIP", "10.0.0.1:80/TCP", "internal"),
    ]
    assert kube_proxy_frontends.of_maps(rows) == {
        "0.0.0.0:30080/TCP": {"10.1.0.1:80", "10.1.0.2:80"},
        "[::]:30080/TCP": {"[fd01::1]:80"},
        "10.0.0.1:80/TCP": frozenset(),
    }


def test_node_port_that_kube_proxy_serves_in_one_family_keeps_nobody_from_going_back() -> None:
    """In IPVS mode a node without an IPv6 address has no virtual server for it."""
    ours = {name: frozenset({"e:1"}) for name in ("0.0.0.0:30080/TCP", "[::]:30080/TCP", "[::]:30081/TCP")}
    theirs = {"0.0.0.0:30080/TCP": frozenset({"e:1"})}
    assert kube_proxy_frontends.unserved(ours, theirs) == ["[::]:30081/TCP"]
    assert kube_proxy_frontends.missing(ours, theirs).keys() == {"[::]:30080/TCP", "[::]:30081/TCP"}
