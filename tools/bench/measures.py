"""What measuring connections costs: a connection and a packet, against programs that do not measure.

Two nodes differ in the agent's options alone. The kernel's statistics have the programs' own time. TCP calls a
program of its type some times for every connection, and each call has its price: so connections are also made
as fast as they can be, on both nodes in turns.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

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
    """``goal``: nanoseconds that measuring may take more."""

    what: str
    to: To
    goal: float


ROWS = (
    Row("TCP connect to a Service, until close", To.SERVICE, 500),
    Row("TCP connect to no Service, until close", To.DIRECT, 300),
    Row("TCP packet of a NodePort flow, ingress + egress", To.NODE_PORT, 4),
)
#: A connection through the Service, against one of the node that does not measure.
RATIO = 0.98


class Bench:
    def __init__(self, lab: Lab, load: Path) -> None:
        self.plain = subjects.agent(lab, "plain", load, SERVICES)
        self.measuring = subjects.agent(
            lab, "measuring", load, SERVICES, arguments=("--measure-connections",)
        )
        self.both = (self.plain, self.measuring)
        self._load = load
        self._clients = {each: each.clients()[0] for each in self.both}

    def programs(self, rounds: int) -> Iterator[Result]:
        """Nanoseconds of a connection, or of a packet, that all programs take together."""
        ways = [(row, subject) for row in ROWS for subject in self.both]
        in_turns(ways, 1, self._measure)
        found = dict(zip(ways, in_turns(ways, rounds, self._measure), strict=True))
        for row in ROWS:
            plain, measuring = (found[row, subject] for subject in self.both)
            nets = [a - b for a, b in zip(measuring, plain, strict=True)]
            value, low, high = ratio.middle(nets)
            detail = (
                f"95 % [{low:.0f} {high:.0f}]; "
                f"{statistics.median(plain):.0f} → {statistics.median(measuring):.0f}"
            )
            yield at_most(f"{row.what}, net", value, "ns", row.goal, detail)

    def _measure(self, way: tuple[Row, Subject]) -> float:
        (_, to, _), subject = way
        if to is To.NODE_PORT:
            passing = packets.connection(subject, to, 4)
            done = subject.node.call(packets.measure, subject.programs, passing, BATCHES)
            names: tuple[str, ...] = _PACKETS
            times = 2 * BATCH
        else:
            done = self._clients[subject].perform(Task("connect_and_close", subject.peers(to, 4, OPERATIONS)))
            names, times = _SOCKETS, BATCH
        good = [batch for batch in done if batch[names[0]].times == times]
        assert len(good) > BATCHES / 2, done
        batches = [
            {name: batch[name].nanoseconds / times for name in names if name in batch} for batch in good
        ]
        return Sample(batches).of(names)

    def rates(self, seconds: float, rounds: int) -> Result:
        def measure(subject: Subject) -> float:
            return rate(subject.client, self._load, "connect", seconds, SERVICE)

        plain, measuring = in_turns(self.both, rounds, measure)
        found = ratio.of_medians(measuring, plain)
        rates = f"{statistics.median(plain):.6g} → {statistics.median(measuring):.6g}/s"
        detail = f"95 % [{found.low:.3f} {found.high:.3f}]; {rates}"
        return at_least("connect + close through a Service", found.value, RATIO, detail)


def run(seconds: float, rounds: int) -> list[Result]:
    with tempfile.TemporaryDirectory() as folder, Lab() as lab:
        bench = Bench(lab, build(Path(folder)))
        with run_statistics():
            results = list(bench.programs(rounds))
        return [*results, bench.rates(seconds, rounds)]
