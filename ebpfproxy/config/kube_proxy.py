"""KubeProxyConfiguration, ``kubeproxy.config.k8s.io/v1alpha1``, as kube-proxy 1.36 has it.

Source: kubernetes/kubernetes, staging/src/k8s.io/kube-proxy/config/v1alpha1/types.go and
component-base/logs/api/v1/types.go; defaults as a real ``kube-proxy --write-config-to`` writes them. Fields
are in the API's order, which is the order that ``/configz`` answers in. Each names kube-proxy's flag for it
(``kube-proxy --help`` of 1.36), see :mod:`ebpfproxy.config.declarations`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from ebpfproxy.config.declarations import IGNORED, Flag
from ebpfproxy.config.documents import FlushFrequency, Quantity
from ebpfproxy.config.durations import Duration, seconds
from ebpfproxy.services.values import parse_address

API_VERSION = "kubeproxy.config.k8s.io/v1alpha1"
KIND = "KubeProxyConfiguration"

HEALTHZ_PORT, METRICS_PORT = 10256, 10249
PRIMARY = "primary"
LOCAL_MODES = ("ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix")
FORMATS = ("text", "json")

Int32 = Annotated[int, Meta(ge=-(1 << 31), le=(1 << 31) - 1)]
#: uint32 in the API, but klog takes no more than an int32.
Verbosity = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]


class _Api(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Camel-case names; unknown fields are errors."""


class ClientConnection(_Api, frozen=True):
    """``qps`` requests a second on average, ``burst`` at once; a negative ``qps`` is no limit."""

    kubeconfig: Annotated[
        str, Meta(description="Kubeconfig of the API server."), Flag("--kubeconfig", metavar="PATH")
    ] = ""
    accept_content_types: Annotated[str, IGNORED] = ""
    content_type: Annotated[str, Flag("--kube-api-content-type"), IGNORED] = (
        "application/vnd.kubernetes.protobuf"
    )
    qps: Annotated[float, Flag("--kube-api-qps")] = 5.0
    burst: Annotated[Int32, Flag("--kube-api-burst")] = 10


class VModuleItem(_Api, frozen=True):
    file_pattern: str = ""
    verbosity: Verbosity = 0


class TextOptions(_Api, frozen=True):
    split_stream: Annotated[bool, Flag("--log-text-split-stream")] = False
    info_buffer_size: Annotated[Quantity, Flag("--log-text-info-buffer-size")] = Quantity("0")


class JsonOptions(_Api, frozen=True):
    split_stream: Annotated[bool, Flag("--log-json-split-stream")] = False
    info_buffer_size: Annotated[Quantity, Flag("--log-json-info-buffer-size")] = Quantity("0")


class LogOptions(_Api, frozen=True):
    text: TextOptions = TextOptions()
    json: JsonOptions = JsonOptions()


class Logging(_Api, frozen=True):
    format: Annotated[str, Meta(description="Log format."), Flag("--logging-format", choices=FORMATS)] = (
        "text"
    )
    flush_frequency: Annotated[FlushFrequency, Flag("--log-flush-frequency"), IGNORED] = FlushFrequency(
        5 * 10**9
    )
    verbosity: Annotated[
        Verbosity,
        Meta(description="Log level; 4 and above: every event."),
        Flag("-v", "--verbosity", metavar="LEVEL"),
    ] = 0
    vmodule: Annotated[tuple[VModuleItem, ...], Flag("--vmodule"), IGNORED] = ()
    options: Annotated[LogOptions, IGNORED] = LogOptions()


_SYNC_PERIOD = Meta(
    description="A change that waits for twice this time makes the agent unhealthy: the value of the mode."
)


class Iptables(_Api, frozen=True):
    masquerade_bit: Annotated[Int32, Flag("--iptables-masquerade-bit"), IGNORED] = 14
    masquerade_all: Annotated[
        bool,
        Meta(
            description="Masquerade all traffic through Services in packets, "
            "but that of externalTrafficPolicy Local."
        ),
        Flag("--masquerade-all"),
    ] = False
    localhost_node_ports: Annotated[bool, Flag("--iptables-localhost-nodeports")] = True
    sync_period: Annotated[Duration, _SYNC_PERIOD, Flag("--iptables-sync-period")] = Duration()
    min_sync_period: Annotated[Duration, Flag("--iptables-min-sync-period"), IGNORED] = Duration()


class Ipvs(_Api, frozen=True):
    sync_period: Annotated[Duration, _SYNC_PERIOD, Flag("--ipvs-sync-period")] = Duration()
    min_sync_period: Annotated[Duration, Flag("--ipvs-min-sync-period"), IGNORED] = Duration()
    scheduler: Annotated[str, Flag("--ipvs-scheduler")] = ""
    exclude_cidrs: Annotated[tuple[str, ...] | None, Flag("--ipvs-exclude-cidrs"), IGNORED] = msgspec.field(
        default=None, name="excludeCIDRs"
    )
    strict_arp: Annotated[bool, Flag("--ipvs-strict-arp"), IGNORED] = msgspec.field(
        default=False, name="strictARP"
    )
    tcp_timeout: Annotated[Duration, Flag("--ipvs-tcp-timeout"), IGNORED] = Duration()
    tcp_fin_timeout: Annotated[Duration, Flag("--ipvs-tcpfin-timeout"), IGNORED] = Duration()
    udp_timeout: Annotated[Duration, Flag("--ipvs-udp-timeout"), IGNORED] = Duration()


class Nftables(_Api, frozen=True):
    masquerade_bit: Annotated[Int32, IGNORED] = 14
    masquerade_all: bool = False
    sync_period: Annotated[Duration, _SYNC_PERIOD] = Duration()
    min_sync_period: Annotated[Duration, IGNORED] = Duration()


class Winkernel(_Api, frozen=True):
    network_name: str = ""
    source_vip: str = ""
    enable_dsr: bool = msgspec.field(default=False, name="enableDSR")
    root_hns_endpoint_name: str = ""
    forward_health_check_vip: bool = False


class DetectLocal(_Api, frozen=True):
    bridge_interface: Annotated[
        str,
        Meta(description="Bridge of the pods, for --detect-local-mode BridgeInterface."),
        Flag("--pod-bridge-interface", metavar="NAME"),
    ] = ""
    interface_name_prefix: Annotated[
        str,
        Meta(description="Prefix of pods' devices, for --detect-local-mode InterfaceNamePrefix."),
        Flag("--pod-interface-name-prefix", metavar="PREFIX"),
    ] = ""


class Conntrack(_Api, frozen=True):
    """A time-out of 0 keeps the kernel's. ``max_per_core`` 0 keeps the limit, and ignores ``min``."""

    max_per_core: Annotated[Int32, Flag("--conntrack-max-per-core")] = 32768
    min: Annotated[Int32, Flag("--conntrack-min")] = 131072
    tcp_established_timeout: Annotated[
        Duration,
        Meta(description="Time-out of an idle established TCP connection."),
        Flag("--conntrack-tcp-timeout-established", metavar="DURATION"),
    ] = seconds(24 * 3600)
    tcp_close_wait_timeout: Annotated[
        Duration,
        Meta(description="Time-out of an idle TCP connection that one side has closed."),
        Flag("--conntrack-tcp-timeout-close-wait", metavar="DURATION"),
    ] = seconds(3600)
    tcp_be_liberal: Annotated[bool, Flag("--conntrack-tcp-be-liberal")] = False
    udp_timeout: Annotated[
        Duration,
        Meta(description="Time-out of a UDP flow without a reply."),
        Flag("--conntrack-udp-timeout", metavar="DURATION", default="30s"),
    ] = Duration()
    udp_stream_timeout: Annotated[
        Duration,
        Meta(description="Time-out of a UDP flow with replies that lasts for seconds."),
        Flag("--conntrack-udp-timeout-stream", metavar="DURATION", default="2m"),
    ] = Duration()


class KubeProxyConfiguration(_Api, frozen=True):
    """The content of a file; :func:`complete` adds the defaults that depend on other fields."""

    kind: Literal["KubeProxyConfiguration"] = "KubeProxyConfiguration"
    api_version: Literal["kubeproxy.config.k8s.io/v1alpha1"] = "kubeproxy.config.k8s.io/v1alpha1"
    feature_gates: Annotated[
        dict[str, bool],
        Meta(description="Feature gates; only AllowServiceExternalIPs has an effect."),
        Flag("--feature-gates", metavar="NAME=BOOL"),
        IGNORED,
    ] = {}
    client_connection: ClientConnection = ClientConnection()
    logging: Logging = Logging()
    hostname_override: Annotated[
        str,
        Meta(description="Name of this node."),
        Flag("--hostname-override", metavar="NAME", default="the host's name"),
    ] = ""
    bind_address: Annotated[
        str,
        Meta(description="Decides only the family of the two default addresses that follow."),
        Flag("--bind-address", metavar="IP"),
        IGNORED,
    ] = "0.0.0.0"
    healthz_bind_address: Annotated[
        str,
        Meta(description="Address of /healthz and /livez; empty disables them."),
        Flag("--healthz-bind-address", metavar="IP:PORT"),
    ] = ""
    metrics_bind_address: Annotated[
        str,
        Meta(description="Address of /metrics, /healthz, /proxyMode and /configz; empty disables them."),
        Flag("--metrics-bind-address", metavar="IP:PORT"),
    ] = ""
    bind_address_hard_fail: Annotated[bool, Flag("--bind-address-hard-fail")] = False
    enable_profiling: Annotated[bool, Flag("--profiling"), IGNORED] = False
    show_hidden_metrics_for_version: Annotated[str, Flag("--show-hidden-metrics-for-version"), IGNORED] = ""
    mode: Annotated[str, Flag("--proxy-mode")] = ""
    iptables: Iptables = Iptables()
    ipvs: Ipvs = Ipvs()
    nftables: Nftables = Nftables()
    winkernel: Annotated[Winkernel, IGNORED] = Winkernel()
    detect_local_mode: Annotated[
        str,
        Meta(
            description="How packets of this node's pods are recognized. Their clients are not masqueraded."
        ),
        Flag(
            "--detect-local-mode",
            choices=("Devices", *LOCAL_MODES),
            default="ClusterCIDR; Devices without a --cluster-cidr",
        ),
    ] = ""
    detect_local: DetectLocal = DetectLocal()
    cluster_cidr: Annotated[
        str,
        Meta(description="CIDRs of pods, for --detect-local-mode ClusterCIDR."),
        Flag("--cluster-cidr", metavar="CIDRS"),
    ] = msgspec.field(default="", name="clusterCIDR")
    node_port_addresses: Annotated[
        tuple[str, ...] | None,
        Meta(
            description="Addresses that answer on NodePorts: CIDRs, 'primary', 'localhost' and 'all', "
            "separated by commas."
        ),
        Flag(
            "--nodeport-addresses",
            metavar="CIDRS",
            default="all, or primary with --proxy-mode nftables",
        ),
    ] = None
    oom_score_adj: Annotated[Int32, Flag("--oom-score-adj")] = -999
    conntrack: Conntrack = Conntrack()
    config_sync_period: Annotated[Duration, Flag("--config-sync-period"), IGNORED] = seconds(15 * 60)
    port_range: Annotated[str, IGNORED] = ""
    windows_run_as_service: Annotated[bool, IGNORED] = False

    @property
    def masquerade_all(self) -> bool:
        """The value of the mode's own section; IPVS uses that of iptables."""
        return (self.nftables if self.mode == "nftables" else self.iptables).masquerade_all

    @property
    def sync_period(self) -> Duration:
        """The value of the mode's own section."""
        section: Iptables | Ipvs | Nftables = getattr(self, self.mode)
        return section.sync_period


#: false: spec.externalIPs of Services are not served.
EXTERNAL_IPS_GATE = "AllowServiceExternalIPs"

#: Default (sync period, min sync period). They apply to the mode in use only: kube-proxy keeps one pair and
#: writes zeros for the other modes.
SYNC_PERIODS = {
    "iptables": (seconds(30), seconds(1)),
    "ipvs": (seconds(30), Duration()),
    "nftables": (seconds(30), seconds(1)),
}


def with_api_defaults(given: KubeProxyConfiguration) -> KubeProxyConfiguration:
    """Replaces empty texts and zeros with the defaults of the API (v1alpha1, SetDefaults)."""
    bind = given.bind_address or "0.0.0.0"
    packed = parse_address(bind, strict=True)
    any_address, loopback = ("0.0.0.0", "127.0.0.1") if packed and len(packed) == 4 else ("::", "::1")
    client, logging = given.client_connection, given.logging
    text, json = logging.options.text, logging.options.json
    blank = TextOptions().info_buffer_size
    return msgspec.structs.replace(
        given,
        bind_address=bind,
        healthz_bind_address=with_port(given.healthz_bind_address or any_address, HEALTHZ_PORT),
        metrics_bind_address=with_port(given.metrics_bind_address or loopback, METRICS_PORT),
        config_sync_period=given.config_sync_period or seconds(15 * 60),
        client_connection=msgspec.structs.replace(
            client,
            content_type=client.content_type or ClientConnection().content_type,
            qps=client.qps or ClientConnection().qps,
            burst=client.burst or ClientConnection().burst,
        ),
        logging=msgspec.structs.replace(
            logging,
            format=logging.format or Logging().format,
            flush_frequency=logging.flush_frequency or Logging().flush_frequency,
            options=LogOptions(
                text=msgspec.structs.replace(text, info_buffer_size=text.info_buffer_size or blank),
                json=msgspec.structs.replace(json, info_buffer_size=json.info_buffer_size or blank),
            ),
        ),
    )


def complete(given: KubeProxyConfiguration) -> KubeProxyConfiguration:
    """Adds the defaults of Linux and of the mode, as kube-proxy does after it has read its flags."""
    mode = given.mode or "iptables"
    node_ports = given.node_port_addresses
    made = msgspec.structs.replace(
        given,
        mode=mode,
        detect_local_mode=given.detect_local_mode or "ClusterCIDR",
        node_port_addresses=(PRIMARY,) if mode == "nftables" and not node_ports else node_ports,
    )
    if mode not in SYNC_PERIODS:
        return made
    section: Iptables | Ipvs | Nftables = getattr(made, mode)
    period, least = SYNC_PERIODS[mode]
    section = msgspec.structs.replace(
        section,
        sync_period=section.sync_period or period,
        min_sync_period=section.min_sync_period or least,
    )
    return msgspec.structs.replace(made, **{mode: section})


def with_port(address: str, port: int) -> str:
    """Adds a port to an IP address; anything else is returned unchanged."""
    packed = parse_address(address, strict=True)
    if packed is None:
        return address
    return f"{address}:{port}" if len(packed) == 4 else f"[{address}]:{port}"


#: The configuration without a file.
DEFAULTS = complete(with_api_defaults(KubeProxyConfiguration()))
