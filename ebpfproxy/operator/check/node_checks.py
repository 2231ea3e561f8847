"""The node under the datapath: kernel, sysctls, clock, MTU. Functions that decide take values."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from ebpfproxy.agent.state import AgentState
from ebpfproxy.config.datapath import Feature
from ebpfproxy.datapath.drift.findings import Finding
from ebpfproxy.datapath.kernel.probe import UnprobedKernelError, UnsupportedKernelError, probe
from ebpfproxy.node.facts import Link
from ebpfproxy.node.roles import Role

_STRICT = "1"
#: adjtimex(2): TIME_ERROR, the clock is not synchronized.
_TIME_ERROR = 5
#: Seconds by which the agent's last record may be newer than now.
_AHEAD = 5.0
_WITHOUT = {
    Feature.SET_RETVAL: "refused connections fail with EPERM, not ECONNREFUSED",
    Feature.TCX: "devices have clsact filters, which a CNI can delete with its own",
    Feature.MPTCP: "getpeername() of MPTCP sockets gives the backend",
    Feature.SOCKET_FIELDS: "connect() and close() take about 100 ns longer",
}


def _finding(what: str, consequence: str, mend: str, *, warning: bool = False) -> Finding:
    return Finding(
        where="node", kind="setting", what=what, consequence=consequence, mend=mend, warning=warning
    )


def kernel() -> Iterator[Finding]:
    """Features that are missing; those with a fallback are warnings. Raises UnprobedKernelError."""
    try:
        found = probe()
    except UnprobedKernelError:
        raise
    except UnsupportedKernelError as error:
        yield _finding(str(error), "the agent does not start", error.mend)
        return
    has = {
        Feature.SET_RETVAL: found.set_retval,
        Feature.TCX: found.tcx,
        Feature.MPTCP: found.mptcp,
        Feature.SOCKET_FIELDS: found.socket_fields is not None,
    }
    for feature, there in has.items():
        if not there:
            what = f"Linux {platform.release()} lacks {feature}"
            yield _finding(what, _WITHOUT[feature], "boot a newer kernel", warning=True)


def sysctls(
    read: Callable[[str], str | None], families: Iterable[int], uplinks: Iterable[str]
) -> Iterator[Finding]:
    """``read`` returns a value below /proc/sys. ``families``: lengths of backends' addresses, 4 and 16."""
    forwarding = {4: "net/ipv4/ip_forward", 16: "net/ipv6/conf/all/forwarding"}
    for length in sorted(families):
        if read(forwarding[length]) == "0":
            name = forwarding[length].replace("/", ".")
            consequence = "packets of pods and of clients outside are not forwarded to backends"
            yield _finding(f"{name} is 0", consequence, f"sysctl -w {name}=1")
    if read("net/core/bpf_jit_enable") == "0":
        consequence = "programs are interpreted, which takes several times as long"
        mend = "sysctl -w net.core.bpf_jit_enable=1"
        yield _finding("net.core.bpf_jit_enable is 0", consequence, mend, warning=True)
    names = list(uplinks)
    for name in names if len(names) > 1 else ():
        values = [read(f"net/ipv4/conf/{each}/rp_filter") for each in ("all", name)]
        # The kernel takes the higher of both; 2 is loose.
        if max(each or "0" for each in values) == _STRICT:
            consequence = "packets of clients whose route leads by another uplink are dropped"
            mend = f"sysctl -w net.ipv4.conf.{name}.rp_filter=2"
            yield _finding(f"net.ipv4.conf.{name}.rp_filter is strict", consequence, mend, warning=True)


def read_sysctl(name: str) -> str | None:
    """The value of a sysctl by its path below /proc/sys; None if there is none."""
    try:
        return Path("/proc/sys", name).read_text().strip()
    except OSError:
        return None


def clock(is_synchronized: bool, now: float, written: float | None) -> Iterator[Finding]:
    """``now`` and ``written``, the time of the agent's last record, are Unix seconds."""
    if not is_synchronized:
        consequence = "times of Events and latencies since a change in the API are wrong"
        yield _finding(
            "the clock is not synchronized", consequence, "timedatectl timesync-status", warning=True
        )
    if written is not None and written > now + _AHEAD:
        consequence = "certificates and tokens may be refused, and latencies are wrong"
        what = f"the clock has been set back by {written - now:.0f} s"
        yield _finding(what, consequence, "timedatectl timesync-status")


def clock_is_synchronized() -> bool:
    """What the kernel says, to which NTP and PTP daemons tell it (adjtimex(2))."""
    timex = ctypes.create_string_buffer(512)  # struct timex with modes = 0: nothing is set
    return bool(ctypes.CDLL(None, use_errno=True).adjtimex(timex) != _TIME_ERROR)


def mtus(links: Iterable[Link], agent: AgentState) -> Iterator[Finding]:
    """Pods that send larger packets than the uplink takes, where no tunnel explains it."""
    roles: Mapping[int, str] = {each.ifindex: each.role for each in agent.device_roles}
    if str(Role.TUNNEL) in roles.values():
        return
    by_role: dict[str, list[Link]] = {}
    for link in links:
        by_role.setdefault(roles.get(link.ifindex, ""), []).append(link)
    uplinks = by_role.get(str(Role.UPLINK), [])
    if not uplinks:
        return
    least = min(uplinks, key=lambda link: link.mtu)
    larger = [link for link in by_role.get(str(Role.LOCAL), []) if link.mtu > least.mtu]
    if larger:
        first = larger[0]
        yield _finding(
            f"the MTU of {first.name} is {first.mtu}, that of {least.name} only {least.mtu}"
            + (f" (and {len(larger) - 1} more)" if len(larger) > 1 else ""),
            "large packets depend on ICMP errors, which some networks drop: connections hang",
            f"set the MTU of the CNI to {least.mtu} or less",
            warning=True,
        )
