"""``ebpfproxy install``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from ebpfproxy.cli.cluster_access import access_and_namespace, cluster_errors, remark
from ebpfproxy.cli.option_types import NonEmpty, Seconds
from ebpfproxy.cli.output import echo
from ebpfproxy.config.documents import ConfigurationError
from ebpfproxy.operator import kube_proxy_objects
from ebpfproxy.operator.api import Api
from ebpfproxy.operator.install import rollout
from ebpfproxy.operator.install.apply import apply
from ebpfproxy.operator.install.node_cleanup import CLEANUP
from ebpfproxy.operator.install.prepare import PrepareError, Wanted, prepare
from ebpfproxy.operator.install.remove import RemoveError, remove
from ebpfproxy.operator.install.render import to_yaml
from ebpfproxy.operator.install.rollout import RolloutError
from ebpfproxy.operator.install.server_address import AddressError
from ebpfproxy.operator.names import AGENT

_CLIENT, _SERVER = "client", "server"


@contextmanager
def errors() -> Iterator[None]:
    """Errors become one line each, and exit code 1."""
    with cluster_errors(AddressError, PrepareError, RemoveError, RolloutError):
        try:
            yield
        except ConfigurationError as error:
            raise click.ClickException("\n".join(map(str, error.problems))) from error


@click.command("install")
@click.option("--image", metavar="REF", type=NonEmpty(), required=True, help="Image of the agent.")
@click.option(
    "--image-pull-secret",
    "pull_secrets",
    metavar="NAME",
    multiple=True,
    help="Secret in the namespace for pulling the image. May be repeated.",
)
@access_and_namespace
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="KubeProxyConfiguration, EbpfProxyConfiguration, or both as two documents.  [default: the"
    " configuration of the cluster's kube-proxy]",
)
@click.option(
    "--inherit/--no-inherit",
    default=True,
    show_default=True,
    help="Use kube-proxy's configuration and kubeadm's CIDRs.",
)
@click.option(
    "--api-server",
    metavar="URL",
    help="https://HOST:PORT at which nodes reach the control plane without Services.  [default: cluster-info"
    " in kube-public, else the address of an earlier install, else the kubeconfig's server]",
)
@click.option(
    "--dry-run",
    is_flag=False,
    flag_value=_CLIENT,
    type=click.Choice([_CLIENT, _SERVER]),
    help="client (also without a value): print the objects as YAML. server: let the API server validate them."
    " Nothing is changed.",
)
@click.option(
    "--force-conflicts",
    is_flag=True,
    help="Take over fields that another field manager owns, such as kubectl or Helm.",
)
@click.option(
    "--wait/--no-wait", default=True, show_default=True, help="Wait until the agent runs on all nodes."
)
@click.option(
    "--timeout",
    type=Seconds(),
    default="5m",
    show_default=True,
    help="Give up after this time in which no further node became ready, or the API server did not answer.",
)
def command(
    *,
    image: str,
    pull_secrets: tuple[str, ...],
    kubeconfig: str,
    context: str | None,
    master: str | None,
    namespace: str,
    config: Path | None,
    inherit: bool,
    api_server: str | None,
    dry_run: str | None,
    force_conflicts: bool,
    wait: bool,
    timeout: float,
) -> None:
    """Install the agent in a cluster, or update it.

    The agent works beside kube-proxy and takes over its configuration; fields that do not work in a pod are
    reported. Objects are applied server-side with the field manager "ebpfproxy". With --dry-run,
    --api-server, and --no-inherit or --config, no cluster is contacted.
    """
    wanted = Wanted(
        image=image,
        namespace=namespace,
        pull_secrets=pull_secrets,
        config=config,
        inherit=inherit,
        api_server=api_server,
    )
    with errors():
        if dry_run == _CLIENT:
            api = Api.from_kubeconfigs(kubeconfig, context, master, seconds=timeout) if wanted.asks else None
            echo(to_yaml(prepare(wanted, api, remark)), nl=False)
            return
        api = Api.from_kubeconfigs(kubeconfig, context, master, seconds=timeout)
        objects = prepare(wanted, api, remark)
        if dry_run is None:
            _end_cleanup(api, namespace, timeout)
        done = apply(api, objects, echo, remark, force=force_conflicts, dry_run=dry_run is not None)
        if done.failed:
            raise click.ClickException("\n".join(done.failed))
        if dry_run is not None:
            return
        if "ConfigMap" in done.changed and "DaemonSet" not in done.changed:
            remark("agents restart once the kubelet has updated the mounted file (about a minute)")
        if wait:
            echo(f"ebpfproxy runs on {rollout.wait(api, namespace, AGENT, timeout, remark)} nodes")
            if kube_proxy_objects.find(api) is not None:
                plan = "ebpfproxy migrate plan --all-nodes --kubeconfig FILE"
                remark(f"to check that all agents are in sync: `{plan}`")


def _end_cleanup(api: Api, namespace: str, seconds: float) -> None:
    """Deletes the cleanup DaemonSet of an earlier uninstall, which would remove the new agent's programs."""
    item = api.get("DaemonSet", namespace, CLEANUP)
    if item is not None:
        remove(api, {("DaemonSet", namespace, CLEANUP): item}, seconds, echo)
