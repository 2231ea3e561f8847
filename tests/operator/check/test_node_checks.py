"""Findings about the node, decided from values."""

from __future__ import annotations

import msgspec

from ebpfproxy.agent.state import AgentState, DeviceState
from ebpfproxy.node.facts import Link
from ebpfproxy.operator.check import node_checks, proxies
from ebpfproxy.operator.migrate.node.leftovers import Leftovers
from ebpfproxy.operator.migrate.node.obstacles import Conflict, Severity

AGENT = AgentState(pid=1, version="0", node="n", source="s", started=1.0, written=100.0)


def sysctls(values: dict[str, str], families: set[int], *uplinks: str) -> list[tuple[str, str, bool]]:
    return [
        (each.what, each.mend, each.warning) for each in node_checks.sysctls(values.get, families, uplinks)
    ]


def test_forwarding_matters_for_the_families_that_backends_have() -> None:
    off = {"net/ipv4/ip_forward": "0", "net/ipv6/conf/all/forwarding": "0"}
    four = ("net.ipv4.ip_forward is 0", "sysctl -w net.ipv4.ip_forward=1", False)
    six = ("net.ipv6.conf.all.forwarding is 0", "sysctl -w net.ipv6.conf.all.forwarding=1", False)
    assert sysctls(off, set()) == []
    assert sysctls(off, {4}) == [four]
    assert sysctls(off, {4, 16}) == [four, six]
    assert sysctls(dict.fromkeys(off, "1"), {4, 16}) == []
    assert sysctls({}, {4, 16}) == []


def test_interpreted_programs_are_a_warning() -> None:
    ((what, _, warning),) = sysctls({"net/core/bpf_jit_enable": "0"}, set())
    assert what == "net.core.bpf_jit_enable is 0"
    assert warning


def test_strict_reverse_path_filtering_matters_with_several_uplinks() -> None:
    strict = {"net/ipv4/conf/all/rp_filter": "0", "net/ipv4/conf/eth1/rp_filter": "1"}
    assert sysctls(strict, set(), "eth1") == []
    assert [what for what, _, _ in sysctls(strict, set(), "eth0", "eth1")] == [
        "net.ipv4.conf.eth1.rp_filter is strict"
    ]
    assert sysctls({**strict, "net/ipv4/conf/all/rp_filter": "2"}, set(), "eth0", "eth1") == []


def test_clock_that_was_set_back_is_told_by_the_agents_last_record() -> None:
    assert list(node_checks.clock(True, 99.0, 100.0)) == []
    (found,) = node_checks.clock(True, 40.0, 100.0)
    assert found.what == "the clock has been set back by 60 s"
    assert not found.warning
    (found,) = node_checks.clock(False, 100.0, None)
    assert found.warning


def test_pods_mtu_above_the_uplinks_is_a_warning_without_a_tunnel() -> None:
    links = [
        Link(1, "eth0", None, 1, 0, 1400),
        Link(2, "veth1", "veth", 1, 0, 1500),
        Link(3, "veth2", "veth", 1, 0, 1400),
    ]
    roles = [("uplink", 1), ("pods", 2), ("pods", 3)]
    devices = tuple(DeviceState(index, f"d{index}", role, "", attached=True) for role, index in roles)
    agent = msgspec.structs.replace(AGENT, device_roles=devices)
    (found,) = node_checks.mtus(links, agent)
    assert found.what == "the MTU of veth1 is 1500, that of eth0 only 1400"
    tunnel = DeviceState(4, "vxlan", "tunnel", "", attached=True)
    agent = msgspec.structs.replace(AGENT, device_roles=(*devices, tunnel))
    assert list(node_checks.mtus(links, agent)) == []


def test_conflicts_that_block_a_migration_are_wrong_and_others_are_warnings() -> None:
    conflicts = [Conflict(Severity.BLOCKS, "Cilium", "a"), Conflict(Severity.WARNS, "Istio", "b")]
    assert [(each.what, each.mend, each.warning) for each in proxies.conflicting(conflicts)] == [
        ("Cilium", "a", False),
        ("Istio", "b", True),
    ]
    assert list(proxies.left(Leftovers())) == []
    (found,) = proxies.left(Leftovers(nftables=("ip kube-proxy",)))
    assert found.what == "rules of kube-proxy, mode nftables"
