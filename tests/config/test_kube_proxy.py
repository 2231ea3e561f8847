"""KubeProxyConfiguration: every field, the API's defaults, and the output of a real kube-proxy."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
import yaml

from ebpfproxy.config import kube_proxy as kp
from ebpfproxy.config.documents import bare
from ebpfproxy.config.durations import parse_duration
from ebpfproxy.config.load import parse
from ebpfproxy.config.write import configz, kube_proxy_builtins, kube_proxy_yaml, to_yaml
from tests.config.files import KUBE_PROXY, errors, kube_proxy, merged, nested, text_of, used
from tests.data import SAMPLES

#: Each field with a value that is not its default, as YAML has it.
FIELDS: dict[str, Any] = {
    "featureGates": {"AllAlpha": True},
    "clientConnection.kubeconfig": "/var/lib/kube-proxy/kubeconfig.conf",
    "clientConnection.acceptContentTypes": "application/json",
    "clientConnection.contentType": "application/json",
    "clientConnection.qps": 7.5,
    "clientConnection.burst": 20,
    "logging.format": "json",
    "logging.flushFrequency": "10s",
    "logging.verbosity": 4,
    "logging.vmodule": [{"filePattern": "proxier*", "verbosity": 3}],
    "logging.options.text.splitStream": True,
    "logging.options.text.infoBufferSize": "4Ki",
    "logging.options.json.splitStream": True,
    "logging.options.json.infoBufferSize": "512",
    "hostnameOverride": "node-a1",
    "bindAddress": "192.0.2.1",
    "healthzBindAddress": "127.0.0.1:10256",
    "metricsBindAddress": "0.0.0.0:10249",
    "bindAddressHardFail": True,
    "enableProfiling": True,
    "showHiddenMetricsForVersion": "1.35",
    "mode": "nftables",
    "iptables.masqueradeBit": 15,
    "iptables.masqueradeAll": True,
    "iptables.localhostNodePorts": False,
    "iptables.syncPeriod": "1m0s",
    "iptables.minSyncPeriod": "2s",
    "ipvs.syncPeriod": "1m0s",
    "ipvs.minSyncPeriod": "2s",
    "ipvs.scheduler": "wlc",
    "ipvs.excludeCIDRs": ["192.0.2.0/24"],
    "ipvs.strictARP": True,
    "ipvs.tcpTimeout": "15m0s",
    "ipvs.tcpFinTimeout": "2m0s",
    "ipvs.udpTimeout": "5m0s",
    "nftables.masqueradeBit": 16,
    "nftables.masqueradeAll": True,
    "nftables.syncPeriod": "1h0m0s",
    "nftables.minSyncPeriod": "500ms",
    "winkernel.networkName": "l2",
    "winkernel.sourceVip": "192.0.2.2",
    "winkernel.enableDSR": True,
    "winkernel.rootHnsEndpointName": "cbr0",
    "winkernel.forwardHealthCheckVip": True,
    "detectLocalMode": "NodeCIDR",
    "detectLocal.bridgeInterface": "cni0",
    "detectLocal.interfaceNamePrefix": "veth",
    "clusterCIDR": "10.244.0.0/16,fd00:10:244::/56",
    "nodePortAddresses": ["10.0.0.0/8"],
    "oomScoreAdj": -998,
    "conntrack.maxPerCore": 0,
    "conntrack.min": 0,
    "conntrack.tcpEstablishedTimeout": "0s",
    "conntrack.tcpCloseWaitTimeout": "30m0s",
    "conntrack.tcpBeLiberal": True,
    "conntrack.udpTimeout": "40s",
    "conntrack.udpStreamTimeout": "3m0s",
    "configSyncPeriod": "10m0s",
    "portRange": "300-2000",
    "windowsRunAsService": True,
}
#: Some of the fields need these.
_WITH: dict[str, dict[str, Any]] = {
    "logging.options.text.splitStream": {"featureGates": {"LoggingAlphaOptions": True}},
    "logging.options.text.infoBufferSize": {"featureGates": {"LoggingAlphaOptions": True}},
    "logging.options.json.splitStream": {"featureGates": {"AllAlpha": True}},
    "logging.options.json.infoBufferSize": {"featureGates": {"AllAlpha": True}},
}


def leaves(struct: type[msgspec.Struct], path: str = "") -> list[str]:
    found = []
    for field in msgspec.structs.fields(struct):
        here = f"{path}{field.encode_name}"
        kind = bare(field.type)
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            found += leaves(kind, f"{here}.")
        else:
            found.append(here)
    return found


def at(value: Any, path: str) -> Any:
    for part in path.split("."):
        value = value[part]
    return value


def test_defaults_equal_those_that_a_real_kube_proxy_writes() -> None:
    assert kube_proxy_yaml(kp.DEFAULTS) == (SAMPLES / "defaults.yaml").read_text()


def test_file_written_by_a_real_kube_proxy_is_read_as_the_defaults() -> None:
    found = parse((SAMPLES / "defaults.yaml").read_text(), "defaults.yaml")
    assert kp.complete(found.kube_proxy) == kp.DEFAULTS


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_configz_equals_that_of_a_real_kube_proxy(mode: str) -> None:
    wanted = json.loads((SAMPLES / f"configz-{mode}.json").read_text())
    found = used(
        {
            "mode": mode,
            "hostnameOverride": "node-a1",
            "clientConnection": {"kubeconfig": "/var/lib/kube-proxy/kubeconfig.conf"},
            "healthzBindAddress": "127.0.0.1:10256",
            "clusterCIDR": "10.244.0.0/16,fd00:10:244::/56",
            "conntrack": {"maxPerCore": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        }
    )
    answered = json.loads(json.dumps(configz(found)))
    assert {"kubeproxy.config.k8s.io": answered["kubeproxy.config.k8s.io"]} == wanted
    assert list(answered["kubeproxy.config.k8s.io"]) == list(wanted["kubeproxy.config.k8s.io"])


def test_the_table_of_fields_has_every_field() -> None:
    assert set(FIELDS) == set(leaves(kp.KubeProxyConfiguration)) - {"kind", "apiVersion"}


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_is_read_and_written(path: str) -> None:
    found = used(nested(path, FIELDS[path]), _WITH.get(path, {}))
    assert at(kube_proxy_builtins(found.kube_proxy), path) == FIELDS[path]
    assert parse(to_yaml(found), "f") == found


@pytest.mark.parametrize("path", FIELDS)
def test_null_equals_an_omitted_field(path: str) -> None:
    assert kube_proxy(nested(path, None)) == kube_proxy()


@pytest.mark.parametrize("path", FIELDS)
def test_a_value_of_another_type_is_one_error(path: str) -> None:
    wrong = 1 if isinstance(FIELDS[path], bool | list | dict) else [1]
    (output,) = errors(text_of(merged(KUBE_PROXY, nested(path, wrong))))
    assert output.startswith(f"f: {path}: ")


@pytest.mark.parametrize("path", sorted({path.rpartition(".")[0] for path in FIELDS}))
def test_an_unknown_field_is_one_error(path: str) -> None:
    unknown = f"{path}.nothing" if path else "nothing"
    assert errors(text_of(merged(KUBE_PROXY, nested(unknown, None)))) == [f"f: {unknown}: unknown field"]


def test_field_names_are_case_sensitive() -> None:
    assert errors(text_of({**KUBE_PROXY, "clusterCidr": ""})) == [
        "f: clusterCIDR: unknown field".replace("CIDR", "Cidr")
    ]


def test_every_problem_is_reported() -> None:
    text = """
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
conntrack: {maxPerCore: many, min: -1, max: 3, tcpCloseWaitTimeout: 5}
clusterCIDR: 10.0.0.0/33
nodePortAddresses: [10.0.0.0/8, 10.0.0.1, 5]
logging: {verbosity: true, vmodule: [{filePattern: "a,b", verbosity: -1}]}
featureGates: {A: maybe}
winkernel: 7
mode: userspace
"""
    assert errors(text, "kube-proxy.yaml") == [
        "kube-proxy.yaml: conntrack.maxPerCore: Expected `int`, got `str`: 'many'",
        "kube-proxy.yaml: conntrack.max: unknown field",
        "kube-proxy.yaml: conntrack.tcpCloseWaitTimeout: 5 is not a duration such as 30s or 1h30m",
        "kube-proxy.yaml: nodePortAddresses[2]: Expected `str`, got `int`: 5",
        "kube-proxy.yaml: logging.verbosity: Expected `int`, got `bool`: True",
        "kube-proxy.yaml: logging.vmodule[0].verbosity: Expected `int` >= 0: -1",
        "kube-proxy.yaml: featureGates.A: Expected `bool`, got `str`: 'maybe'",
        "kube-proxy.yaml: winkernel: Expected `object`, got `int`",
        "kube-proxy.yaml: mode: 'userspace' is none of iptables, ipvs, nftables, nor empty",
        "kube-proxy.yaml: conntrack.min: -1 is below 0",
        "kube-proxy.yaml: nodePortAddresses[1]: '10.0.0.1' is not a CIDR: it has no prefix length",
        "kube-proxy.yaml: clusterCIDR: '10.0.0.0/33' is not a CIDR",
        "kube-proxy.yaml: logging.vmodule[0].filePattern: 'a,b' is empty, or has a comma or an equals sign",
    ]


def test_empty_strings_and_zeros_mean_defaults_where_the_api_defines_it() -> None:
    # kubeadm writes this.
    zeros = {
        "bindAddress": "",
        "bindAddressHardFail": False,
        "clientConnection": {"acceptContentTypes": "", "burst": 0, "contentType": "", "qps": 0},
        "clusterCIDR": "",
        "configSyncPeriod": "0s",
        "conntrack": {"maxPerCore": None, "min": None, "tcpCloseWaitTimeout": None},
        "detectLocalMode": "",
        "healthzBindAddress": "",
        "iptables": {"masqueradeBit": None, "minSyncPeriod": "0s", "syncPeriod": "0s"},
        "logging": {"flushFrequency": 0, "options": {"json": {"infoBufferSize": "0"}}, "verbosity": 0},
        "metricsBindAddress": "",
        "mode": "",
        "oomScoreAdj": None,
    }
    assert used(zeros).kube_proxy == kp.DEFAULTS


def test_meaningful_zeros_are_kept() -> None:
    found = used({"oomScoreAdj": 0, "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0"}})
    assert found.kube_proxy.oom_score_adj == 0
    assert (found.kube_proxy.conntrack.max_per_core, found.kube_proxy.conntrack.min) == (0, 0)
    assert not found.kube_proxy.conntrack.tcp_established_timeout


@pytest.mark.parametrize(
    ("given", "healthz", "metrics"),
    [
        ({"bindAddress": "::"}, "[::]:10256", "[::1]:10249"),
        ({"bindAddress": "fd00::1"}, "[::]:10256", "[::1]:10249"),
        ({"bindAddress": "192.0.2.1"}, "0.0.0.0:10256", "127.0.0.1:10249"),
        ({"healthzBindAddress": "127.0.0.1"}, "127.0.0.1:10256", "127.0.0.1:10249"),
        ({"metricsBindAddress": "fd00::1"}, "0.0.0.0:10256", "[fd00::1]:10249"),
    ],
)
def test_default_serving_addresses_follow_the_bind_address(
    given: dict[str, Any], healthz: str, metrics: str
) -> None:
    found = kube_proxy(given).kube_proxy
    assert (found.healthz_bind_address, found.metrics_bind_address) == (healthz, metrics)


@pytest.mark.parametrize("mode", ["iptables", "ipvs", "nftables"])
def test_sync_periods_are_those_of_the_mode_in_use(mode: str) -> None:
    found = kube_proxy_builtins(used({"mode": mode}).kube_proxy)
    assert found[mode]["syncPeriod"] == "30s"
    others = {"iptables", "ipvs", "nftables"} - {mode}
    assert all(found[each]["syncPeriod"] == found[each]["minSyncPeriod"] == "0s" for each in others)


def test_mode_nftables_serves_node_ports_at_the_primary_addresses() -> None:
    assert used({"mode": "nftables"}).kube_proxy.node_port_addresses == ("primary",)
    assert used({"mode": "nftables", "nodePortAddresses": []}).kube_proxy.node_port_addresses == ("primary",)
    assert used({"mode": "nftables", "nodePortAddresses": ["0.0.0.0/0"]}).kube_proxy.node_port_addresses == (
        "0.0.0.0/0",
    )


def test_null_and_empty_lists_are_kept() -> None:
    null, empty = used(), used({"nodePortAddresses": [], "ipvs": {"excludeCIDRs": []}})
    assert "nodePortAddresses: null\n" in kube_proxy_yaml(null.kube_proxy)
    assert "  excludeCIDRs: null\n" in kube_proxy_yaml(null.kube_proxy)
    assert "nodePortAddresses: []\n" in kube_proxy_yaml(empty.kube_proxy)
    assert "  excludeCIDRs: []\n" in kube_proxy_yaml(empty.kube_proxy)


def test_masquerade_all_is_read_from_the_section_of_the_mode() -> None:
    both = {"iptables": {"masqueradeAll": True}}
    assert [
        used({"mode": mode}, both).kube_proxy.masquerade_all for mode in ("iptables", "ipvs", "nftables")
    ] == [
        True,
        True,
        False,
    ]


def test_log_flush_frequency_may_be_nanoseconds() -> None:
    assert kube_proxy(
        {"logging": {"flushFrequency": 2_500_000_000}}
    ).kube_proxy.logging.flush_frequency == parse_duration("2.5s")


def test_written_yaml_is_equal_for_all_parsers() -> None:
    strange = {"hostnameOverride": "1.5", "portRange": "12", "clientConnection": {"kubeconfig": "a: b # c"}}
    written = kube_proxy_yaml(used(strange).kube_proxy)
    assert 'hostnameOverride: "1.5"\n' in written
    assert yaml.safe_load(written)["clientConnection"]["kubeconfig"] == "a: b # c"
