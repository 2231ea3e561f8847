"""``ebpfproxy migrate … --all-nodes``: the commands for many nodes, which work on any machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import msgspec

from ebpfproxy.cli.migrate_tables import print_cluster, said
from ebpfproxy.cli.output import emit
from ebpfproxy.cli.settings import Decorator
from ebpfproxy.kube.errors import ConfigError
from ebpfproxy.operator.api import Api, ApiError
from ebpfproxy.operator.image import Image, image_of
from ebpfproxy.operator.migrate import daemonsets
from ebpfproxy.operator.migrate.cluster import selection
from ebpfproxy.operator.migrate.cluster.fleet import Fleet, FleetError, State
from ebpfproxy.operator.migrate.cluster.jobs import Jobs
from ebpfproxy.operator.migrate.cluster.selection import NodesError
from ebpfproxy.operator.migrate.switches import AGENT, Switch
from ebpfproxy.operator.waiting import WaitError


class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """The selected nodes, and the image for them."""

    all_nodes: bool
    selector: str
    node: tuple[str, ...]
    image: str | None
    daemonset: str

    def __bool__(self) -> bool:
        return self.all_nodes or bool(self.selector or self.node)


class Reach(msgspec.Struct, frozen=True, kw_only=True):
    """Access to the API server, and the limit for each step in seconds."""

    kubeconfig: Path | None
    master: str | None
    timeout: float


def choice(function: Decorator) -> Decorator:
    """Options of every command that works on one node or many."""
    for each in (
        click.option(
            "--daemonset",
            metavar="NAMESPACE/NAME",
            default=f"{AGENT.namespace}/{AGENT.name}",
            show_default=True,
            help="DaemonSet of the agents. Temporary pods run in its namespace.",
        ),
        click.option("--image", help="Image of temporary pods.  [default: the DaemonSet's]"),
        click.option("--selector", "-l", default="", metavar="LABELS", help="Label selector of nodes."),
        click.option(
            "--node",
            multiple=True,
            metavar="NAME",
            help="Name of a node. May be repeated; the order is kept.",
        ),
        click.option(
            "--all-nodes",
            is_flag=True,
            help="All nodes of the cluster instead of this one, each with a temporary pod.",
        ),
    ):
        function = each(function)
    return function


def chosen_by(given: dict[str, Any]) -> Chosen:
    """Removes the options of :class:`Chosen` from ``given``."""
    return Chosen(**{name: given.pop(name) for name in Chosen.__struct_fields__})


def reach_of(given: dict[str, Any], **alone: object) -> Reach:
    """Raises UsageError if one of ``alone``, the options for a single node, is set."""
    for name, value in {**alone, "hostname_override": given["hostname_override"]}.items():
        if value:
            raise click.UsageError(f"--{name.replace('_', '-')} applies to one node only: run it there")
    return Reach(**{name: given[name] for name in Reach.__struct_fields__})


@contextmanager
def _fleet(chosen: Chosen, reach: Reach) -> Iterator[Fleet]:
    if chosen.all_nodes and chosen.node:
        raise click.UsageError("--all-nodes and --node exclude each other")
    if reach.kubeconfig is None and reach.master is None:
        raise click.UsageError("many nodes need --kubeconfig")
    namespace, slash, name = chosen.daemonset.partition("/")
    if not slash:
        raise click.UsageError(f"--daemonset {chosen.daemonset} is not NAMESPACE/NAME")
    switch = Switch(namespace, name, AGENT.label)
    try:
        api = Api.from_options(reach.kubeconfig, reach.master, seconds=reach.timeout)
        found = selection.choose(api.list("Node", "", labelSelector=chosen.selector), chosen.node)
        image = _image(api, switch, chosen.image)
        yield Fleet(api, Jobs(api, namespace, image, reach.timeout), found, reach.timeout, switch)
    except (ApiError, ConfigError, WaitError, FleetError, NodesError) as error:
        raise click.ClickException(str(error)) from error


def _image(api: Api, switch: Switch, name: str | None) -> Image:
    found = daemonsets.find(api, switch)
    if found is None:
        if name is None:
            raise FleetError(f"there is no {switch}: set --daemonset or --image")
        return Image(name=name)
    image = image_of(found)
    return image if name is None else msgspec.structs.replace(image, name=name)


# -- commands


def plan(chosen: Chosen, reach: Reach, output: str) -> None:
    with _fleet(chosen, reach) as fleet:
        planned = fleet.plan()
    emit(planned, output, print_cluster)
    if len(planned.those(State.TODO, State.DONE)) < len(planned.nodes):
        raise SystemExit(1)


def run(chosen: Chosen, reach: Reach, output: str, *, parallel: int, skip_blocked: bool) -> None:
    with said(output) as say, _fleet(chosen, reach) as fleet:
        fleet.run(say, parallel=parallel, skip_blocked=skip_blocked)


def rollback(chosen: Chosen, reach: Reach, output: str, *, parallel: int, drain: float) -> None:
    with said(output) as say, _fleet(chosen, reach) as fleet:
        fleet.rollback(say, parallel=parallel, drain=drain)
