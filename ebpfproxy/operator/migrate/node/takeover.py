"""Checks whether this node's agent can take over: by its pinned maps and the state that it stores there."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from ebpfproxy.agent import state
from ebpfproxy.datapath.dump import Dump, FrontendRow, NothingPinnedError, open_maps
from ebpfproxy.datapath.flows.conntrack_table import FlowRow, Timeouts, flows_of
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.kernel.roots import is_locked, pin_folder
from ebpfproxy.datapath.programs.attach import attachments
from ebpfproxy.datapath.programs.devices import device_attachments

_OPEN = frozenset({"SYN_SENT", "SYN_RECV", "ESTABLISHED", "CLOSE_WAIT"})
#: A reply may arrive for so many seconds: the first one of a flow, which may come from a slow resolver;
#: further ones after the last packet, whose time is known to the second; that of a flow that began and was
#: replied to within this second. Then entries go, since kube-proxy's MASQUERADE may choose their ports.
_FIRST_REPLY_SECONDS = 5.0
_NEXT_REPLY_SECONDS = 1.5
_LAST_REPLY_SECONDS = 0.1


class AgentCheck(msgspec.Struct, frozen=True, kw_only=True):
    """``problems`` has a line for each reason why it cannot."""

    node: str = ""
    rows: tuple[FrontendRow, ...] = ()
    problems: tuple[str, ...] = ()
    #: The agent runs, and has not read everything yet.
    starting: bool = False


class Draining:
    """Deletes flows of packet programs except open TCP connections, once no new ones are created.

    A new flow of kube-proxy may get a port that an old flow here still has, and datagrams are served as well
    by kube-proxy. The original direction's entry goes first: replies on their way still find theirs.
    """

    def __init__(self, maps: MapSet) -> None:
        agent = state.load(maps)
        self._table = maps["conntrack"]
        self._timeouts = (agent.timeouts if agent is not None else None) or Timeouts()
        #: Keys of the other entries of a flow, and when they are deleted (monotonic seconds).
        self._replies: list[tuple[float, tuple[bytes, ...]]] = []

    def step(self, entries: list[tuple[bytes, bytes]] | None = None) -> int:
        """Returns the number of open TCP connections. ``entries``: those of the map, if just read."""
        living = 0
        now = time.monotonic()
        ended = []
        if entries is None:
            entries = list(self._table.items())
        rows = flows_of(entries, self._timeouts, time.monotonic_ns(), {})
        for row, (original, *others) in rows:
            if row.state in _OPEN:
                living += 1
                continue
            ended.append(original)
            self._replies.append((now + _reply_seconds(row), tuple(others)))
        due = [key for until, keys in self._replies if until <= now for key in keys]
        self._replies = [each for each in self._replies if each[0] > now]
        self._table.delete_many(ended + due)
        return living

    @property
    def waits_for_replies(self) -> bool:
        return bool(self._replies)


def _reply_seconds(flow: FlowRow) -> float:
    if flow.state == "UNREPLIED":
        return max(0.0, _FIRST_REPLY_SECONDS - flow.idle)
    if flow.state != "REPLIED":
        return 0.0
    if flow.idle == flow.age < 1:
        return _LAST_REPLY_SECONDS
    return max(0.0, _NEXT_REPLY_SECONDS - flow.idle)


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
    knows_nothing = agent is None or not agent.synced or (runs and state.has_ended(agent))
    if agent is None or knows_nothing:
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
        starting=runs and knows_nothing,
    )
