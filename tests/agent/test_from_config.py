"""Options of the agent that follow from a configuration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ebpfproxy.agent.agent_options import AgentOptions
from ebpfproxy.agent.from_config import agent_options, in_use, mode_remark
from ebpfproxy.config.datapath import Capacity, ExternalTraffic, Feature, StaleTcp, Xdp
from ebpfproxy.config.load import Configuration, effective, ignored_fields, parse
from ebpfproxy.config.masquerade_ports import default_range, local_range
from ebpfproxy.datapath.flows.conntrack_table import Timeouts
from ebpfproxy.node.identity import NodeNameError
from ebpfproxy.node.local import LocalMode, LocalPods
from ebpfproxy.services.model import Algorithm, Prefix
from tests.config.files import KUBE_PROXY, OWN, kube_proxy, own, text_of, used

HERE = {"cgroup-root": "/cg", "hostname-override": "Node-A", "masquerade-ports": "20000-29999"}


def options_of(configuration: Configuration, flags: dict[str, Any] | None = None) -> AgentOptions:
    return agent_options(effective(configuration, {**HERE, **(flags or {})}))[0]


def of(*parts: dict[str, Any], flags: dict[str, Any] | None = None) -> AgentOptions:
    return options_of(kube_proxy(*parts), flags)


def test_defaults_without_a_file_and_flags() -> None:
    assert options_of(Configuration()) == AgentOptions(
        node_name="node-a",
        bpf_root=Path("/sys/fs/bpf"),
        cgroup_root=Path("/cg"),
        manifests=None,
        kubeconfig=None,
        master=None,
        api_qps=5.0,
        api_burst=10,
        healthz_bind_address="0.0.0.0:10256",
        metrics_bind_address="127.0.0.1:10249",
        health_timeout=60.0,
        bind_hard_fail=False,
        node_ports_on_loopback=True,
        guard_node_ports=False,
        pod_sockets=True,
        node_port_addresses=(),
        external_ips=True,
        devices=(),
        local_pods=LocalPods(LocalMode.DEVICES),
        cluster_cidrs=(),
        service_cidrs=(),
        masquerade_all=False,
        bypass_netfilter=False,
        xdp=Xdp.NONE,
        external_traffic_mode=ExternalTraffic.SNAT,
        algorithm=Algorithm.RANDOM,
        maglev_size=16381,
        masquerade_ports=(20000, 29999),
        masquerade_ports_shared=False,
        timeouts=Timeouts(),
        socket_sweep_seconds=60.0,
        drift_check_seconds=5.0,
        stale_tcp=StaleTcp.GONE,
        stale_tcp_seconds=5.0,
        capacity=Capacity(slots=4 * Capacity().backends),
        without=frozenset(),
        trace_decisions=False,
        measure_connections=False,
        measure_traffic=False,
        metrics_services=50,
        metrics_backends=False,
        otlp_endpoint="",
        otlp_interval_seconds=60.0,
    )


def test_unset_fields_are_read_from_this_host() -> None:
    found = agent_options(effective(Configuration(), {"cgroup-root": "/cg"}))[0]
    assert found.node_name == os.uname().nodename.lower()
    assert found.masquerade_ports == default_range(local_range())
    with pytest.raises(NodeNameError):
        options_of(Configuration(), {"hostname-override": " "})


@pytest.mark.parametrize("mode", ["", "iptables", "ipvs", "nftables"])
def test_change_may_wait_for_two_sync_periods_of_the_mode(mode: str) -> None:
    """As with kube-proxy, which gives its health server twice this time (cmd/kube-proxy/app/server.go)."""
    section = mode or "iptables"
    others = {each: {"syncPeriod": "10m"} for each in {"iptables", "ipvs", "nftables"} - {section}}
    assert of({"mode": mode, **others}).health_timeout == 60
    assert of({"mode": mode, section: {"syncPeriod": "45s"}, **others}).health_timeout == 90


@pytest.mark.parametrize(
    ("mode", "flag", "seconds"),
    [
        ("", "iptables", 600),
        ("iptables", "iptables", 600),
        ("nftables", "iptables", 600),
        ("ipvs", "iptables", 60),
        ("ipvs", "ipvs", 600),
        ("iptables", "ipvs", 60),
        ("nftables", "ipvs", 60),
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_sync_period_of_iptables_is_that_of_all_modes_but_ipvs(
    mode: str, flag: str, seconds: float, *, in_file: bool
) -> None:
    """The mode may be the file's. kube-proxy has no such flags for nftables."""
    flags = {f"{flag}-sync-period": "5m", **({} if in_file else {"proxy-mode": mode})}
    assert of({"mode": mode} if in_file else {}, flags=flags).health_timeout == seconds


def test_every_setting_of_kube_proxy_sets_an_option_of_the_agent() -> None:
    found = of(
        {
            "clientConnection": {"kubeconfig": "/etc/k"},
            "healthzBindAddress": "127.0.0.1:1",
            "metricsBindAddress": "127.0.0.1:2",
            "nodePortAddresses": ["127.0.0.0/8", "10.0.0.0/8"],
            "clusterCIDR": "10.244.0.0/16,fd00::/56",
            "iptables": {"masqueradeAll": True},
            "conntrack": {
                "tcpEstablishedTimeout": "2h",
                "tcpCloseWaitTimeout": "30s",
                "udpTimeout": "1500ms",
                "udpStreamTimeout": "0",
            },
        }
    )
    assert found.kubeconfig == Path("/etc/k")
    assert (found.healthz_bind_address, found.metrics_bind_address) == ("127.0.0.1:1", "127.0.0.1:2")
    assert found.node_port_addresses == ("127.0.0.0/8", "10.0.0.0/8")
    assert found.local_pods == LocalPods(LocalMode.CLUSTER_CIDR, "10.244.0.0/16,fd00::/56")
    assert found.cluster_cidrs == (Prefix(bytes([10, 244, 0, 0]), 16), Prefix(b"\xfd" + b"\0" * 15, 56))
    assert found.masquerade_all
    assert found.timeouts == Timeouts(tcp_established=7200, tcp_close_wait=30, udp=1.5)


def test_every_setting_of_our_document_sets_an_option_of_the_agent() -> None:
    found = options_of(
        own(
            {
                "bpfRoot": "/b",
                "manifests": "/m",
                "nodePortGuard": True,
                "podSockets": False,
                "externalIPs": False,
                "devices": ["eth*"],
                "serviceCIDRs": ["10.96.0.0/12"],
                "bypassNetfilter": True,
                "lbAlgorithm": "mh",
                "maglevTableSize": 251,
                "staleTCP": "never",
                "maxConntrack": 2048,
                "maxServices": 1,
                "maxBackends": 2,
                "maxAffinity": 3,
                "maxConnections": 4,
                "without": ["tcx"],
            }
        )
    )
    assert (found.bpf_root, found.manifests) == (Path("/b"), Path("/m"))
    assert found.guard_node_ports
    assert not found.pod_sockets
    assert not found.external_ips
    assert found.devices == ("eth*",)
    assert found.service_cidrs == (Prefix(bytes([10, 96, 0, 0]), 12),)
    assert found.bypass_netfilter
    assert (found.algorithm, found.maglev_size) == (Algorithm.MAGLEV, 251)
    assert found.stale_tcp is StaleTcp.NEVER
    assert found.capacity == Capacity(
        conntrack=2048, services=1, backends=2, affinity=3, connected=4, slots=8
    )
    assert found.without == {Feature.TCX}
    assert options_of(own({"master": "https://x", "maxSlots": 9})).master == "https://x"
    assert options_of(own({"maxSlots": 9})).capacity.slots == 9


@pytest.mark.parametrize(
    ("given", "flags", "wanted"),
    [
        ({}, {}, LocalPods()),
        ({"detectLocalMode": "ClusterCIDR"}, {}, LocalPods()),
        (
            {"detectLocalMode": "ClusterCIDR", "clusterCIDR": ""},
            {"detect-local-mode": "ClusterCIDR"},
            LocalPods(),
        ),
        ({"clusterCIDR": "10.0.0.0/8"}, {}, LocalPods(LocalMode.CLUSTER_CIDR, "10.0.0.0/8")),
        ({"clusterCIDR": "10.0.0.0/8"}, {"detect-local-mode": "Devices"}, LocalPods()),
        (
            {},
            {"cluster-cidr": "10.0.0.0/8, fd00::/8"},
            LocalPods(LocalMode.CLUSTER_CIDR, "10.0.0.0/8,fd00::/8"),
        ),
        ({"detectLocalMode": "NodeCIDR", "clusterCIDR": "10.0.0.0/8"}, {}, LocalPods(LocalMode.NODE_CIDR)),
        (
            {"detectLocalMode": "BridgeInterface", "detectLocal": {"bridgeInterface": "cni0"}},
            {},
            LocalPods(LocalMode.BRIDGE_INTERFACE, "cni0"),
        ),
        (
            {"detectLocal": {"interfaceNamePrefix": "eth"}},
            {"pod-interface-name-prefix": "veth", "detect-local-mode": "InterfaceNamePrefix"},
            LocalPods(LocalMode.INTERFACE_NAME_PREFIX, "veth"),
        ),
    ],
)
def test_detection_of_local_pods(given: dict[str, Any], flags: dict[str, Any], wanted: LocalPods) -> None:
    assert of(given, flags=flags).local_pods == wanted


@pytest.mark.parametrize(
    ("given", "flags", "wanted"),
    [
        ({}, {}, True),
        ({"iptables": {"localhostNodePorts": False}}, {}, False),
        ({"iptables": {"localhostNodePorts": False}}, {"localhost-nodeports": True}, True),
        ({}, {"iptables-localhost-nodeports": False}, False),
        ({"mode": "ipvs"}, {}, False),
        ({"mode": "nftables"}, {}, False),
        ({"mode": "nftables"}, {"localhost-nodeports": True}, True),
        ({"nodePortAddresses": ["10.0.0.0/8"]}, {}, False),
        ({"nodePortAddresses": ["primary"]}, {}, False),
        ({"nodePortAddresses": ["10.0.0.0/8", "127.0.0.1/32"]}, {}, True),
        ({"nodePortAddresses": ["0.0.0.0/0"]}, {}, True),
        ({"nodePortAddresses": ["::/0"]}, {}, False),
        ({"nodePortAddresses": ["all"]}, {}, True),
        ({"nodePortAddresses": ["primary", "localhost"]}, {}, True),
        ({"nodePortAddresses": ["localhost"], "iptables": {"localhostNodePorts": False}}, {}, False),
        ({"mode": "nftables", "nodePortAddresses": ["primary", "localhost"]}, {}, True),
        ({"mode": "nftables", "nodePortAddresses": ["all"]}, {}, False),
        ({"mode": "ipvs", "nodePortAddresses": ["localhost"]}, {}, True),
    ],
)
def test_node_ports_on_loopback_depend_on_mode_and_our_setting(
    given: dict[str, Any], flags: dict[str, Any], wanted: bool
) -> None:
    assert of(given, flags=flags).node_ports_on_loopback is wanted


@pytest.mark.parametrize(
    ("given", "flags", "wanted", "said"),
    [
        ({}, {}, Algorithm.RANDOM, ""),
        ({"mode": "ipvs"}, {}, Algorithm.ROUND_ROBIN, ""),
        ({"mode": "ipvs", "ipvs": {"scheduler": "sh"}}, {}, Algorithm.SOURCE_HASH, ""),
        ({"ipvs": {"scheduler": "wlc"}}, {}, Algorithm.LEAST_CONNECTIONS, ""),
        (
            {"ipvs": {"scheduler": "lblc"}},
            {},
            Algorithm.LEAST_CONNECTIONS,
            "ipvs.scheduler: lblc is not here",
        ),
        ({"ipvs": {"scheduler": "fo"}}, {}, Algorithm.RANDOM, "ipvs.scheduler: unknown algorithm 'fo'"),
        ({"mode": "ipvs"}, {"ipvs-scheduler": "fo"}, Algorithm.ROUND_ROBIN, "ipvs.scheduler: unknown"),
        ({"mode": "ipvs", "ipvs": {"scheduler": "sh"}}, {"lb-algorithm": "maglev"}, Algorithm.MAGLEV, ""),
        ({}, {"lb-algorithm": "twos"}, Algorithm.LEAST_CONNECTIONS, "lbAlgorithm: twos is not here"),
    ],
)
def test_ipvs_scheduler_sets_the_algorithm(
    given: dict[str, Any], flags: dict[str, Any], wanted: Algorithm, said: str
) -> None:
    options, remarks = agent_options(effective(kube_proxy(given), {**HERE, **flags}))
    assert options.algorithm is wanted
    assert len(remarks) == bool(said)
    assert all(remark.startswith(said) for remark in remarks)


def test_invalid_cluster_cidrs_that_no_mode_validates_are_skipped() -> None:
    assert of({"detectLocalMode": "NodeCIDR", "clusterCIDR": "ten"}).cluster_cidrs == ()


def test_mode_nftables_has_its_own_masquerade_all() -> None:
    assert of({"mode": "nftables", "nftables": {"masqueradeAll": True}}).masquerade_all
    assert not of({"mode": "nftables", "iptables": {"masqueradeAll": True}}).masquerade_all
    assert used({"mode": "nftables"}).kube_proxy.node_port_addresses == ("primary",)
    assert of({"mode": "nftables"}).node_port_addresses == ("primary",)


def test_configuration_in_use_shows_values_of_unset_fields() -> None:
    configuration = effective(Configuration())
    options, _ = agent_options(configuration)
    shown = in_use(configuration, options).own
    assert shown.detect_local_mode == "Devices", "there is no clusterCIDR"
    assert shown.localhost_node_ports
    assert shown.lb_algorithm == "random"
    assert shown.max_slots == 4 * shown.max_backends
    assert shown.masquerade_ports == "-".join(map(str, options.masquerade_ports))
    assert Path(shown.cgroup_root, "cgroup.procs").exists()
    given = effective(own({"lbAlgorithm": "mh", "localhostNodePorts": False, "maxSlots": 7}))
    again = in_use(given, agent_options(given)[0]).own
    assert (again.lb_algorithm, again.localhost_node_ports, again.max_slots) == ("maglev", False, 7)


@pytest.mark.parametrize(
    ("gates", "setting", "served"),
    [
        ({}, True, True),
        ({"AllowServiceExternalIPs": True}, True, True),
        ({"AllowServiceExternalIPs": False}, True, False),
        ({"AllowServiceExternalIPs": True}, False, False),
    ],
)
def test_external_ips_are_served_where_both_the_gate_and_the_setting_allow_it(
    gates: dict[str, bool], setting: bool, served: bool
) -> None:
    flag = ",".join(f"{name}={str(on).lower()}" for name, on in gates.items())
    for configuration in (
        effective(
            parse(text_of(KUBE_PROXY | {"featureGates": gates}, OWN | {"externalIPs": setting}), "f"), HERE
        ),
        effective(own({"externalIPs": setting}), {**HERE, **({"feature-gates": flag} if flag else {})}),
    ):
        options, _ = agent_options(configuration)
        assert options.external_ips is served
        assert in_use(configuration, options).own.external_ips is served, "/configz has the same value"
        assert "featureGates" not in ignored_fields(configuration)


def test_other_gates_have_no_effect() -> None:
    found = kube_proxy({"featureGates": {"AllowServiceExternalIPs": False, "Other": True}})
    assert ignored_fields(effective(found)) == ["featureGates"]


def test_unset_mode_is_remarked_with_its_current_and_future_default() -> None:
    assert all(mode_remark(mode) == "" for mode in ("iptables", "ipvs", "nftables"))
    assert "1.37" in mode_remark("")
    assert "1.40" in mode_remark("")
