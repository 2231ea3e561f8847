"""The checks that kube-proxy makes of its configuration (pkg/proxy/apis/config/validation, Validate).

Paths are those of the file (``conntrack.maxPerCore``), whereas kube-proxy prints the names of its Go types.
Differences:

- addresses and CIDRs may not have leading zeros, nor may IPv4 be written in IPv6 (``::ffff:192.0.2.1``);
- any feature gate is accepted: which ones exist depends on the version, and only AllowServiceExternalIPs has
  an effect here;
- ``showHiddenMetricsForVersion`` may be any minor version, for the same reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from ebpfproxy.config.documents import Problem
from ebpfproxy.config.durations import Duration
from ebpfproxy.config.kube_proxy import (
    FORMATS,
    LOCAL_MODES,
    Conntrack,
    Ipvs,
    KubeProxyConfiguration,
    Logging,
)
from ebpfproxy.config.node_port_addresses import NodePortAddressesError, parse_node_port_addresses
from ebpfproxy.services.values import parse_address, parse_prefix

MODES = ("iptables", "ipvs", "nftables")
_QUANTITY = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[numkMGTPE]|[KMGTPE]i|[eE][+-]?[0-9]+)?")
_ALPHA_LOGGING = "LoggingAlphaOptions"

Found = Iterator[tuple[str, str]]


def validate(configuration: KubeProxyConfiguration) -> list[Problem]:
    """Problems of a complete configuration (:func:`ebpfproxy.config.kube_proxy.complete`), by path."""
    return [Problem("", path, text) for path, text in _validate(configuration)]


def _validate(found: KubeProxyConfiguration) -> Found:
    if not 0 <= found.iptables.masquerade_bit <= 31:
        yield "iptables.masqueradeBit", f"{found.iptables.masquerade_bit} is not within 0 and 31"
    if found.mode == "nftables" and not 0 <= found.nftables.masquerade_bit <= 31:
        yield "nftables.masqueradeBit", f"{found.nftables.masquerade_bit} is not within 0 and 31"
    if found.mode == "ipvs":
        yield from _ipvs(found.ipvs)
    yield from _mode(found)
    yield from _conntrack(found.conntrack)
    if not -1000 <= found.oom_score_adj <= 1000:
        yield "oomScoreAdj", f"{found.oom_score_adj} is not within -1000 and 1000"
    if found.client_connection.burst < 0:
        yield "clientConnection.burst", f"{found.client_connection.burst} is below 0"
    if not math.isfinite(found.client_connection.qps):
        yield "clientConnection.qps", f"{found.client_connection.qps} is not a finite number"
    if found.config_sync_period <= Duration():
        yield "configSyncPeriod", f"{found.config_sync_period} is not above 0"
    if parse_address(found.bind_address, strict=True) is None:
        yield "bindAddress", f"{found.bind_address!r} is not an IP address"
    for path, text in (
        ("healthzBindAddress", found.healthz_bind_address),
        ("metricsBindAddress", found.metrics_bind_address),
    ):
        why = _wrong_host_port(text)
        if why:
            yield path, why
    if not _is_port_range(found.port_range):
        yield "portRange", f"{found.port_range!r} is not a range of ports such as 300-2000"
    yield from _node_port_addresses(found.node_port_addresses or ())
    version = found.show_hidden_metrics_for_version
    if version and not re.fullmatch(r"[0-9]{1,4}\.[0-9]{1,4}", version):
        yield "showHiddenMetricsForVersion", f"{version!r} is not a minor version such as 1.35"
    yield from _detect_local(found)
    yield from _logging(found.logging, found.feature_gates)


def _mode(found: KubeProxyConfiguration) -> Found:
    if found.mode not in MODES:
        yield "mode", f"{found.mode!r} is none of {', '.join(MODES)}, nor empty"
        return
    section = getattr(found, found.mode)
    if section.sync_period <= Duration():
        yield f"{found.mode}.syncPeriod", f"{section.sync_period} is not above 0"
    if section.min_sync_period < Duration():
        yield f"{found.mode}.minSyncPeriod", f"{section.min_sync_period} is below 0"
    if section.sync_period > Duration() and section.min_sync_period > section.sync_period:
        yield (
            f"{found.mode}.syncPeriod",
            f"{section.sync_period} is below {found.mode}.minSyncPeriod, which is {section.min_sync_period}",
        )


def _ipvs(found: Ipvs) -> Found:
    for name, duration in (
        ("tcpTimeout", found.tcp_timeout),
        ("tcpFinTimeout", found.tcp_fin_timeout),
        ("udpTimeout", found.udp_timeout),
    ):
        if duration < Duration():
            yield f"ipvs.{name}", f"{duration} is below 0"
    for index, text in enumerate(found.exclude_cidrs or ()):
        if parse_prefix(text) is None:
            yield f"ipvs.excludeCIDRs[{index}]", f"{text!r} is not a CIDR"


def _conntrack(found: Conntrack) -> Found:
    for name, number in (("maxPerCore", found.max_per_core), ("min", found.min)):
        if number < 0:
            yield f"conntrack.{name}", f"{number} is below 0"
    for name, duration in (
        ("tcpEstablishedTimeout", found.tcp_established_timeout),
        ("tcpCloseWaitTimeout", found.tcp_close_wait_timeout),
        ("udpTimeout", found.udp_timeout),
        ("udpStreamTimeout", found.udp_stream_timeout),
    ):
        if duration < Duration():
            yield f"conntrack.{name}", f"{duration} is below 0"


def _wrong_host_port(text: str) -> str:
    host, colon, port = text.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    if not colon or (":" in host and not is_bracketed):
        return f"{text!r} is not IP:port"
    if parse_address(host[1:-1] if is_bracketed else host, strict=True) is None:
        return f"{text!r} is not IP:port: {host!r} is not an IP address"
    if not _is_port(port) or not int(port):
        return f"{text!r} is not IP:port: {port!r} is not a port"
    return ""


def _is_port(text: str) -> bool:
    return bool(re.fullmatch("[0-9]{1,5}", text)) and int(text) <= 65535


def _is_port_range(text: str) -> bool:
    """``300-2000``, ``300+1700``, ``300``, or nothing (apimachinery, ParsePortRange)."""
    text = text.strip()
    if not text or _is_port(text):
        return True
    low, hyphen, high = text.partition("-")
    if hyphen:
        return _is_port(low) and _is_port(high) and int(low) <= int(high)
    low, plus, more = text.partition("+")
    return bool(plus) and _is_port(low) and _is_port(more) and int(low) + int(more) <= 65535


def _node_port_addresses(texts: tuple[str, ...]) -> Found:
    for index, text in enumerate(texts):
        try:
            parse_node_port_addresses([text])
        except NodePortAddressesError as error:
            yield f"nodePortAddresses[{index}]", str(error)


def _detect_local(found: KubeProxyConfiguration) -> Found:
    mode = found.detect_local_mode
    if mode not in LOCAL_MODES:
        yield "detectLocalMode", f"{mode!r} is none of {', '.join(LOCAL_MODES)}, nor empty"
    for needing, name, value, flag in (
        ("BridgeInterface", "bridgeInterface", found.detect_local.bridge_interface, "--pod-bridge-interface"),
        (
            "InterfaceNamePrefix",
            "interfaceNamePrefix",
            found.detect_local.interface_name_prefix,
            "--pod-interface-name-prefix",
        ),
    ):
        if mode == needing and not value.strip():
            yield f"detectLocal.{name}", f"must not be empty: {mode} needs {flag}, or this field"
    if mode == "ClusterCIDR" and found.cluster_cidr:
        yield from _cluster_cidr(found.cluster_cidr)


def _cluster_cidr(text: str) -> Found:
    texts = text.split(",")
    parsed = [parse_prefix(each) for each in texts]
    for each, prefix in zip(texts, parsed, strict=True):
        if prefix is None:
            yield "clusterCIDR", f"{each!r} is not a CIDR"
    families = {len(prefix.address) for prefix in parsed if prefix is not None}
    if len(texts) > 2 or (len(texts) == 2 and None not in parsed and len(families) < 2):
        yield "clusterCIDR", f"{text!r} is neither one CIDR nor one of each family"


def _logging(found: Logging, gates: dict[str, bool]) -> Found:
    if found.format not in FORMATS:
        yield "logging.format", f"{found.format!r} is neither text nor json"
    if found.vmodule and found.format != "text":
        yield "logging.vmodule", "needs the format text"
    for index, item in enumerate(found.vmodule):
        if not item.file_pattern or "=" in item.file_pattern or "," in item.file_pattern:
            yield (
                f"logging.vmodule[{index}].filePattern",
                f"{item.file_pattern!r} is empty, or has a comma or an equals sign",
            )
    has_alpha = gates.get(_ALPHA_LOGGING, gates.get("AllAlpha", False))
    for name, options in (("text", found.options.text), ("json", found.options.json)):
        path = f"logging.options.{name}"
        if not _QUANTITY.fullmatch(options.info_buffer_size):
            yield f"{path}.infoBufferSize", f"{str(options.info_buffer_size)!r} is not a quantity such as 4Ki"
        elif not has_alpha and re.search("[1-9]", options.info_buffer_size):
            yield f"{path}.infoBufferSize", f"needs the feature gate {_ALPHA_LOGGING}"
        if options.split_stream and not has_alpha:
            yield f"{path}.splitStream", f"needs the feature gate {_ALPHA_LOGGING}"
