"""Inheritance of kube-proxy's configuration, and its settings that a pod cannot apply."""

from __future__ import annotations

import pytest

from ebpfproxy.config import load
from ebpfproxy.config.documents import ConfigurationError
from ebpfproxy.config.load import Configuration
from ebpfproxy.operator.install import configuration
from ebpfproxy.operator.install.cluster_facts import Networking
from ebpfproxy.operator.install.configuration import Rendered
from ebpfproxy.operator.install.render import base_configuration
from tests.data import SAMPLES

SAMPLE = SAMPLES / "defaults.yaml"
KUBE_PROXY = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
OWN = "apiVersion: ebpfproxy.io/v1alpha1\nkind: EbpfProxyConfiguration\n"
BASE = base_configuration()
WHERE = "ConfigMap kube-system/kube-proxy: config.conf"
#: kubeadm writes nulls and empty values for fields that it leaves out.
KUBEADM = """\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection:
  acceptContentTypes: ""
  burst: 0
  contentType: ""
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
  qps: 0
clusterCIDR: 10.244.0.0/16
configSyncPeriod: 0s
conntrack:
  maxPerCore: null
  min: null
  tcpBeLiberal: false
  tcpCloseWaitTimeout: null
  tcpEstablishedTimeout: null
  udpStreamTimeout: 0s
  udpTimeout: 0s
detectLocal:
  bridgeInterface: ""
  interfaceNamePrefix: ""
detectLocalMode: ""
enableProfiling: false
healthzBindAddress: ""
hostnameOverride: ""
iptables:
  localhostNodePorts: null
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
ipvs:
  excludeCIDRs: null
  minSyncPeriod: 0s
  scheduler: ""
  strictARP: false
  syncPeriod: 0s
  tcpFinTimeout: 0s
  tcpTimeout: 0s
  udpTimeout: 0s
logging:
  flushFrequency: 0
  options: {json: {infoBufferSize: "0"}, text: {infoBufferSize: "0"}}
  verbosity: 0
metricsBindAddress: ""
mode: ""
nftables:
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
showHiddenMetricsForVersion: ""
winkernel:
  enableDSR: false
  forwardHealthCheckVip: false
  networkName: ""
  rootHnsEndpointName: ""
  sourceVip: ""
"""


def inherited(text: str) -> tuple[Configuration, list[str], str]:
    """Returns the configuration as the agent reads it, the remarks and the file."""
    given, remarks = configuration.of_kube_proxy(text, WHERE)
    made, more = configuration.in_a_pod(given, BASE, WHERE, has_kube_proxy=True)
    return load.parse(made.text, "config.yaml"), remarks + more, made.text


def test_file_of_kubeadm_becomes_its_set_fields_only() -> None:
    found, remarks, text = inherited(KUBEADM)
    assert text.partition("---\n")[0] == (f"{KUBE_PROXY}oomScoreAdj: -997\nclusterCIDR: 10.244.0.0/16\n")
    assert found.kube_proxy.cluster_cidr == "10.244.0.0/16"
    assert remarks == [
        f"{WHERE}: clientConnection.kubeconfig: /var/lib/kube-proxy/kubeconfig.conf left out: the pod has a"
        " service account"
    ]


def test_settings_of_operators_are_inherited() -> None:
    text = KUBE_PROXY + (
        "mode: ipvs\nipvs: {scheduler: lc, strictARP: true}\nnodePortAddresses: [10.0.0.0/8]\n"
        "clusterCIDR: 10.1.0.0/16,fd01::/48\niptables: {masqueradeAll: true}\nmetricsBindAddress: 0.0.0.0:10249\n"
        "clientConnection: {qps: 50, burst: 100}\nlogging: {verbosity: 3}\ndetectLocalMode: BridgeInterface\n"
        "detectLocal: {bridgeInterface: cbr0}\n"
    )
    found, remarks, _ = inherited(text)
    given = load.parse(text, "x").kube_proxy
    for name in (
        "mode",
        "ipvs",
        "node_port_addresses",
        "cluster_cidr",
        "iptables",
        "metrics_bind_address",
        "client_connection",
        "logging",
        "detect_local_mode",
        "detect_local",
    ):
        assert getattr(found.kube_proxy, name) == getattr(given, name), name
    assert remarks == []


@pytest.mark.parametrize(
    ("line", "message", "field", "value"),
    [
        ("oomScoreAdj: -1000", "-1000 becomes -997: less would need SYS_RESOURCE", "oom_score_adj", -997),
        ("hostnameOverride: a", "a left out: the DaemonSet tells", "hostname_override", ""),
        (
            "bindAddressHardFail: true",
            "true left out: kube-proxy has its ports",
            "bind_address_hard_fail",
            False,
        ),
        (
            "clientConnection: {kubeconfig: /k}",
            "/k left out: the pod has a service",
            "client_connection.kubeconfig",
            "",
        ),
    ],
)
def test_settings_impossible_in_a_pod_are_replaced_with_a_remark(
    line: str, message: str, field: str, value: object
) -> None:
    found, remarks, _ = inherited(f"{KUBE_PROXY}{line}\n")
    (remark,) = remarks
    assert remark.startswith(f"{WHERE}: ")
    assert message in remark
    read: object = found.kube_proxy
    for name in field.split("."):
        read = getattr(read, name)
    assert read == value


def test_conntrack_settings_and_oom_score_are_inherited() -> None:
    found, remarks, _ = inherited(
        f"{KUBE_PROXY}oomScoreAdj: -500\n"
        "conntrack: {maxPerCore: 65536, tcpEstablishedTimeout: 2h, udpTimeout: 10s, tcpBeLiberal: true}\n"
    )
    assert found.kube_proxy.conntrack.max_per_core == 65536
    assert found.kube_proxy.conntrack.tcp_be_liberal
    assert found.kube_proxy.oom_score_adj == -500
    assert found.kube_proxy.conntrack.tcp_established_timeout.seconds == 7200
    assert found.kube_proxy.conntrack.udp_timeout.seconds == 10
    assert remarks == []


def test_fields_of_other_releases_are_dropped_with_a_remark() -> None:
    found, remarks, _ = inherited(
        f"{KUBE_PROXY}udpIdleTimeout: 250ms\nconntrack: {{of: 7}}\nclusterCIDR: 10.1.0.0/16\n"
    )
    assert found.kube_proxy.cluster_cidr == "10.1.0.0/16"
    assert remarks == [
        f"{WHERE}: udpIdleTimeout: unknown field, ignored",
        f"{WHERE}: conntrack.of: unknown field, ignored",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{KUBE_PROXY}mode: fast\n", "mode: 'fast'"),
        (f"{KUBE_PROXY}oomScoreAdj: much\n", "oomScoreAdj: Expected `int`"),
        ("mode: iptables\n", "has no KubeProxyConfiguration"),
        ("{", "line 2"),
    ],
)
def test_invalid_file_is_a_one_line_error_with_its_object(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        inherited(text)
    assert str(caught.value).startswith(WHERE)
    assert message in str(caught.value)


def test_defaults_of_a_real_kube_proxy_are_accepted() -> None:
    if not SAMPLE.exists():
        pytest.skip("no samples")
    found, remarks, _ = inherited(SAMPLE.read_text())
    assert found.kube_proxy.mode == "iptables"
    assert remarks == []


def given(
    text: str, *, has_kube_proxy: bool = False, networking: Networking | None = None
) -> tuple[Rendered, list[str]]:
    return configuration.in_a_pod(
        load.parse(text, "mine.yaml"),
        BASE,
        "mine.yaml",
        has_kube_proxy=has_kube_proxy,
        networking=networking or Networking(),
    )


def test_our_document_is_inherited_except_settings_of_the_pod() -> None:
    found, remarks = given(f"{OWN}lbAlgorithm: maglev\nexternalIPs: false\nbpfRoot: /x\ncgroupRoot: /y\n")
    own = load.parse(found.text, "x").own
    assert (own.lb_algorithm, own.external_ips, own.cgroup_root) == ("maglev", False, "")
    assert [each.partition(" left out")[0] for each in remarks] == [
        "mine.yaml: bpfRoot: /x",
        "mine.yaml: cgroupRoot: /y",
    ]


def test_remarks_name_the_file_of_their_document() -> None:
    both = load.parse(f"{KUBE_PROXY}hostnameOverride: a\n---\n{OWN}bpfRoot: /x\n", "x")
    _, remarks = configuration.in_a_pod(both, BASE, WHERE, has_kube_proxy=True, own_where="ours")
    assert [each.partition(" left out")[0] for each in remarks] == [
        f"{WHERE}: hostnameOverride: a",
        "ours: bpfRoot: /x",
    ]


def test_hard_fail_is_kept_without_a_kube_proxy() -> None:
    found, remarks = given(f"{KUBE_PROXY}bindAddressHardFail: true\n")
    assert load.parse(found.text, "x").kube_proxy.bind_address_hard_fail
    assert remarks == []


def test_unset_fields_are_filled_from_kubeadm() -> None:
    networking = Networking(("10.244.0.0/16", "fd00::/48"), ("10.96.0.0/12",))
    found, remarks = given(KUBE_PROXY, networking=networking)
    read = load.parse(found.text, "x")
    assert read.kube_proxy.cluster_cidr == "10.244.0.0/16,fd00::/48"
    assert read.own.service_cidrs == ("10.96.0.0/12",)
    assert remarks == [
        "clusterCIDR: 10.244.0.0/16,fd00::/48, from kubeadm's podSubnet",
        "serviceCIDRs: 10.96.0.0/12, from kubeadm's serviceSubnet",
    ]
    kept, remarks = given(f"{KUBE_PROXY}clusterCIDR: 10.9.0.0/16\n---\n{OWN}serviceCIDRs: [10.8.0.0/16]\n")
    assert "10.9.0.0/16" in kept.text and "10.8.0.0/16" in kept.text
    assert remarks == []


@pytest.mark.parametrize(
    ("line", "health", "metrics"),
    [
        ("", ("", 10256), ("127.0.0.1", 10249)),
        ("healthzBindAddress: 0.0.0.0:20256\nmetricsBindAddress: '[::]:9'\n", ("", 20256), ("", 9)),
        ("healthzBindAddress: 127.0.0.1:1\n", ("127.0.0.1", 1), ("127.0.0.1", 10249)),
        ("bindAddress: '::'\n", ("", 10256), ("::1", 10249)),
    ],
)
def test_addresses_of_healthz_and_metrics(
    line: str, health: tuple[str, int], metrics: tuple[str, int]
) -> None:
    found, _ = given(KUBE_PROXY + line)
    assert (found.health, found.metrics) == (health, metrics)
