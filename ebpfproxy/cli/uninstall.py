"""``ebpfproxy uninstall``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from ebpfproxy.cli.install import cluster, errors, remark
from ebpfproxy.cli.option_types import Seconds
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
    "programs and maps stay on the nodes: they translate as they last knew it, before kube-proxy is asked."
    " Remove them with `ebpfproxy uninstall --cleanup --image REF`, or `ebpfproxy cleanup` on each node"
)


@click.command("uninstall")
@cluster
@click.option(
    "--cleanup",
    is_flag=True,
    help="Take programs and maps away on every node, by a DaemonSet that lives as long as that takes.",
)
@click.option("--image", metavar="REF", help="For --cleanup.  [default: what the agents run]")
@click.option("--dry-run", is_flag=True, help="Say what would be deleted, and what stands in the way.")
@click.option("--force", is_flag=True, help="Also where no kube-proxy follows Services from then on.")
@click.option("--timeout", type=Seconds(), default="2m", show_default=True, help="For pods, in each step.")
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
    """Take the agent out of a cluster: what install applied is deleted. Again does nothing.

    Refused where kube-proxy does not run on all nodes: `ebpfproxy migrate rollback` brings it back. Without
    --cleanup each node goes on translating with the Services and endpoints that the agent last wrote; changes
    are not followed.
    """
    with errors():
        api = Api.from_kubeconfigs(kubeconfig, context, master)
        found = find(api, namespace)
        labelled = labels(api, namespace)
        if not found and not labelled and not cleanup:
            click.echo("nothing of ebpfproxy is in the cluster")
            return
        reasons = list(against(api, found)) if found or cleanup else []
        if dry_run:
            for place in found:
                click.echo(f"{shown(*place)} would be deleted")
            for node, label in labelled:
                click.echo(f"{shown('Node', '', node)}: label {label} would be removed")
        if reasons and not force:
            raise RemoveError("\n".join(reasons) + "\n--force goes on all the same")
        for reason in reasons:
            remark(f"warning: {reason}")
        daemon_set = found.get(("DaemonSet", namespace, AGENT))
        image = _image(image, daemon_set) if cleanup else None
        if dry_run:
            return
        problems: list[str] = []
        with _collected(problems):
            remove(api, found, timeout, click.echo)
        # Beside agents nothing can be cleaned; a node that is down keeps others waiting for nothing.
        gone = api.get("DaemonSet", namespace, AGENT) is None
        if image is not None and gone:
            with _collected(problems):
                clean_nodes(api, daemon_set or _from_base(namespace), image, timeout, click.echo)
        elif found and not cleanup:
            remark(_STAYS)
        if gone:
            with _collected(problems):
                remove_labels(api, labelled, click.echo)
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
        raise click.UsageError("--cleanup needs an --image: no DaemonSet of the agent's is there to tell it")
    return said or image_of(daemon_set or {})


def _from_base(namespace: str) -> Object:
    (found,) = (each for each in base.objects() if each["kind"] == "DaemonSet")
    found["metadata"]["namespace"] = namespace
    return found
