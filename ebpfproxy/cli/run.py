"""``ebpfproxy run``: the agent."""

from __future__ import annotations

from pathlib import Path

import click

from ebpfproxy import logs
from ebpfproxy.agent import Agent
from ebpfproxy.cli import options
from ebpfproxy.cli.errors import one_line
from ebpfproxy.cli.values import Seconds, prefixes, split
from ebpfproxy.datapath import maglev
from ebpfproxy.datapath.conntrack import Timeouts
from ebpfproxy.datapath.layout import Capacity
from ebpfproxy.datapath.origins import StaleTcp
from ebpfproxy.datapath.ports import PortRangeError, beside_local_range, parse_range
from ebpfproxy.datapath.probe import Feature
from ebpfproxy.datapath.roots import find_cgroup_root
from ebpfproxy.health.server import BindAddressError
from ebpfproxy.kube.client import ConfigError
from ebpfproxy.kube.manifests import ManifestError
from ebpfproxy.logs import get_logger
from ebpfproxy.node.identity import NodeNameError, node_name
from ebpfproxy.node.local import LocalMode, LocalPods
from ebpfproxy.node.network import NodePortAddressesError, parse_node_port_addresses
from ebpfproxy.options import AgentOptions
from ebpfproxy.services.balancing import parse_algorithm
from ebpfproxy.services.model import Algorithm

log = get_logger(__name__)


@click.command("run", context_settings={"auto_envvar_prefix": "EBPFPROXY", "show_default": True})
@options.bpf_root
@options.cgroup_root
@click.option(
    "--manifests",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Read Services, EndpointSlices and Nodes from the YAML and JSON files here, not from a cluster.",
)
@click.option("--kubeconfig", type=click.Path(path_type=Path), help="Kubeconfig of the API server.")
@click.option("--master", metavar="URL", help="Address of the API server; overrides the kubeconfig's.")
@click.option("--hostname-override", metavar="NAME", help="Name of this node.  [default: the host's name]")
@click.option(
    "--healthz-bind-address",
    default="0.0.0.0:10256",
    metavar="IP:PORT",
    help="Where /healthz and /livez are served; empty for nowhere.",
)
@click.option(
    "--metrics-bind-address",
    default="127.0.0.1:10249",
    metavar="IP:PORT",
    help="Where /metrics, /healthz, /proxyMode and /configz are served; empty for nowhere.",
)
@click.option(
    "--localhost-nodeports/--no-localhost-nodeports",
    default=True,
    help="NodePorts answer on loopback, for processes in the host's own network namespace.",
)
@click.option(
    "--nodeport-guard/--no-nodeport-guard",
    default=True,
    help="bind() to a Service's NodePort fails with EADDRINUSE for processes of the host's namespace.",
)
@click.option(
    "--nodeport-addresses",
    metavar="CIDRS",
    default="",
    show_default=False,
    help="Where NodePorts answer: CIDRs separated by commas, or 'primary'.  [default: all of uplinks]",
)
@click.option(
    "--external-ips/--no-external-ips", default=True, help="Serve spec.externalIPs (see CVE-2020-8554)."
)
@click.option(
    "--devices",
    metavar="PATTERNS",
    default="",
    show_default=False,
    help="Uplinks by name: patterns such as eth*, separated by commas.  [default: by routes and addresses]",
)
@click.option(
    "--detect-local-mode",
    type=click.Choice([str(mode) for mode in LocalMode]),
    default=str(LocalMode.DEVICES),
    help="How a packet of this node's own pods is told: such clients are not masqueraded.",
)
@click.option("--cluster-cidr", metavar="CIDRS", default="", help="Of pods, for mode ClusterCIDR.")
@click.option("--pod-bridge-interface", metavar="NAME", default="", help="For mode BridgeInterface.")
@click.option("--pod-interface-name-prefix", metavar="PREFIX", default="", help="For InterfaceNamePrefix.")
@click.option(
    "--service-cidr",
    metavar="CIDRS",
    default="",
    help="Of cluster IPs: packets to an address in it that no Service has are dropped.",
)
@click.option("--masquerade-all", is_flag=True, help="Masquerade all traffic through Services in packets.")
@click.option(
    "--bypass-netfilter",
    is_flag=True,
    help="Forward masqueraded flows from the hook: faster, but no rule of a CNI or firewall sees them.",
)
@click.option(
    "--masquerade-ports",
    metavar="FIRST-LAST",
    default="",
    show_default=False,
    help="Source ports for masqueraded clients.  [default: the larger gap beside ip_local_port_range]",
)
@click.option(
    "--conntrack-tcp-timeout-established",
    type=Seconds(),
    default="24h",
    help="How long an established connection may be silent.",
)
@click.option(
    "--conntrack-tcp-timeout-close-wait",
    type=Seconds(),
    default="1h",
    help="How long one may be silent that one side has closed.",
)
@click.option("--conntrack-udp-timeout", type=Seconds(), default="30s", help="UDP flow without an answer.")
@click.option("--conntrack-udp-timeout-stream", type=Seconds(), default="2m", help="Answered UDP flow.")
@click.option(
    "--lb-algorithm",
    metavar="NAME",
    default="random",
    help=f"How backends are chosen for Services that do not say so: {', '.join(map(str, Algorithm))}.",
)
@click.option(
    "--maglev-table-size",
    type=click.Choice([str(size) for size in maglev.SIZES]),
    default=str(maglev.DEFAULT_SIZE),
    help="Places in the table of a Service with Maglev; the same on every node.",
)
@click.option(
    "--stale-tcp",
    type=click.Choice([str(each) for each in StaleTcp]),
    default=str(StaleTcp.GONE),
    help="When TCP connections through a Service are ended: once their endpoint is gone, already when it is "
    "not ready, never. Connected UDP sockets always are.",
)
@click.option(
    "--max-conntrack",
    type=click.IntRange(1024, 1 << 26),
    default=Capacity().conntrack,
    help="Conntrack entries: two a flow, four where it is masqueraded.",
)
@click.option(
    "--max-services",
    type=click.IntRange(1, 1 << 20),
    default=Capacity().services,
    help="Service ports that the maps hold, each family counted.",
)
@click.option(
    "--max-backends",
    type=click.IntRange(1, 1 << 22),
    default=Capacity().backends,
    help="Endpoint addresses and ports that the maps hold.",
)
@click.option(
    "--max-slots",
    type=click.IntRange(1, 1 << 27),
    default=None,
    show_default=False,
    help="Places in all selections: one a backend and service port, more with weights, a table with Maglev."
    "  [default: 4 times --max-backends]",
)
@click.option(
    "--max-affinity",
    type=click.IntRange(1, 1 << 24),
    default=Capacity().affinity,
    help="Clients of Services with session affinity that are remembered.",
)
@click.option(
    "--max-connections",
    type=click.IntRange(1, 1 << 22),
    default=Capacity().connected,
    help="Connected sockets through Services that are known; of others getpeername() is not translated, and "
    "they are not ended when their backend goes.",
)
@click.option(
    "--without",
    "without",
    type=click.Choice([str(feature) for feature in Feature]),
    multiple=True,
    help="Do not use this kernel feature, but its fallback.",
)
@click.option("-v", "--verbosity", type=click.IntRange(0, 10), default=0, help="4 and above: every event.")
@click.option("--logging-format", type=click.Choice(["text", "json"]), default="text", help="Log format.")
def command(
    *,
    bpf_root: Path,
    cgroup_root: Path | None,
    manifests: Path | None,
    kubeconfig: Path | None,
    master: str | None,
    hostname_override: str | None,
    healthz_bind_address: str,
    metrics_bind_address: str,
    localhost_nodeports: bool,
    nodeport_guard: bool,
    nodeport_addresses: str,
    external_ips: bool,
    devices: str,
    detect_local_mode: str,
    cluster_cidr: str,
    pod_bridge_interface: str,
    pod_interface_name_prefix: str,
    service_cidr: str,
    masquerade_all: bool,
    bypass_netfilter: bool,
    masquerade_ports: str,
    conntrack_tcp_timeout_established: float,
    conntrack_tcp_timeout_close_wait: float,
    conntrack_udp_timeout: float,
    conntrack_udp_timeout_stream: float,
    lb_algorithm: str,
    maglev_table_size: str,
    stale_tcp: str,
    max_conntrack: int,
    max_services: int,
    max_backends: int,
    max_slots: int | None,
    max_affinity: int,
    max_connections: int,
    without: tuple[str, ...],
    verbosity: int,
    logging_format: str,
) -> None:
    """Run the agent of this node until SIGTERM; what it programmed stays in force then.

    Objects come from the API server (in a pod: its service account; else --kubeconfig or --master), or
    from --manifests.
    """
    if manifests is not None and (kubeconfig is not None or master is not None):
        raise click.UsageError("--manifests goes without --kubeconfig and --master")
    logs.configure(logging_format, verbosity)
    try:
        with one_line():
            Agent(
                AgentOptions(
                    node_name=node_name(hostname_override),
                    bpf_root=bpf_root,
                    cgroup_root=cgroup_root or find_cgroup_root(),
                    manifests=manifests,
                    kubeconfig=kubeconfig,
                    master=master,
                    healthz_bind_address=healthz_bind_address,
                    metrics_bind_address=metrics_bind_address,
                    node_ports_on_loopback=localhost_nodeports,
                    guard_node_ports=nodeport_guard,
                    node_port_addresses=parse_node_port_addresses(split(nodeport_addresses)),
                    external_ips=external_ips,
                    devices=split(devices),
                    local_pods=_local_pods(
                        LocalMode(detect_local_mode),
                        cluster_cidr,
                        pod_bridge_interface,
                        pod_interface_name_prefix,
                    ),
                    cluster_cidrs=prefixes("--cluster-cidr", cluster_cidr),
                    service_cidrs=prefixes("--service-cidr", service_cidr),
                    masquerade_all=masquerade_all,
                    bypass_netfilter=bypass_netfilter,
                    masquerade_ports=(
                        parse_range(masquerade_ports) if masquerade_ports else beside_local_range()
                    ),
                    algorithm=_algorithm(lb_algorithm),
                    maglev_size=int(maglev_table_size),
                    stale_tcp=StaleTcp(stale_tcp),
                    timeouts=Timeouts(
                        tcp_established=conntrack_tcp_timeout_established,
                        tcp_close_wait=conntrack_tcp_timeout_close_wait,
                        udp=conntrack_udp_timeout,
                        udp_stream=conntrack_udp_timeout_stream,
                    ),
                    capacity=Capacity(
                        services=max_services,
                        backends=max_backends,
                        connected=max_connections,
                        conntrack=max_conntrack,
                        slots=max_slots or 4 * max_backends,
                        affinity=max_affinity,
                    ),
                    without=frozenset(map(Feature, without)),
                )
            ).run()
    except (
        ConfigError,
        ManifestError,
        NodeNameError,
        BindAddressError,
        NodePortAddressesError,
        PortRangeError,
    ) as error:
        raise click.ClickException(str(error)) from error


def _algorithm(name: str) -> Algorithm:
    """Raises UsageError for an unknown one."""
    found, remark = parse_algorithm(name)
    if found is None:
        raise click.UsageError(f"--lb-algorithm: {remark}")
    if remark:
        log.warning("algorithm", remark=remark)
    return found


def _local_pods(mode: LocalMode, cluster_cidr: str, bridge: str, prefix: str) -> LocalPods:
    """Raises UsageError where a mode's own option is missing."""
    needed = {
        LocalMode.CLUSTER_CIDR: ("--cluster-cidr", cluster_cidr),
        LocalMode.BRIDGE_INTERFACE: ("--pod-bridge-interface", bridge),
        LocalMode.INTERFACE_NAME_PREFIX: ("--pod-interface-name-prefix", prefix),
    }
    option, value = needed.get(mode, ("", ""))
    if option and not value:
        raise click.UsageError(f"--detect-local-mode {mode} needs {option}")
    return LocalPods(mode, value)
