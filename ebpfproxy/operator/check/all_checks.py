"""All checks of this node, with or without an agent."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ebpfproxy.agent import state
from ebpfproxy.datapath.drift.findings import Finding, Repaired, Report
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.kernel.probe import UnprobedKernelError
from ebpfproxy.datapath.kernel.roots import pin_folder
from ebpfproxy.netlink.namespaces import netns_cookie
from ebpfproxy.netlink.rtnetlink import Rtnetlink
from ebpfproxy.node.kernel_tables import read_facts
from ebpfproxy.node.roles import Role
from ebpfproxy.operator.check import attachment_checks, map_checks, node_checks, proxies
from ebpfproxy.operator.migrate.node.tools import ToolError


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON of ``ebpfproxy check``: these names stay."""

    #: ``answered``, ``not running`` or ``no answer``.
    agent: str
    #: False while something is wrong that is no mere warning.
    good: bool
    findings: tuple[Finding, ...]
    #: What the agent has repaired now, because it was asked to.
    repaired: tuple[Finding, ...] = ()
    #: The agent has repaired these lately, latest first.
    earlier: tuple[Repaired, ...] = ()
    #: Findings that the agent has counted, but has no room to tell of.
    more: int = 0
    #: What could not be checked, and why.
    unchecked: tuple[str, ...] = ()


def check(bpf_root: Path, maps: MapSet, report: Report | None, silence: str) -> Check:
    """Checks this node. Raises BpfError.

    ``report``: what the agent has found. Without one ``silence`` says why, and is empty where no agent runs.
    """
    pins = pin_folder(bpf_root)
    agent = state.load_latest(pins)
    is_here = agent is None or agent.netns in (0, netns_cookie())
    unchecked: list[str] = []
    findings: list[Finding] = []
    if report is not None:
        findings += report.findings
    else:
        findings.append(_no_agent(silence))
        findings += map_checks.contradictions(maps)
        findings += attachment_checks.lost(pins, maps.folder, agent, is_here=is_here)
        unchecked.append("whether maps hold what the API says: only the agent knows that")
    findings += attachment_checks.before_ours(pins, agent, is_here=is_here)
    try:
        findings += node_checks.kernel()
    except UnprobedKernelError as error:
        unchecked.append(f"the kernel's features: {error}")
    written = agent.written if agent else None
    findings += node_checks.clock(node_checks.clock_is_synchronized(), time.time(), written)
    if is_here:
        findings += _here(maps, agent)
        try:
            findings += proxies.find(bpf_root)
        except ToolError as error:
            unchecked.append(f"other proxies' rules: {error}")
    else:
        unchecked.append("sysctls, devices and rules: this is not the agent's network namespace")
    return Check(
        agent="answered" if report is not None else "no answer" if silence else "not running",
        good=all(each.warning for each in findings),
        findings=tuple(sorted(findings, key=lambda each: each.warning)),
        repaired=report.repaired if report is not None else (),
        earlier=report.earlier if report is not None else (),
        more=report.more if report is not None else 0,
        unchecked=tuple(unchecked),
    )


def _no_agent(silence: str) -> Finding:
    if silence:
        return Finding(
            where="agent",
            kind="missing",
            what=silence,
            consequence="it has not programmed everything yet, or it hangs",
            mend="ebpfproxy status",
        )
    return Finding(
        where="agent",
        kind="missing",
        what="not running",
        consequence="traffic goes on, but changes are not applied and nothing is repaired",
        mend="start it: its DaemonSet, or systemctl start ebpfproxy",
    )


def _here(maps: MapSet, agent: state.AgentState | None) -> Iterator[Finding]:
    """What belongs to the agent's network namespace."""
    records = maps.backends()
    known = (records.read(number) for number in records.ids())
    families = {len(found[0].address) for found in known if found is not None}
    roles = agent.device_roles if agent is not None else ()
    yield from node_checks.sysctls(
        node_checks.read_sysctl, families, [each.name for each in roles if each.role == str(Role.UPLINK)]
    )
    if agent is not None:
        with Rtnetlink() as netlink:
            yield from node_checks.mtus(read_facts(netlink).links, agent)
