"""What measuring connections costs: a connection and a packet, against programs that do not measure.

Three nodes differ in the agent's options alone. The kernel's statistics have the programs' own time, and what it
takes to measure that. TCP calls a program of its type some times for every connection: what this costs in all is
measured by connections that are made as fast as they can be, with the program attached and detached in turns.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ebpfproxy.datapath.abi.hooks import MEASURE_HOOKS
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.programs.attach import LINKS
from tests.lab import Lab
from tools.bench import packets, ratio, subjects
from tools.bench.hooks import BATCHES, OPERATIONS, Sample
from tools.bench.operations import BATCH, Task
from tools.bench.results import Result, at_least, at_most
from tools.bench.runtime import run_statistics
from tools.bench.sockets import build, in_turns, rate
from tools.bench.subjects import SERVICE, Subject, To

SERVICES = 10
_SOCKETS = ("connect4", "sock_ops", "sock_release")
_PACKETS = ("from_device", "to_device")


class Row(NamedTuple):
    """``goals``: nanoseconds that measuring connections, and traffic, may take more."""

    what: str
    to: To
    goals: tuple[float, float]


ROWS = (
    Row("TCP connect to a Service, until close", To.SERVICE, (500, 500)),
    Row("TCP connect to no Service, until close", To.DIRECT, (300, 300)),
    Row("TCP packet of a NodePort flow, ingress + egress", To.NODE_PORT, (4, 100)),
)
_WITHOUT_REPAIR = ("--drift-check-seconds", "0")
#: Connections with the program, against those without it.
RATIO = 0.98


class Bench:
    def __init__(self, lab: Lab, load: Path) -> None:
        self.plain = subjects.agent(lab, "plain", load, SERVICES)
        self.measuring, self.counting = (
            subjects.agent(lab, what, load, SERVICES, arguments=(f"--measure-{what}", *_WITHOUT_REPAIR))
            for what in ("connections", "traffic")
        )
        self.all = (self.plain, self.measuring, self.counting)
        self._load = load
        #: How often each program ran for one operation.
        self.runs: dict[tuple[Row, Subject], str] = {}
        self._clients = {each: each.clients()[0] for each in self.all}

    def programs(self, rounds: int) -> Iterator[Result]:
        """Nanoseconds of a connection, or of a packet, that all programs take together."""
        ways = [(row, subject) for row in ROWS for subject in self.all]
        in_turns(ways, 1, self._measure)
        found = dict(zip(ways, in_turns(ways, rounds, self._measure), strict=True))
        for row in ROWS:
            plain = found[row, self.plain]
            for subject, goal in zip((self.measuring, self.counting), row.goals, strict=True):
                measuring = found[row, subject]
                nets = [a - b for a, b in zip(measuring, plain, strict=True)]
                value, low, high = ratio.middle(nets)
                detail = (
                    f"95 % [{low:.0f} {high:.0f}]; "
                    f"{statistics.median(plain):.0f} → {statistics.median(measuring):.0f}; "
                    f"{self.runs[row, subject]}"
                )
                yield at_most(f"{subject.node.name}: {row.what}, net", value, "ns", goal, detail)

    def _measure(self, way: tuple[Row, Subject]) -> float:
        row, subject = way
        to = row.to
        if to is To.NODE_PORT:
            passing = packets.connection(subject, to, 4)
            done = subject.node.call(packets.measure, subject.programs, passing, BATCHES)
            names: tuple[str, ...] = _PACKETS
            times = 2 * BATCH
        else:
            done = self._clients[subject].perform(Task("connect_and_close", subject.peers(to, 4, OPERATIONS)))
            names, times = _SOCKETS, BATCH
        runs = (f"{name} {done[-1][name].times / times:g}" for name in names if name in done[-1])
        self.runs[way] = f"runs: {', '.join(runs)}"
        good = [batch for batch in done if batch[names[0]].times == times]
        assert len(good) > BATCHES / 2, done
        batches = [
            {name: batch[name].nanoseconds / times for name in names if name in batch} for batch in good
        ]
        return Sample(batches).of(names)

    def rates(self, seconds: float, rounds: int) -> Iterator[Result]:
        """Connections with the program of sockets attached, and detached, on one node in turns."""
        peers = {"a Service": SERVICE, "a pod": self.measuring.direct.address}
        ways = [(what, attached) for what in peers for attached in (False, True)]

        def measure(way: tuple[str, bool]) -> float:
            what, attached = way
            self._attach(attached=attached)
            return rate(self.measuring.client, self._load, "connect", seconds, peers[what])

        found = dict(zip(ways, in_turns(ways, rounds, measure), strict=True))
        self._attach(attached=True)
        for what in peers:
            without, measuring = found[what, False], found[what, True]
            cost = ratio.of_medians(measuring, without)
            rates = f"{statistics.median(without):.6g} → {statistics.median(measuring):.6g}/s"
            detail = f"95 % [{cost.low:.3f} {cost.high:.3f}]; {rates}"
            yield at_least(f"connect + close to {what}", cost.value, RATIO, detail)

    def _attach(self, *, attached: bool) -> None:
        """The agent does not repair it: it does not look."""
        (hook,) = MEASURE_HOOKS
        link = self.measuring.node.bpf_root / "ebpfproxy" / LINKS / hook.name
        if attached == link.exists():
            return
        if not attached:
            link.unlink()
            return
        cgroup = os.open(self.measuring.node.cgroup, os.O_RDONLY | os.O_DIRECTORY)
        with bpf.opened(self.measuring.programs / hook.name) as program:
            made = bpf.link_create(program, cgroup, hook.attach_type)
        bpf.pin(made, link)
        os.close(made)
        os.close(cgroup)


def run(seconds: float, rounds: int) -> list[Result]:
    with tempfile.TemporaryDirectory() as folder, Lab(executes_agents=True) as lab:
        bench = Bench(lab, build(Path(folder)))
        with run_statistics():
            results = list(bench.programs(rounds))
        return [*results, *bench.rates(seconds, rounds)]
