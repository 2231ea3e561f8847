"""KubeProxyConfiguration, ``kubeproxy.config.k8s.io/v1alpha1``, as kube-proxy 1.36 has it.

Source: kubernetes/kubernetes, staging/src/k8s.io/kube-proxy/config/v1alpha1/types.go and
component-base/logs/api/v1/types.go; defaults as a real ``kube-proxy --write-config-to`` writes them. Fields
stand in the API's order, which is the order that ``/configz`` answers in.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from ebpfproxy.config.documents import FlushFrequency, Quantity
from ebpfproxy.config.durations import Duration, seconds
from ebpfproxy.services.values import parse_address

API_VERSION = "kubeproxy.config.k8s.io/v1alpha1"
KIND = "KubeProxyConfiguration"

HEALTHZ_PORT, METRICS_PORT = 10256, 10249
PRIMARY = "primary"

Int32 = Annotated[int, msgspec.Meta(ge=-(1 << 31), le=(1 << 31) - 1)]
#: uint32 in the API, but klog takes no more than an int32.
Verbosity = Annotated[int, msgspec.Meta(ge=0, le=(1 << 31) - 1)]


class _Api(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Camel case, and nothing that is not named."""


class ClientConnection(_Api, frozen=True):
    """``qps`` requests a second on average, ``burst`` at once; a negative ``qps`` is no limit."""

    kubeconfig: str = ""
    accept_content_types: str = ""
    content_type: str = "application/vnd.kubernetes.protobuf"
    qps: float = 5.0
    burst: Int32 = 10


class VModuleItem(_Api, frozen=True):
    file_pattern: str = ""
    verbosity: Verbosity = 0


class OutputRouting(_Api, frozen=True):
    """Bytes, as a quantity of the API."""

    split_stream: bool = False
    info_buffer_size: Quantity = Quantity("0")


class LogOptions(_Api, frozen=True):
    text: OutputRouting = OutputRouting()
    json: OutputRouting = OutputRouting()


class Logging(_Api, frozen=True):
    format: str = "text"
    flush_frequency: FlushFrequency = FlushFrequency(5 * 10**9)
    verbosity: Verbosity = 0
    vmodule: tuple[VModuleItem, ...] = ()
    options: LogOptions = LogOptions()


class Iptables(_Api, frozen=True):
    masquerade_bit: Int32 = 14
    masquerade_all: bool = False
    localhost_node_ports: bool = True
    sync_period: Duration = Duration()
    min_sync_period: Duration = Duration()


class Ipvs(_Api, frozen=True):
    sync_period: Duration = Duration()
    min_sync_period: Duration = Duration()
    scheduler: str = ""
    exclude_cidrs: tuple[str, ...] | None = msgspec.field(default=None, name="excludeCIDRs")
    strict_arp: bool = msgspec.field(default=False, name="strictARP")
    tcp_timeout: Duration = Duration()
    tcp_fin_timeout: Duration = Duration()
    udp_timeout: Duration = Duration()


class Nftables(_Api, frozen=True):
    masquerade_bit: Int32 = 14
    masquerade_all: bool = False
    sync_period: Duration = Duration()
    min_sync_period: Duration = Duration()


class Winkernel(_Api, frozen=True):
    network_name: str = ""
    source_vip: str = ""
    enable_dsr: bool = msgspec.field(default=False, name="enableDSR")
    root_hns_endpoint_name: str = ""
    forward_health_check_vip: bool = False


class DetectLocal(_Api, frozen=True):
    bridge_interface: str = ""
    interface_name_prefix: str = ""


class Conntrack(_Api, frozen=True):
    """Time-outs: 0 leaves what the kernel has. ``max_per_core``: 0 leaves the limit, and ignores ``min``."""

    max_per_core: Int32 = 32768
    min: Int32 = 131072
    tcp_established_timeout: Duration = seconds(24 * 3600)
    tcp_close_wait_timeout: Duration = seconds(3600)
    tcp_be_liberal: bool = False
    udp_timeout: Duration = Duration()
    udp_stream_timeout: Duration = Duration()


class KubeProxyConfiguration(_Api, frozen=True):
    """What a file says; :func:`complete` puts in the defaults that depend on other fields."""

    kind: Literal["KubeProxyConfiguration"] = "KubeProxyConfiguration"
    api_version: Literal["kubeproxy.config.k8s.io/v1alpha1"] = "kubeproxy.config.k8s.io/v1alpha1"
    feature_gates: dict[str, bool] = {}
    client_connection: ClientConnection = ClientConnection()
    logging: Logging = Logging()
    hostname_override: str = ""
    bind_address: str = "0.0.0.0"
    healthz_bind_address: str = ""
    metrics_bind_address: str = ""
    bind_address_hard_fail: bool = False
    enable_profiling: bool = False
    show_hidden_metrics_for_version: str = ""
    mode: str = ""
    iptables: Iptables = Iptables()
    ipvs: Ipvs = Ipvs()
    nftables: Nftables = Nftables()
    winkernel: Winkernel = Winkernel()
    detect_local_mode: str = ""
    detect_local: DetectLocal = DetectLocal()
    cluster_cidr: str = msgspec.field(default="", name="clusterCIDR")
    node_port_addresses: tuple[str, ...] | None = None
    oom_score_adj: Int32 = -999
    conntrack: Conntrack = Conntrack()
    config_sync_period: Duration = seconds(15 * 60)
    port_range: str = ""
    windows_run_as_service: bool = False

    @property
    def masquerade_all(self) -> bool:
        """That of the mode's own section; IPVS has iptables'."""
        return (self.nftables if self.mode == "nftables" else self.iptables).masquerade_all


#: false: spec.externalIPs of Services are not served.
EXTERNAL_IPS_GATE = "AllowServiceExternalIPs"

#: (sync period, min sync period) where none is given. Only those of the mode in use are: kube-proxy keeps
#: one pair, whatever the mode, and writes zeros for the others.
SYNC_PERIODS = {
    "iptables": (seconds(30), seconds(1)),
    "ipvs": (seconds(30), Duration()),
    "nftables": (seconds(30), seconds(1)),
}


def with_api_defaults(given: KubeProxyConfiguration) -> KubeProxyConfiguration:
    """An empty text or a zero is the default, where the API says so (v1alpha1, SetDefaults)."""
    bind = given.bind_address or "0.0.0.0"
    packed = parse_address(bind, strict=True)
    any_address, loopback = ("0.0.0.0", "127.0.0.1") if packed and len(packed) == 4 else ("::", "::1")
    client, logging = given.client_connection, given.logging
    blank = OutputRouting().info_buffer_size
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
                **{
                    name: msgspec.structs.replace(each, info_buffer_size=each.info_buffer_size or blank)
                    for name, each in (("text", logging.options.text), ("json", logging.options.json))
                }
            ),
        ),
    )


def complete(given: KubeProxyConfiguration) -> KubeProxyConfiguration:
    """With the defaults of Linux, and those of the mode: what kube-proxy does after its flags are read."""
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
    """``IP`` with a port; what has one, or is no address, stays as it is."""
    packed = parse_address(address, strict=True)
    if packed is None:
        return address
    return f"{address}:{port}" if len(packed) == 4 else f"[{address}]:{port}"


#: What the agent uses where no file is given.
DEFAULTS = complete(with_api_defaults(KubeProxyConfiguration()))
