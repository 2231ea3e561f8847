"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

from ebpfproxy.cli import completion
from ebpfproxy.cli.settings import Decorator, setting
from ebpfproxy.node.pod_names import CNI_RESULTS

bpf_root = setting("bpfRoot", envvar="EBPFPROXY_BPF_ROOT", show_envvar=True, show_default=True)

cgroup_root = setting("cgroupRoot", envvar="EBPFPROXY_CGROUP_ROOT", show_envvar=True)

output_format: Decorator = click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json", "yaml"]),
    default="table",
    show_default=True,
    help="Output format.",
)

watch: Decorator = click.option(
    "-w", "--watch", is_flag=True, help="Print again at every change, until interrupted."
)

cni_results: Decorator = click.option(
    "--cni-results",
    type=click.Path(path_type=Path),
    default=CNI_RESULTS,
    show_default=True,
    envvar="EBPFPROXY_CNI_RESULTS",
    metavar="DIR",
    help="Where the container runtime keeps the results of CNI plugins, which name this node's pods.",
)

namespace: Decorator = click.option(
    "-n",
    "--namespace",
    metavar="NAME",
    shell_complete=completion.namespaces,
    help="Only Services in this namespace.",
)

service: Decorator = click.option(
    "--service",
    metavar="[NAMESPACE/]NAME",
    shell_complete=completion.services,
    help="Only this Service. The default namespace is that of --namespace, else any.",
)


def one_of_filters_and_all(*, filtered: bool, everything: bool) -> None:
    """Raises UsageError where a flush has neither, or both: nobody can mean both."""
    if filtered and everything:
        raise click.UsageError("--all excludes filters")
    if not filtered and not everything:
        raise click.UsageError("give a filter or --all")


def one_service(namespace: str | None, service: str | None) -> tuple[str | None, str | None]:
    """Namespace and name that :func:`namespace` and :func:`service` ask for; None for any.

    Raises UsageError for what nothing can have as its name: nothing would ever be shown.
    """
    if namespace == "":
        raise click.UsageError("--namespace: the name is empty")
    if service is None or not has_namespace("--service", service):
        return namespace, service
    namespace, _, name = service.partition("/")
    return namespace, name


def has_namespace(option: str, text: str) -> bool:
    """If a name of this option has its namespace. Raises UsageError as :func:`one_service`."""
    names = text.split("/")
    if len(names) > 2 or not all(names):
        raise click.UsageError(f"{option}: {text!r} is not NAME or NAMESPACE/NAME")
    return len(names) == 2
