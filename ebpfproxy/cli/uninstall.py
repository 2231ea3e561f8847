"""``ebpfproxy uninstall``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from ebpfproxy.cli.cluster_access import access_and_namespace, cluster_errors, remark, step_timeout
from ebpfproxy.cli.output import echo
from ebpfproxy.operator.api import Api, Object, shown
from ebpfproxy.operator.install import base
from ebpfproxy.operator.install.node_cleanup import image_of
from ebpfproxy.operator.install.remove import (
    RemoveError,
    against,
    clean_nodes,
    find,
    labels,
    remove,
    remove_labels,
)
from ebpfproxy.operator.names import AGENT

_STAYS = (
    "programs and maps stay on the nodes and translate with the last known endpoints, before kube-proxy."
    " Remove them with `ebpfproxy uninstall --cleanup --image REF`, or `ebpfproxy cleanup` on each node"
)


@click.command("uninstall")
@access_and_namespace
@click.option(
    "--cleanup",
    is_flag=True,
    help="Remove programs and maps from every node, with a temporary DaemonSet.",
)
@click.option("--image", metavar="REF", help="Image for --cleanup.  [default: the agents' image]")
@click.option("--dry-run", is_flag=True, help="Print what would be deleted, and blockers.")
@click.option("--force", is_flag=True, help="Continue even if no kube-proxy serves Services afterwards.")
@step_timeout
def command(
    *,
    kubeconfig: str,
    context: str | None,
    master: str | None,
    namespace: str,
    cleanup: bool,
    image: str | None,
    dry_run: bool,
    force: bool,
    timeout: float,
) -> None:
    """Remove the agent from a cluster: delete what install applied.

    It refuses unless kube-proxy runs on all nodes: `ebpfproxy migrate rollback` brings it back. Without
    --cleanup each node continues to translate with the Services and endpoints that the agent last wrote, and
    ignores changes.
    """
    with cluster_errors(RemoveError):
        api = Api.from_kubeconfigs(kubeconfig, context, master, seconds=timeout)
        found = find(api, namespace)
        labelled = labels(api, namespace)
        if not found and not labelled and not cleanup:
            echo("ebpfproxy is not installed in the cluster")
            return
        reasons = list(against(api, found)) if found or cleanup else []
        if dry_run:
            for place in found:
                echo(f"{shown(*place)} would be deleted")
            for node, label in labelled:
                echo(f"{shown('Node', '', node)}: label {label} would be removed")
        if reasons and not force:
            raise RemoveError("\n".join(reasons) + "\n--force continues anyway")
        for reason in reasons:
            remark(f"warning: {reason}")
        daemon_set = found.get(("DaemonSet", namespace, AGENT))
        image = _image(image, daemon_set) if cleanup else None
        if dry_run:
            return
        problems: list[str] = []
        with _collected(problems):
            remove(api, found, timeout, echo)
        # Cleaning needs the agents gone; other nodes need not wait for one that is down.
        gone = api.get("DaemonSet", namespace, AGENT) is None
        if image is not None and gone:
            with _collected(problems):
                clean_nodes(api, daemon_set or _from_base(namespace), image, timeout, echo)
        elif found and not cleanup:
            remark(_STAYS)
        if gone:
            with _collected(problems):
                remove_labels(api, labelled, echo)
        if problems:
            raise RemoveError("\n".join(problems))


@contextmanager
def _collected(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except RemoveError as error:
        problems.append(str(error))


def _image(said: str | None, daemon_set: Object | None) -> str:
    if said is None and daemon_set is None:
        raise click.UsageError(
            "--cleanup needs an --image: there is no DaemonSet of the agent to take it from"
        )
    return said or image_of(daemon_set or {})


def _from_base(namespace: str) -> Object:
    (found,) = (each for each in base.objects() if each["kind"] == "DaemonSet")
    found["metadata"]["namespace"] = namespace
    return found
