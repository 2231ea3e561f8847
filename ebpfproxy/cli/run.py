"""``ebpfproxy run``: the agent."""

from __future__ import annotations

from pathlib import Path

import click

from ebpfproxy import logs
from ebpfproxy.agent import Agent, AgentOptions
from ebpfproxy.cli import options
from ebpfproxy.cli.errors import one_line
from ebpfproxy.datapath.layout import Capacity
from ebpfproxy.datapath.probe import Feature
from ebpfproxy.datapath.roots import find_cgroup_root
from ebpfproxy.health.server import BindAddressError
from ebpfproxy.kube.client import ConfigError
from ebpfproxy.kube.manifests import ManifestError
from ebpfproxy.node.identity import NodeNameError, node_name


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
    "--max-connections",
    type=click.IntRange(1, 1 << 22),
    default=Capacity().connected,
    help="Open connections through Services whose getpeername() is translated.",
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
    max_services: int,
    max_backends: int,
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
                    capacity=Capacity(
                        services=max_services, backends=max_backends, connected=max_connections
                    ),
                    without=frozenset(map(Feature, without)),
                )
            ).run()
    except (ConfigError, ManifestError, NodeNameError, BindAddressError) as error:
        raise click.ClickException(str(error)) from error
