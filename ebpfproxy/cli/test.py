"""``ebpfproxy test``."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from ebpfproxy.agent import state
from ebpfproxy.cli import cluster_access, options
from ebpfproxy.cli.cluster_access import access, remark
from ebpfproxy.cli.errors import UnansweredError, one_line
from ebpfproxy.cli.output import console, echo, emit, plain, table
from ebpfproxy.datapath.dump import open_maps
from ebpfproxy.datapath.kernel.roots import pin_folder
from ebpfproxy.datapath.lookup import Lookup
from ebpfproxy.kube.errors import ConfigError, ManifestError
from ebpfproxy.node.identity import node_name
from ebpfproxy.operator.api import Api, ApiError
from ebpfproxy.operator.test import without_cluster
from ebpfproxy.operator.test.in_cluster import run
from ebpfproxy.operator.test.questions import DIRECT
from ebpfproxy.operator.test.results import SKIPPED, Report, junit
from ebpfproxy.operator.test.site import CannotTestError, Wanted

#: So many failures of one check are printed.
_SHOWN = 3


@click.command("test")
@access
@click.option(
    "-n",
    "--namespace",
    default="ebpfproxy-test",
    show_default=True,
    help="Namespace to create for the test, and to remove again.",
)
@cluster_access.daemon_set
@click.option("--image", metavar="REF", help="Image of the test's pods.  [default: the agents' image]")
@cluster_access.nodes
@click.option(
    "--restart", is_flag=True, help="Also restart the agents, one after the other, while clients connect."
)
@click.option(
    "--keep",
    is_flag=True,
    help="Leave the namespace with its pods and Services, for the explain commands of failures.",
)
@cluster_access.step_timeout
@click.option(
    "--manifests",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="No cluster: ask the Services of these manifests from this node, and change nothing.",
)
@options.bpf_root
@click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json", "junit"]),
    default="table",
    show_default=True,
    help="Output format; junit is XML for CI systems.",
)
def command(
    *,
    kubeconfig: str,
    context: str | None,
    master: str | None,
    namespace: str,
    daemonset: str,
    image: str | None,
    nodes: tuple[str, ...],
    restart: bool,
    keep: bool,
    timeout: float,
    manifests: Path | None,
    bpf_root: Path,
    output: str,
) -> None:
    """Test that Services work: from pods and nodes, on all nodes of a cluster.

    It creates a namespace with Services, and with servers and clients on each node with an agent. Clients
    ask by ClusterIP and NodePort, in all protocols and families. Everything is removed again, also after
    Ctrl-C or a failure. For each failure it says what was asked, from where, what came instead, and which
    explain command tells more.

    With --manifests it asks the Services that an agent without a cluster serves, from this node, and sends
    nothing to their servers.

    Exit code 0: all works; 1: something does not; 2: it could not be tested.
    """
    agent_namespace, slash, name = daemonset.partition("/")
    if not slash:
        raise click.UsageError(f"--daemonset {daemonset} is not NAMESPACE/NAME")
    if manifests is not None and (image or nodes or restart or keep):
        raise click.UsageError(
            "--manifests changes nothing and makes no pods: it goes with no option for them"
        )
    with _untested():
        if manifests is not None:
            found = _of_manifests(manifests, bpf_root)
        else:
            wanted = Wanted(
                namespace=namespace,
                agent_namespace=agent_namespace,
                daemon_set=name,
                image=image,
                nodes=nodes,
                restart=restart,
                keep=keep,
                seconds=timeout,
            )
            found = run(Api.from_kubeconfigs(kubeconfig, context, master, seconds=timeout), wanted, remark)
    if output == "junit":
        echo(junit(found))
    else:
        emit(found, output, lambda report: _print(report, hint=manifests is None and not keep))
    if not found.good:
        raise click.exceptions.Exit(1)


@contextmanager
def _untested() -> Iterator[None]:
    """Errors are one line, and signals end what runs in order."""
    before = {each: signal.signal(each, _interrupt) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        with one_line():
            yield
    except click.UsageError:
        raise
    except click.ClickException as error:
        raise UnansweredError(error.message) from error
    except (ApiError, CannotTestError, ConfigError, ManifestError, OSError) as error:
        raise UnansweredError(str(error)) from error
    except KeyboardInterrupt:
        raise UnansweredError("interrupted") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _of_manifests(folder: Path, bpf_root: Path) -> Report:
    agent = state.load_latest(pin_folder(bpf_root))
    name = agent.node if agent is not None else node_name(None)
    return without_cluster.check(folder, name, Lookup(open_maps(bpf_root)).node_addresses())


def _print(found: Report, *, hint: bool) -> None:
    out = console()
    rows = table("check", "protocol", "family", "result", "asked")
    for row in found.rows:
        asked = f"{row.asked}, {len(row.failures)} failed" if row.failures else str(row.asked or "")
        why = f"{'' if row.result == SKIPPED else ', partly skipped'}: {row.why}" if row.why else ""
        rows.add_row(row.check, row.protocol, row.family, plain(f"{row.result}{why}"), asked)
    out.print(rows)
    failed = [row for row in found.rows if row.failures]
    if failed:
        out.print("FAILED:")
    for row in failed:
        for each in row.failures[:_SHOWN]:
            out.print(plain(f"  {each.sentence}"))
            out.print(plain(f"    {each.explain}"))
        if (more := len(row.failures) - _SHOWN) > 0:
            out.print(f"  and {more} more of {row.check} {row.protocol} {row.family}: see -o json")
    if any(row.check == DIRECT for row in failed):
        out.print("What fails directly is not a matter of Services: see the pod network and its policies.")
    if failed and hint:
        out.print("The test's pods and Services are removed: with --keep they stay for these commands.")
    if found.good:
        out.print(f"Services work: {found.where}")
