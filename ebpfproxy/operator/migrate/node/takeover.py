"""Whether the agent of this node can take over: what its pinned maps and its own account of itself say."""

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

_OPEN = frozenset({"SYN_SENT", "ESTABLISHED", "CLOSE_WAIT"})
#: Seconds in which an answer may be under way: to a flow's first packet, which may ask a resolver; of a flow
#: with answers, after the last packet, which its entry has to the second; of a flow that began in this second
#: and had its answer. Others' ports are free at once, and these soon: kube-proxy's MASQUERADE takes any port,
#: and would meet them.
_FIRST_ANSWER_SECONDS = 5.0
_NEXT_ANSWER_SECONDS = 1.5
_LAST_ANSWER_SECONDS = 0.1


class AgentCheck(msgspec.Struct, frozen=True, kw_only=True):
    """``problems``: why it cannot, in words."""

    node: str = ""
    rows: tuple[FrontendRow, ...] = ()
    problems: tuple[str, ...] = ()
    #: It runs, and has not read everything yet.
    starting: bool = False


class Draining:
    """Forgets flows of packet programs but open TCP connections, for when they begin no more.

    A new flow of kube-proxy's may get a port that an old one here still has, and datagrams go on as well
    through kube-proxy. What asks is forgotten first: answers that are under way still find their entries.
    """

    def __init__(self, maps: MapSet) -> None:
        agent = state.load(maps)
        self._table = maps["conntrack"]
        self._timeouts = (agent.timeouts if agent is not None else None) or Timeouts()
        #: When they go (monotonic seconds), and keys of answers' and masquerades' entries.
        self._answers: list[tuple[float, tuple[bytes, ...]]] = []

    def step(self) -> int:
        """How many TCP connections are open."""
        living = 0
        now = time.monotonic()
        rows = flows_of(list(self._table.items()), self._timeouts, time.monotonic_ns(), {})
        for row, (question, *others) in rows:
            if row.state in _OPEN:
                living += 1
                continue
            self._table.delete(question)
            self._answers.append((now + _answer_seconds(row), tuple(others)))
        for until, keys in self._answers:
            if until <= now:
                for key in keys:
                    self._table.delete(key)
        self._answers = [each for each in self._answers if each[0] > now]
        return living

    @property
    def waits_for_answers(self) -> bool:
        return bool(self._answers)


def _answer_seconds(flow: FlowRow) -> float:
    if flow.state == "UNREPLIED":
        return max(0.0, _FIRST_ANSWER_SECONDS - flow.idle)
    if flow.state != "REPLIED":
        return 0.0
    if flow.idle == flow.age < 1:
        return _LAST_ANSWER_SECONDS
    return max(0.0, _NEXT_ANSWER_SECONDS - flow.idle)


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
