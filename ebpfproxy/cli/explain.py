"""``ebpfproxy explain``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ebpfproxy.cli import completion, options
from ebpfproxy.cli.errors import UnansweredError, answers, one_line
from ebpfproxy.cli.explain_text import print_report
from ebpfproxy.cli.output import emit
from ebpfproxy.datapath.dump import open_maps
from ebpfproxy.inspection.failures import QuestionError, WrongNamespaceError
from ebpfproxy.inspection.inquiry import explained
from ebpfproxy.services.model import Protocol


@click.command("explain")
@click.argument("source", metavar="FROM", shell_complete=completion.clients)
@click.argument("target", metavar="TO[:PORT]", shell_complete=completion.services)
@click.option(
    "--protocol",
    type=click.Choice([p.name for p in Protocol], case_sensitive=False),
    help="The protocol of an address, TCP if none is given, or that of a Service's port.",
)
@options.cni_results
@options.bpf_root
@options.output_format
def command(
    *, source: str, target: str, protocol: str | None, cni_results: Path, bpf_root: Path, output: str
) -> None:
    """Say what happens to a connection, and why, without sending anything.

    FROM is a pod of this node (NAME or NAMESPACE/NAME), "host", or an address. TO is a Service (NAME or
    NAMESPACE/NAME, with its port by number or name if it has several) or ADDRESS:PORT, an IPv6 address in
    brackets. A Service without a namespace is in that of the pod, as in its DNS, or in "default".

    \b
    ebpfproxy explain shop/client web:http
    ebpfproxy explain host 10.96.0.10:53 --protocol UDP
    ebpfproxy explain 203.0.113.7 shop/web

    The maps say what happens, as programs read them; the running agent says why. Exit code 0: it works as far
    as Services are concerned; 1: it does not; 2: the command line is wrong, or there is nothing to read.
    """
    wanted = None if protocol is None else Protocol[protocol.upper()]
    try:
        with answers(), one_line():
            maps = open_maps(bpf_root)
            report = explained(maps, source, target, wanted, bpf_root=bpf_root, cni_results=cni_results)
    except QuestionError as error:
        raise click.UsageError(str(error)) from error
    except WrongNamespaceError as error:
        raise UnansweredError(str(error)) from error
    emit(report, output, print_report)
    sys.exit(0 if report.works else 1)
