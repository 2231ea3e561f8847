"""Others that translate Services, each known by what it leaves on a node."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ebpfproxy.operator.migrate.node import obstacles
from ebpfproxy.operator.migrate.node.obstacles import Facts, Severity


def said(facts: Facts) -> list[tuple[str, str]]:
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
    ((severity, what),) = said(Facts(pins=frozenset({pin, "tc/globals/other"})))
    assert severity == Severity.BLOCKS
    assert what.startswith(word)


@pytest.mark.parametrize("pin", ["cilium_lb4_services_v2", "cilium_lb6_backends_v3"])
def test_cilium_without_its_replacement_is_worth_a_word(pin: str) -> None:
    ((severity, what),) = said(Facts(pins=frozenset({f"tc/globals/{pin}"})))
    assert severity == Severity.WARNS
    assert what.startswith("Cilium translates what its own pods send")


def test_calicos_maps_without_its_nat_are_no_conflict() -> None:
    assert said(Facts(pins=frozenset({"tc/globals/cali_v4_routes", "ebpfproxy"}))) == []


def test_kube_routers_proxy_blocks() -> None:
    ((severity, _),) = said(Facts(devices=frozenset({"lo", "kube-dummy-if"})))
    assert severity == Severity.BLOCKS


def test_istio_is_known_by_its_chains_and_by_its_sidecars() -> None:
    saved = {"iptables-legacy": "*nat\n:OUTPUT ACCEPT [0:0]\n:ISTIO_OUTPUT - [0:0]\n:MINE - [0:0]\nCOMMIT\n"}
    found = said(Facts(saved=saved, processes=frozenset({"pilot-agent", "sh"})))
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
def test_a_policy_that_drops_must_not_lose_who_accepts(saved: str, severities: list[Severity]) -> None:
    found = obstacles.find(Facts(saved={"iptables-nft": saved + "COMMIT\n"}))
    assert [each.severity for each in found] == severities


def test_looking_finds_pins_and_processes(tmp_path: Path) -> None:
    (tmp_path / "bpf/tc/globals/cilium_lb4_services_v2").mkdir(parents=True)
    (tmp_path / "bpf/cilium/socketlb/links/cgroup/cil_sock4_connect").mkdir(parents=True)
    facts = obstacles.look(tmp_path / "bpf")
    assert {"tc/globals/cilium_lb4_services_v2", "tc", "cilium"} <= facts.pins
    assert "cilium/socketlb/links/cgroup/cil_sock4_connect" in facts.pins
    assert "lo" in facts.devices
    assert Path(f"/proc/{os.getpid()}/comm").read_text().strip() in facts.processes


@pytest.mark.root
def test_others_pins_are_where_the_bpffs_is_mounted_that_ours_are_on() -> None:
    assert obstacles.bpffs_of(Path("/sys/fs/bpf")) == Path("/sys/fs/bpf")
    assert obstacles.bpffs_of(Path("/sys/fs/bpf/nobody/here")) == Path("/sys/fs/bpf")
    assert obstacles.bpffs_of(Path("/")) == Path("/")
