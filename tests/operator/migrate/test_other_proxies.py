"""Other service proxies, recognized by their state on a node."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ebpfproxy.operator.migrate.node import obstacles
from ebpfproxy.operator.migrate.node.obstacles import Facts, Severity


def output(facts: Facts) -> list[tuple[str, str]]:
    return [(str(each.severity), each.what) for each in obstacles.find(facts)]


@pytest.mark.parametrize(
    ("pin", "word"),
    [
        ("cilium/socketlb/links/cgroup/cil_sock4_connect", "Cilium translates Services at the socket"),
        ("tc/globals/cilium_nodeport_neigh4", "Cilium translates NodePorts"),
        ("tc/globals/cali_v4_nat_fe3", "Calico's eBPF mode"),
    ],
)
def test_another_replacement_blocks(pin: str, word: str) -> None:
    ((severity, what),) = output(Facts(pins=frozenset({pin, "tc/globals/other"})))
    assert severity == Severity.BLOCKS
    assert what.startswith(word)


@pytest.mark.parametrize("pin", ["cilium_lb4_services_v2", "cilium_lb6_backends_v3"])
def test_cilium_without_kube_proxy_replacement_is_a_warning(pin: str) -> None:
    ((severity, what),) = output(Facts(pins=frozenset({f"tc/globals/{pin}"})))
    assert severity == Severity.WARNS
    assert what.startswith("Cilium translates what its own pods send")


def test_calico_maps_without_nat_maps_do_not_conflict() -> None:
    assert output(Facts(pins=frozenset({"tc/globals/cali_v4_routes", "ebpfproxy"}))) == []


def test_service_proxy_of_kube_router_blocks() -> None:
    ((severity, _),) = output(Facts(devices=frozenset({"lo", "kube-dummy-if"})))
    assert severity == Severity.BLOCKS


def test_istio_is_recognized_by_its_chains_and_sidecars() -> None:
    saved = {"iptables-legacy": "*nat\n:OUTPUT ACCEPT [0:0]\n:ISTIO_OUTPUT - [0:0]\n:MINE - [0:0]\nCOMMIT\n"}
    found = output(Facts(saved=saved, processes=frozenset({"pilot-agent", "sh"})))
    assert [severity for severity, _ in found] == [Severity.WARNS] * 2
    assert "(chains ISTIO_OUTPUT)" in found[0][1]
    assert "(pilot-agent)" in found[1][1]


FORWARD = "*filter\n:FORWARD DROP [0:0]\n:KUBE-FORWARD - [0:0]\n:MINE - [0:0]\n-A FORWARD -j KUBE-FORWARD\n"


@pytest.mark.parametrize(
    ("saved", "severities"),
    [
        (FORWARD, [Severity.BLOCKS]),
        (FORWARD + "-A FORWARD -i cni0 -j ACCEPT\n", [Severity.WARNS]),
        (FORWARD + "-A FORWARD -j MINE\n", [Severity.WARNS]),
        (FORWARD.replace("DROP", "ACCEPT"), []),
    ],
)
def test_severity_of_a_drop_policy_depends_on_other_accepting_rules(
    saved: str, severities: list[Severity]
) -> None:
    found = obstacles.find(Facts(saved={"iptables-nft": saved + "COMMIT\n"}))
    assert [each.severity for each in found] == severities


def test_facts_have_pins_and_devices(tmp_path: Path) -> None:
    (tmp_path / "bpf/tc/globals/cilium_lb4_services_v2").mkdir(parents=True)
    (tmp_path / "bpf/cilium/socketlb/links/cgroup/cil_sock4_connect").mkdir(parents=True)
    facts = obstacles.look(tmp_path / "bpf")
    assert {"tc/globals/cilium_lb4_services_v2", "tc", "cilium"} <= facts.pins
    assert "cilium/socketlb/links/cgroup/cil_sock4_connect" in facts.pins
    assert "lo" in facts.devices
    assert Path(f"/proc/{os.getpid()}/comm").read_text().strip() in facts.processes


@pytest.mark.root
def test_pins_of_others_are_searched_at_the_mount_of_our_bpffs() -> None:
    assert obstacles.bpffs_of(Path("/sys/fs/bpf")) == Path("/sys/fs/bpf")
    assert obstacles.bpffs_of(Path("/sys/fs/bpf/nobody/here")) == Path("/sys/fs/bpf")
    assert obstacles.bpffs_of(Path("/")) == Path("/")
