"""``ebpfproxy check``."""

from __future__ import annotations

import time
from pathlib import Path

import click

from ebpfproxy.agent.local_pages import CHECK, REPAIR
from ebpfproxy.cli import options
from ebpfproxy.cli.errors import answers, one_line
from ebpfproxy.cli.output import age, console, emit, plain, table
from ebpfproxy.datapath.drift.findings import Finding
from ebpfproxy.datapath.dump import open_maps
from ebpfproxy.inspection.agent import ask_agent
from ebpfproxy.operator.check.all_checks import Check, check


@click.command("check")
@options.bpf_root
@options.output_format
@click.option("--repair", is_flag=True, help="Let the agent repair what differs, and name it.")
@click.option(
    "--timeout",
    type=click.IntRange(1, 600),
    default=15,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for the agent.",
)
def command(bpf_root: Path, output: str, repair: bool, timeout: int) -> None:
    """Compare this node with what it should be, and name every difference.

    The agent compares maps and attached programs with what it has made of the API's objects; the command
    itself looks for other proxies, programs that run before ours, sysctls, kernel features, the clock and
    MTUs. Without an agent it says which maps contradict themselves.

    Exit code 0: nothing is wrong; 1: something is; 2: the command line is wrong, or there is nothing to read.
    Warnings do not count, nor does what has been repaired.
    """
    with answers(), one_line():
        maps = open_maps(bpf_root)
        found = check(bpf_root, maps, *ask_agent(bpf_root, REPAIR if repair else CHECK, timeout))
    emit(found, output, _print)
    if not found.good:
        raise click.exceptions.Exit(1)


def _print(found: Check) -> None:
    out = console()
    wrong = [each for each in found.findings if not each.warning]
    warnings = [each for each in found.findings if each.warning]
    for title, findings in (("WRONG", wrong), ("REPAIRED", found.repaired), ("WARNINGS", warnings)):
        if findings:
            out.print(f"{title}:")
            for each in findings:
                out.print(_line(each))
                if title != "REPAIRED":
                    out.print(f"    {each.consequence}")
                    out.print(plain(f"    mend: {each.mend}"))
    if found.more:
        out.print(f"and {found.more} more entries")
    if found.earlier and not found.repaired:
        now, rows = time.time(), table("repaired", "map", "kind", "entry", "service")
        for earlier in found.earlier:
            each = earlier.finding
            cells = f"{age(now - earlier.when)} ago", each.where, each.kind, each.what, each.service
            rows.add_row(*map(plain, cells))
        out.print(rows)
    for text in found.unchecked:
        out.print(plain(f"not checked: {text}"))
    if not wrong:
        out.print("everything is as it should be" + " again" * bool(found.repaired))


def _line(each: Finding) -> str:
    return plain(f"  {each.where}: {each.kind}: {each.what}" + f" ({each.service})" * bool(each.service))
