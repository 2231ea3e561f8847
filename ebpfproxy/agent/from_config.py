"""From a configuration to the agent's options.

These fields cannot mean the same as in kube-proxy:

- **mode** selects no way of working, only the defaults that kube-proxy gives each mode: the scheduler of
  ``ipvs``, ``primary`` node addresses for ``nftables``, and no loopback for both but by ``localhost``.
- **detectLocalMode: ClusterCIDR with an empty clusterCIDR**: kube-proxy then knows no local pods, and
  masquerades no traffic to cluster IPs whatever its source. Here it falls back to ``Devices``: what comes
  from a device that leads to pods or VMs of this node is a pod's. For pods this is the same; other traffic
  to cluster IPs, routed to this node from outside, is masqueraded. With a clusterCIDR of one family only,
  nothing of the other family is a local pod: kube-proxy does not masquerade it, and here it is.
- **nodePortAddresses** with CIDRs of one family only: nothing of the other, where kube-proxy takes all of
  the other's. Link-local IPv6 addresses are not among "all": no packet is forwarded from or to one.
- **localhostNodePorts** holds for the processes of the host's own network namespace, for both families and
  all protocols, without ``route_localnet``.
- **conntrack time-outs** are those of the agent's own flows; 0, with which kube-proxy leaves the kernel's
  alone, is the agent's default: the kernel's value for UDP, kube-proxy's for TCP.
- **ipvs.scheduler** chooses the algorithm in any mode. kube-proxy's IPVS has ``rr`` without one; a name that
  is unknown here is that default, with a remark.

The caller takes what :class:`~ebpfproxy.agent.agent_options.AgentOptions` lacks from the configuration:
logging, oomScoreAdj, conntrack's sysctls.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from ebpfproxy.agent.agent_options import AgentOptions
from ebpfproxy.config.datapath import Capacity
from ebpfproxy.config.durations import Duration
from ebpfproxy.config.kube_proxy import EXTERNAL_IPS_GATE, Conntrack, KubeProxyConfiguration
from ebpfproxy.config.load import Configuration
from ebpfproxy.config.masquerade_ports import default_range, local_range, overlaps, parse_range, shared_remark
from ebpfproxy.config.node_port_addresses import LOCALHOST, names_loopback, parse_node_port_addresses
from ebpfproxy.config.own import EbpfProxyConfiguration
from ebpfproxy.datapath.flows.conntrack_table import Timeouts
from ebpfproxy.datapath.kernel.roots import find_cgroup_root
from ebpfproxy.node.identity import node_name
from ebpfproxy.node.local import LocalMode, LocalPods
from ebpfproxy.services.balancing import parse_algorithm
from ebpfproxy.services.model import Algorithm, Prefix
from ebpfproxy.services.values import parse_prefix


def agent_options(configuration: Configuration) -> tuple[AgentOptions, list[str]]:
    """Options from an effective configuration (:func:`ebpfproxy.config.load.effective`); remarks to log.

    Reads this host's name, cgroup mount and ``ip_local_port_range`` where the configuration leaves them open.
    Raises NodeNameError, RootError.
    """
    kube_proxy, own = configuration.kube_proxy, configuration.own
    chosen, remarks = algorithm(kube_proxy, own)
    local = local_range()
    ports = parse_range(own.masquerade_ports) if own.masquerade_ports else default_range(local)
    if overlaps(ports, local):
        remarks = [*remarks, shared_remark(ports)]
    options = AgentOptions(
        node_name=node_name(kube_proxy.hostname_override or None),
        bpf_root=Path(own.bpf_root),
        cgroup_root=Path(own.cgroup_root) if own.cgroup_root else find_cgroup_root(),
        manifests=Path(own.manifests) if own.manifests else None,
        kubeconfig=_path(kube_proxy.client_connection.kubeconfig),
        master=own.master or None,
        api_qps=kube_proxy.client_connection.qps,
        api_burst=kube_proxy.client_connection.burst,
        health_timeout=2 * kube_proxy.sync_period.seconds,
        bind_hard_fail=kube_proxy.bind_address_hard_fail,
        healthz_bind_address=kube_proxy.healthz_bind_address,
        metrics_bind_address=kube_proxy.metrics_bind_address,
        node_ports_on_loopback=node_ports_on_loopback(kube_proxy, own),
        guard_node_ports=own.node_port_guard,
        pod_sockets=own.pod_sockets,
        node_port_addresses=parse_node_port_addresses(kube_proxy.node_port_addresses or ()),
        external_ips=own.external_ips and external_ips_allowed(kube_proxy),
        devices=own.devices,
        local_pods=local_pods(kube_proxy, own),
        cluster_cidrs=_prefixes(kube_proxy.cluster_cidr.split(",")),
        service_cidrs=_prefixes(own.service_cidrs),
        masquerade_all=kube_proxy.masquerade_all,
        bypass_netfilter=own.bypass_netfilter,
        xdp=own.xdp,
        external_traffic_mode=own.external_traffic_mode,
        masquerade_ports=ports,
        masquerade_ports_shared=overlaps(ports, local),
        algorithm=chosen,
        maglev_size=own.maglev_table_size,
        stale_tcp=own.stale_tcp,
        stale_tcp_seconds=own.stale_tcp_seconds,
        socket_sweep_seconds=own.socket_sweep_seconds,
        drift_check_seconds=own.drift_check_seconds,
        timeouts=timeouts(kube_proxy.conntrack),
        capacity=Capacity(
            services=own.max_services,
            backends=own.max_backends,
            connected=own.max_connections,
            unconnected=own.max_datagram_sockets,
            conntrack=own.max_conntrack,
            slots=own.max_slots or 4 * own.max_backends,
            affinity=own.max_affinity,
        ),
        without=frozenset(own.without),
        trace_decisions=own.trace_decisions,
        measure_connections=own.measure_connections,
        measure_traffic=own.measure_traffic,
        metrics_services=own.metrics_services,
        metrics_backends=own.metrics_backends,
        otlp_endpoint=own.otlp_endpoint,
        otlp_interval_seconds=own.otlp_interval_seconds,
    )
    return options, remarks


def in_use(configuration: Configuration, options: AgentOptions) -> Configuration:
    """The effective configuration with what the agent uses where it leaves something open: for /configz."""
    first, last = options.masquerade_ports
    own = msgspec.structs.replace(
        configuration.own,
        cgroup_root=str(options.cgroup_root),
        detect_local_mode="Devices" if options.local_pods.mode is LocalMode.DEVICES else None,
        localhost_node_ports=options.node_ports_on_loopback,
        external_ips=options.external_ips,
        masquerade_ports=f"{first}-{last}",
        lb_algorithm=str(options.algorithm),
        max_slots=options.capacity.slots,
    )
    return msgspec.structs.replace(configuration, own=own)


def algorithm(kube_proxy: KubeProxyConfiguration, own: EbpfProxyConfiguration) -> tuple[Algorithm, list[str]]:
    """lbAlgorithm, else ipvs.scheduler, else the mode's own; and remarks to log."""
    default = Algorithm.ROUND_ROBIN if kube_proxy.mode == "ipvs" else Algorithm.RANDOM
    for path, name in (("lbAlgorithm", own.lb_algorithm), ("ipvs.scheduler", kube_proxy.ipvs.scheduler)):
        if name:
            found, remark = parse_algorithm(name)
            if found is None:
                return default, [f"{path}: {remark}; {default} is used"]
            return found, [f"{path}: {remark}"] if remark else []
    return default, []


def external_ips_allowed(kube_proxy: KubeProxyConfiguration) -> bool:
    """True unless the gate of 1.36 (KEP-5707) is off; it is on until about 1.40."""
    return kube_proxy.feature_gates.get(EXTERNAL_IPS_GATE, True)


def mode_remark(mode: str) -> str:
    """A remark to log if no ``mode`` was chosen; else empty."""
    if mode:
        return ""
    return (
        "mode is not set: its defaults are those of iptables, as kube-proxy's; kube-proxy 1.37 warns of that,"
        " and from 1.40 on it means nftables"
    )


def local_pods(kube_proxy: KubeProxyConfiguration, own: EbpfProxyConfiguration) -> LocalPods:
    """How this node's pods are recognized; see above for ClusterCIDR without one."""
    mode = LocalMode(own.detect_local_mode or kube_proxy.detect_local_mode)
    if mode is LocalMode.CLUSTER_CIDR and not kube_proxy.cluster_cidr.strip():
        return LocalPods(LocalMode.DEVICES)
    return LocalPods(
        mode,
        {
            LocalMode.CLUSTER_CIDR: kube_proxy.cluster_cidr,
            LocalMode.BRIDGE_INTERFACE: kube_proxy.detect_local.bridge_interface,
            LocalMode.INTERFACE_NAME_PREFIX: kube_proxy.detect_local.interface_name_prefix,
        }.get(mode, ""),
    )


def node_ports_on_loopback(kube_proxy: KubeProxyConfiguration, own: EbpfProxyConfiguration) -> bool:
    """localhostNodePorts of our document, else as kube-proxy: in mode iptables where nodePortAddresses (if
    there are any) have the loopback's; in other modes where they say ``localhost``, as since 1.37."""
    if own.localhost_node_ports is not None:
        return own.localhost_node_ports
    texts = kube_proxy.node_port_addresses or ()
    if kube_proxy.mode == "iptables":
        return kube_proxy.iptables.localhost_node_ports and names_loopback(texts)
    return LOCALHOST in texts


def timeouts(conntrack: Conntrack) -> Timeouts:
    """The time-outs of flows; 0 stands for the agent's default."""
    given = {
        "tcp_established": conntrack.tcp_established_timeout,
        "tcp_close_wait": conntrack.tcp_close_wait_timeout,
        "udp": conntrack.udp_timeout,
        "udp_stream": conntrack.udp_stream_timeout,
    }
    return Timeouts(**{name: each.seconds for name, each in given.items() if each > Duration()})


def conntrack_sysctls(conntrack: Conntrack, cpus: int) -> tuple[int, dict[str, int]]:
    """nf_conntrack_max (0: left alone) and the other sysctls, as cmd/kube-proxy/app/conntrack.go has them."""
    limit = max(conntrack.max_per_core * cpus, conntrack.min or 0) if conntrack.max_per_core else 0
    wanted = {
        "nf_conntrack_tcp_timeout_established": conntrack.tcp_established_timeout,
        "nf_conntrack_tcp_timeout_close_wait": conntrack.tcp_close_wait_timeout,
        "nf_conntrack_udp_timeout": conntrack.udp_timeout,
        "nf_conntrack_udp_timeout_stream": conntrack.udp_stream_timeout,
    }
    found = {name: int(timeout.seconds) for name, timeout in wanted.items() if timeout.seconds > 0}
    if conntrack.tcp_be_liberal:
        found["nf_conntrack_tcp_be_liberal"] = 1
    return limit, found


def _path(text: str) -> Path | None:
    return Path(text) if text else None


def _prefixes(texts: list[str] | tuple[str, ...]) -> tuple[Prefix, ...]:
    """The valid ones: clusterCIDR is checked only if detectLocalMode uses it."""
    return tuple(prefix for text in texts if (prefix := parse_prefix(text)) is not None)
