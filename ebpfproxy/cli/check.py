"""``ebpfproxy check``."""

from __future__ import annotations

import time
from pathlib import Path

import click
import msgspec

from ebpfproxy.agent.local_pages import CHECK, REPAIR
from ebpfproxy.agent.local_socket import NoAgentError, ask
from ebpfproxy.cli import options
from ebpfproxy.cli.errors import one_line
from ebpfproxy.cli.output import age, console, emit, plain, table
from ebpfproxy.datapath.drift.findings import Finding, Report
from ebpfproxy.datapath.dump import open_maps
from ebpfproxy.datapath.kernel.roots import is_locked
from ebpfproxy.operator.check.all_checks import Check, check

_AGAIN_SECONDS = 0.1
_REPORT = msgspec.json.Decoder(Report)


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
    MTUs. Without an agent it says which maps contradict themselves. Exit code 1 if anything is wrong;
    warnings do not count, nor does what has been repaired.
    """
    with one_line():
        maps = open_maps(bpf_root)
        found = check(bpf_root, maps, *ask_agent(bpf_root, REPAIR if repair else CHECK, timeout))
    emit(found, output, _print)
    if not found.good:
        raise click.exceptions.Exit(1)


def ask_agent(bpf_root: Path, page: str, seconds: float) -> tuple[Report | None, str]:
    """The agent's report, or why there is none; an agent that is starting is waited for."""
    deadline, silence = time.monotonic() + seconds, ""
    while is_locked(bpf_root) and (left := deadline - time.monotonic()) > 0:
        try:
            reply = ask(bpf_root, page, left)
        except NoAgentError as error:
            silence = str(error)
            time.sleep(_AGAIN_SECONDS)
            continue
        if reply.status == 200:
            return _REPORT.decode(reply.body), ""
        return None, reply.body.decode(errors="replace")
    return None, silence if is_locked(bpf_root) else ""


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
