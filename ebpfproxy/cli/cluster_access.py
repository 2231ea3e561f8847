"""What commands share that reach a cluster by a kubeconfig: options, remarks, and errors in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from ebpfproxy.cli.option_types import Seconds
from ebpfproxy.cli.output import echo
from ebpfproxy.cli.settings import Decorator
from ebpfproxy.kube.errors import ConfigError
from ebpfproxy.operator.agents import AgentsError
from ebpfproxy.operator.api import ApiError
from ebpfproxy.operator.names import AGENT, SYSTEM

context: Decorator = click.option(
    "--context", metavar="NAME", help="Context of the kubeconfig.  [default: the current one]"
)
master: Decorator = click.option(
    "--master", metavar="URL", help="URL of the API server; overrides the kubeconfig's."
)
nodes: Decorator = click.option(
    "--node", "nodes", metavar="NAME", multiple=True, help="Only this node. May be repeated."
)
daemon_set: Decorator = click.option(
    "--daemonset",
    metavar="NAMESPACE/NAME",
    default=f"{SYSTEM}/{AGENT}",
    show_default=True,
    help="DaemonSet of the agents.",
)
step_timeout: Decorator = click.option(
    "--timeout",
    type=Seconds(),
    default="2m",
    show_default=True,
    help="Limit for each step, and for an API server that does not answer.",
)


def access(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options for the cluster and the credentials."""
    kubeconfig = click.option(
        "--kubeconfig",
        metavar="FILE",
        envvar="KUBECONFIG",
        show_envvar=True,
        default="~/.kube/config",
        show_default=True,
        help="Kubeconfig of an administrator.",
    )
    return kubeconfig(context(master(function)))


def access_and_namespace(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options for the cluster, the credentials and the namespace."""
    namespace = click.option(
        "-n",
        "--namespace",
        default=SYSTEM,
        show_default=True,
        help="Namespace of the objects. It has to exist.",
    )
    return access(namespace(function))


@contextmanager
def cluster_errors(*more: type[Exception]) -> Iterator[None]:
    """Errors of the cluster, and those of ``more``, become one line each, and exit code 1."""
    expected: tuple[type[Exception], ...] = (AgentsError, ApiError, ConfigError, FileNotFoundError, *more)
    try:
        yield
    except expected as error:
        raise click.ClickException(str(error)) from error


def remark(text: str) -> None:
    echo(text, err=True)
