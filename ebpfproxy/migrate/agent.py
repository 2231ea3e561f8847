"""Whether the agent of this node can take over: what its pinned maps and its own account of itself say."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from ebpfproxy import state
from ebpfproxy.datapath.attach import attachments
from ebpfproxy.datapath.conntrack import Timeouts, flows_of
from ebpfproxy.datapath.devices import device_attachments
from ebpfproxy.datapath.dump import Dump, FrontendRow, NothingPinnedError, open_maps
from ebpfproxy.datapath.maps import MapSet
from ebpfproxy.datapath.roots import is_locked, pin_folder

_OPEN = frozenset({"SYN_SENT", "ESTABLISHED", "CLOSE_WAIT"})


class AgentCheck(msgspec.Struct, frozen=True, kw_only=True):
    """``problems``: why it cannot, in words."""

    node: str = ""
    rows: tuple[FrontendRow, ...] = ()
    problems: tuple[str, ...] = ()
    #: It runs, and has not read everything yet.
    starting: bool = False


def forget_ended(maps: MapSet) -> int:
    """Forgets flows of packet programs but open TCP connections; how many there are of these.

    For when they begin no more: a new flow of kube-proxy's may get a port that an old one here still has, and
    datagrams go on as well through kube-proxy.
    """
    agent, table = state.load(maps), maps["conntrack"]
    timeouts = (agent.timeouts if agent is not None else None) or Timeouts()
    living = 0
    for row, keys in flows_of(list(table.items()), timeouts, time.monotonic_ns(), {}):
        if row.state in _OPEN:
            living += 1
            continue
        for key in keys:
            table.delete(key)
    return living


def check(bpf_root: Path) -> AgentCheck:
    try:
        maps = open_maps(bpf_root)
    except NothingPinnedError as error:
        return AgentCheck(problems=(str(error),))
    pins = pin_folder(bpf_root)
    agent = state.load(maps)
    problems = []
    runs = is_locked(bpf_root)
    if not runs:
        problems.append("the agent does not run")
    if agent is None or not agent.synced:
        problems.append("the agent has not read all Services and EndpointSlices yet")
    elif not agent.healthy:
        problems.append("the agent is not healthy: see ebpfproxy status")
    if missing := [a.hook for a in attachments(pins) if not a.alive]:
        problems.append(f"programs at sockets are missing: {' '.join(missing)}")
    devices = {each.ifindex for each in device_attachments(pins)}
    if agent is not None and len(devices) < agent.devices:
        problems.append(f"programs are at {len(devices)} of {agent.devices} devices")
    return AgentCheck(
        node=agent.node if agent is not None else "",
        rows=tuple(Dump(maps).frontends()),
        problems=tuple(problems),
        starting=runs and (agent is None or not agent.synced),
    )
