"""Values that kube-proxy rejects in its configuration are rejected, with their path."""

from __future__ import annotations

from typing import Any

import pytest

from tests.config.files import KUBE_PROXY, errors, merged, nested, text_of


@pytest.mark.parametrize(
    ("path", "values"),
    [
        (
            "bindAddress",
            ["10.10.12.11:2000", "0.0.0.0.0", "host", "fe80::1%eth0", "::ffff:1.2.3.4", "010.0.0.1"],
        ),
        (
            "healthzBindAddress",
            ["host:80", ":10256", "0.0.0.0:0", "0.0.0.0:65536", "::1:x", "[::1]", "1.2.3.4:٣"],
        ),
        ("metricsBindAddress", ["host:80", "0.0.0.0:-1", "0.0.0.0:", "10249", "[::1:80", "fd00::1:"]),
        ("oomScoreAdj", [-1001, 1001, 1 << 40]),
        ("clientConnection.burst", [-1, 1 << 31]),
        ("clientConnection.qps", [float("inf"), float("nan")]),
        ("configSyncPeriod", ["-1s"]),
        ("conntrack.maxPerCore", [-1]),
        ("conntrack.min", [-1]),
        ("conntrack.tcpEstablishedTimeout", ["-1s", "1"]),
        ("conntrack.tcpCloseWaitTimeout", ["-1s"]),
        ("conntrack.udpTimeout", ["-1s"]),
        ("conntrack.udpStreamTimeout", ["-1s"]),
        ("iptables.masqueradeBit", [-1, 32]),
        ("iptables.syncPeriod", ["-1s", "999ms"]),
        ("iptables.minSyncPeriod", ["-1s"]),
        ("mode", ["userspace", "IPTABLES", "kernelspace"]),
        ("detectLocalMode", ["Devices", "clustercidr"]),
        (
            "clusterCIDR",
            [
                *("10.0.0.0", "10.0.0.0/33", "ten", "10.0.0.0/8,", "10.0.0.0/8, fd00::/8"),
                *("10.0.0.0/8,11.0.0.0/8", "fd00::/8,fd01::/16", "10.0.0.0/8,fd00::/8,11.0.0.0/8"),
            ],
        ),
        ("portRange", ["a-b", "2000-300", "70000", "1-", "-1", "65000+1000", "1-2-3"]),
        ("showHiddenMetricsForVersion", ["1", "v1.35", "1.35.2"]),
        ("logging.format", ["xml"]),
        ("logging.verbosity", [1 << 31]),
        ("logging.options.json.infoBufferSize", ["4Ki", "many", "4KiB"]),
        ("logging.options.text.infoBufferSize", ["1"]),
        ("logging.options.json.splitStream", [True]),
        ("logging.options.text.splitStream", [True]),
    ],
)
def test_invalid_values_are_reported_by_path(path: str, values: list[Any]) -> None:
    for value in values:
        (message,) = errors(text_of(merged(KUBE_PROXY, nested(path, value))))
        assert message.startswith(f"f: {path}: "), message


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("bindAddress", ["192.168.59.103", "fd00:192:168:59::103", "0.0.0.0", "::"]),
        ("healthzBindAddress", ["0.0.0.0:12345", "[::1]:10256", "0.0.0.0:1"]),
        (
            "clusterCIDR",
            ["192.168.59.0/24", "fd00::/64", "192.168.59.0/24,fd00::/64", "fd00::/64,10.0.0.0/8"],
        ),
        ("portRange", ["", "300-2000", "300", "300+1700", " 300-2000 ", "0-0"]),
        ("oomScoreAdj", [-1000, 0, 1000]),
        ("clientConnection.qps", [-1, 0.5, 1000]),
        ("conntrack.udpTimeout", ["0", "1ns"]),
        ("iptables.syncPeriod", ["1s"]),
        ("ipvs.scheduler", ["rr", "mh", "anything"]),
        (
            "nodePortAddresses",
            [
                [],
                ["primary"],
                ["10.0.0.0/8", "fd00::/8"],
                ["10.0.0.1/8"],
                ["primary", "localhost"],
                ["all"],
                ["localhost", "10.0.0.0/8", "primary"],
            ],
        ),
        ("showHiddenMetricsForVersion", ["", "1.35"]),
        ("featureGates", [{"Anything": False}]),
        ("mode", ["", "iptables", "ipvs", "nftables"]),
        ("logging.options.json.infoBufferSize", [0, "0", "0Ki"]),
    ],
)
def test_valid_values_are_accepted(path: str, values: list[Any]) -> None:
    for value in values:
        assert errors(text_of(merged(KUBE_PROXY, nested(path, value)))) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"mode": "ipvs", "ipvs": {"tcpTimeout": "-1s", "tcpFinTimeout": "-1s", "udpTimeout": "-1s"}},
            [
                "ipvs.tcpTimeout: -1s is below 0",
                "ipvs.tcpFinTimeout: -1s is below 0",
                "ipvs.udpTimeout: -1s is below 0",
            ],
        ),
        (
            {"mode": "ipvs", "ipvs": {"excludeCIDRs": ["10.0.0.0/8", "ten", "10.0.0.1"]}},
            ["ipvs.excludeCIDRs[1]: 'ten' is not a CIDR", "ipvs.excludeCIDRs[2]: '10.0.0.1' is not a CIDR"],
        ),
        (
            {"mode": "ipvs", "ipvs": {"syncPeriod": "1s", "minSyncPeriod": "2s"}},
            ["ipvs.syncPeriod: 1s is below ipvs.minSyncPeriod, which is 2s"],
        ),
        (
            {"mode": "nftables", "nftables": {"masqueradeBit": 32, "minSyncPeriod": "-1ns"}},
            [
                "nftables.masqueradeBit: 32 is not within 0 and 31",
                "nftables.minSyncPeriod: -1ns is below 0",
            ],
        ),
        (
            {"detectLocalMode": "BridgeInterface"},
            [
                "detectLocal.bridgeInterface: must not be empty: BridgeInterface needs --pod-bridge-interface, "
                "or this field"
            ],
        ),
        (
            {"detectLocalMode": "InterfaceNamePrefix", "detectLocal": {"bridgeInterface": "cni0"}},
            [
                "detectLocal.interfaceNamePrefix: must not be empty: InterfaceNamePrefix needs "
                "--pod-interface-name-prefix, or this field"
            ],
        ),
        (
            {"nodePortAddresses": ["10.0.0.0/8", "primary", "ten"]},
            [
                "nodePortAddresses[2]: 'ten' is neither a CIDR nor one of 'primary', 'localhost', 'all': 'ten' does not "
                "appear to be an "
                "IPv4 or IPv6 network",
            ],
        ),
        (
            {"logging": {"format": "json", "vmodule": [{"filePattern": "a", "verbosity": 1}]}},
            ["logging.vmodule: needs the format text"],
        ),
        (
            {"logging": {"vmodule": [{}]}},
            ["logging.vmodule[0].filePattern: '' is empty, or has a comma or an equals sign"],
        ),
    ],
)
def test_fields_that_depend_on_others(given: dict[str, Any], message: list[str]) -> None:
    assert errors(text_of({**KUBE_PROXY, **given})) == [f"f: {each}" for each in message]


@pytest.mark.parametrize(
    "given",
    [
        {"ipvs": {"tcpTimeout": "-1s", "excludeCIDRs": ["ten"], "syncPeriod": "-1s"}},
        {"nftables": {"masqueradeBit": 32, "syncPeriod": "-1s"}},
        {"mode": "nftables", "iptables": {"syncPeriod": "-1s"}},
        {"detectLocalMode": "NodeCIDR", "clusterCIDR": "ten"},
        {"detectLocalMode": "ClusterCIDR"},
        {"detectLocalMode": "BridgeInterface", "detectLocal": {"bridgeInterface": "cni0"}},
    ],
)
def test_sections_of_other_modes_are_not_validated_as_in_kube_proxy(given: dict[str, Any]) -> None:
    assert errors(text_of({**KUBE_PROXY, **given})) == []
