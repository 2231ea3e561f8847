"""``ebpfproxy run``: the agent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from ebpfproxy import logs
from ebpfproxy.agent.from_config import agent_options, conntrack_sysctls, in_use, mode_remark
from ebpfproxy.agent.reconciler import Agent
from ebpfproxy.cli import completion, options, run_flags
from ebpfproxy.cli.errors import one_line
from ebpfproxy.cli.migrate import cleanup_kube_proxy
from ebpfproxy.cli.option_types import Seconds
from ebpfproxy.config.bind_address import BindAddressError
from ebpfproxy.config.datapath import MAGLEV_DEFAULT_SIZE, MAGLEV_SIZES, Capacity, Feature, StaleTcp
from ebpfproxy.config.documents import ConfigurationError
from ebpfproxy.config.load import Configuration, effective, load, without_effect
from ebpfproxy.config.node_port_addresses import NodePortAddressesError
from ebpfproxy.config.write import configz, to_yaml
from ebpfproxy.kube.client import ConfigError
from ebpfproxy.kube.manifests import ManifestError
from ebpfproxy.logs import get_logger
from ebpfproxy.node.host import set_conntrack, set_oom_score_adj
from ebpfproxy.node.identity import NodeNameError
from ebpfproxy.node.local import LocalMode
from ebpfproxy.operator.migrate.node.handover import NodeHandover
from ebpfproxy.services.model import Algorithm

log = get_logger(__name__)


@click.command("run", context_settings={"auto_envvar_prefix": "EBPFPROXY", "show_default": True})
@options.bpf_root
@options.cgroup_root
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="KubeProxyConfiguration, EbpfProxyConfiguration, or both as two documents; flags win. The agent "
    "ends when the file changes, to be started again.",
)
@click.option(
    "--write-config-to",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the configuration that is used, flags included, and end.",
)
@click.option(
    "--cleanup",
    is_flag=True,
    help="Remove what a kube-proxy has left on this node, and end. Our own: ebpfproxy cleanup.",
)
@click.option(
    "--init-only",
    is_flag=True,
    help="Make the maps, compile and load the programs, and end; nothing is attached.",
)
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
    default=False,
    help="bind() to a Service's NodePort fails with EADDRINUSE for processes of the host's namespace.",
)
@click.option(
    "--pod-sockets/--no-pod-sockets",
    default=True,
    help="Translate at the sockets of pods, too, not only at the host's; without, in what pods send.",
)
@click.option(
    "--nodeport-addresses",
    metavar="CIDRS",
    default="",
    show_default=False,
    help="Where NodePorts answer: CIDRs, 'primary', 'localhost', 'all', separated by commas.  [default: all, "
    "or primary with --proxy-mode nftables]",
)
@click.option(
    "--external-ips/--no-external-ips", default=True, help="Serve spec.externalIPs (see CVE-2020-8554)."
)
@click.option(
    "--devices",
    metavar="PATTERNS",
    default="",
    show_default=False,
    help="Uplinks by name: patterns such as eth*, separated by commas.  [default: by the Node's addresses, "
    "routes and kinds]",
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
    help="Of cluster IPs, beside those of ServiceCIDR objects: what is sent to an address in them that no "
    "Service has is dropped.",
)
@run_flags.boolean("--masquerade-all", help="Masquerade all traffic through Services in packets.")
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
    help="Source ports for masqueraded clients.  [default: the larger gap beside ip_local_port_range, "
    "else 32768-65535]",
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
@click.option(
    "--conntrack-udp-timeout-stream",
    type=Seconds(),
    default="2m",
    help="UDP flow with answers that goes on for seconds.",
)
@click.option(
    "--lb-algorithm",
    metavar="NAME",
    default="random",
    shell_complete=completion.algorithms,
    help=f"How backends are chosen for Services that do not say so: {', '.join(map(str, Algorithm))}. IPVS's "
    "names work, too.",
)
@click.option(
    "--maglev-table-size",
    type=click.Choice([str(size) for size in MAGLEV_SIZES]),
    default=str(MAGLEV_DEFAULT_SIZE),
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
    "--stale-tcp-seconds",
    type=click.FloatRange(0, 3600),
    default=5.0,
    help="For so long an endpoint that was removed may come back before its TCP connections are ended. New "
    "connections and UDP leave it at once.",
)
@click.option(
    "--socket-sweep-seconds",
    type=click.FloatRange(0.1, 3600),
    default=60.0,
    help="How often what is known of sockets is compared with the sockets that there are. What is of none "
    "twice in a row is forgotten.",
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
    "--max-datagram-sockets",
    type=click.IntRange(1, 1 << 22),
    default=Capacity().unconnected,
    help="Unconnected UDP sockets that have sent to Services; the datagrams of others are translated in "
    "packets.",
)
@click.option(
    "--without",
    "without",
    type=click.Choice([str(feature) for feature in Feature]),
    multiple=True,
    help="Do not use this kernel feature, but its fallback.",
)
@run_flags.kube_proxy_flags
@click.option("-v", "--verbosity", type=click.IntRange(0, 10), default=0, help="4 and above: every event.")
@click.option("--logging-format", type=click.Choice(["text", "json"]), default="text", help="Log format.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    config: Path | None,
    write_config_to: Path | None,
    *,
    init_only: bool,
    cleanup: bool,
    **_: Any,
) -> None:
    """Run the agent of this node until SIGTERM; what it programmed stays in force then.

    Objects come from the API server (in a pod: its service account; else --kubeconfig or --master), or
    from --manifests.
    """
    if cleanup:
        cleanup_kube_proxy()
        return
    try:
        given = load(config) if config is not None else Configuration()
        used = effective(given, run_flags.given(ctx))
    except ConfigurationError as error:
        raise click.ClickException(str(error)) from error
    if write_config_to is not None:
        write_config_to.write_text(to_yaml(used))
        click.echo(f"the configuration is in {write_config_to}")
        return
    logs.configure(used.kube_proxy.logging.format, used.kube_proxy.logging.verbosity)
    try:
        with one_line():
            agent, remarks = agent_options(used)
            for remark in remarks:
                log.warning("configuration", remark=remark)
            unused = without_effect(used)
            if unused:
                log.warning("without effect here", fields=unused)
            if remark := mode_remark(run_flags.given(ctx).get("proxy_mode") or given.kube_proxy.mode):
                log.info("configuration", remark=remark)
            # What is wrong with the options is found here, before anything of this node is changed.
            proxy = Agent(
                agent,
                configz(in_use(used, agent)),
                config=config,
                init_only=init_only,
                handover=NodeHandover(),
            )
            if used.kube_proxy.oom_score_adj is not None:
                set_oom_score_adj(used.kube_proxy.oom_score_adj)
            set_conntrack(*conntrack_sysctls(used.kube_proxy.conntrack, os.cpu_count() or 1))
            proxy.run()
    except (
        ConfigError,
        ManifestError,
        NodeNameError,
        BindAddressError,
        NodePortAddressesError,
    ) as error:
        raise click.ClickException(str(error)) from error
