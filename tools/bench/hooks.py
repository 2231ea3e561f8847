"""What our programs take at every hook, in nanoseconds of the kernel's run-time statistics.

A row is an operation, and the programs that run for it: the nanoseconds of all of them, for each time that it is
done. Operations take turns in every round, in a new order each time, on our node and on one with empty programs.
What an empty program costs is thus measured by the same operations in the same rounds; the net value is the
difference. Client and servers share one CPU (tools.bench.sockets).

The cgroup of a node has only the client, which does one thing while counters are read: so the close of a
client's socket and that of an accepted one are told apart. A batch in which a program ran more or less often than
the operation makes it run is left out.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.lab import Lab
from tools.bench import packets, peers, ratio, subjects
from tools.bench.operations import BATCH, Task
from tools.bench.results import Result, at_most
from tools.bench.runtime import Runs, run_statistics
from tools.bench.sockets import build, in_turns
from tools.bench.subjects import Subject, To

SERVICES = 10_000
#: Operations of a sample.
BATCHES = 10
OPERATIONS = BATCH * BATCHES
#: Packets go through programs (tools.bench.packets) instead of through the network.
PASS_THROUGH = "pass_through"
OPEN_AND_CLOSE = "open_and_close"
FORWARD = "forward"


class Work(NamedTuple):
    """An operation (of tools.bench.operations, or PASS_THROUGH, OPEN_AND_CLOSE or FORWARD).

    ``programs``: each runs ``times`` times for it, and no other does.
    """

    operation: str
    to: To
    family: int
    programs: tuple[str, ...]
    times: int = 1

    @property
    def from_outside(self) -> bool:
        return self.to is To.NODE_PORT


class Row(NamedTuple):
    """A line of the table: what a run of each of ``programs`` takes in all; ``net``: more than empty ones do."""

    what: str
    work: Work
    programs: tuple[str, ...]
    goal: float | None = None
    net: bool = False


class Way(NamedTuple):
    subject: Subject
    work: Work


class Sample(NamedTuple):
    """Nanoseconds of a run, by batch and program; where there is no program, there is nothing to wait for."""

    batches: list[dict[str, float]]

    def of(self, programs: Sequence[str]) -> float:
        """The median of the batches. Another process that takes the CPU inside of a program hits a few only."""
        return statistics.median(sum(batch.get(name, 0.0) for name in programs) for batch in self.batches)


def _sockets(family: int) -> Iterator[Row]:
    connect, release = f"connect{family}", "sock_release"
    both = (connect, release)
    datagram = (f"sendmsg{family}", f"recvmsg{family}", release)
    work = Work("connect_and_close", To.SERVICE, family, both)
    yield Row(f"TCP connect to a Service, until close, IPv{family}", work, both, 500)
    if family == 4:
        work = Work("connect_and_close", To.RANDOM_SERVICE, family, both)
        yield Row(f"the same, {SERVICES:,} Services at random, IPv{family}", work, both, 1500)
    work = Work("connect_and_close", To.DIRECT, family, both)
    yield Row(f"TCP connect to no Service, until close, IPv{family}", work, both, 200)
    yield Row(f"the same, connect alone, IPv{family}", work, (connect,), 150)
    work = Work("connect_and_close", To.SERVER, family, both)
    yield Row(f"TCP connect to a backend itself, until close, IPv{family}", work, both)
    work = Work("close_accepted", To.ITSELF, family, (release,))
    yield Row(f"close of an accepted socket, IPv{family}", work, (release,), 120)
    work = Work("exchange_and_close", To.SERVICE, family, datagram)
    yield Row(f"UDP, fresh socket: sendmsg + recvmsg + close, IPv{family}", work, datagram, 700)


def _packets(family: int) -> Iterator[Row]:
    """A request and its response pass the node's device and the pod's, at ingress or at egress."""
    ingress = ("from_device",)
    both = ("from_device", "to_device")
    work = Work(PASS_THROUGH, To.NODE_PORT, family, both, 2)
    yield Row(f"TCP packet of a NodePort flow, ingress, net, IPv{family}", work, ingress, 100, net=True)
    yield Row(f"the same, ingress + egress, net, IPv{family}", work, both, 200, net=True)
    work = Work(OPEN_AND_CLOSE, To.NODE_PORT, family, both, 6)
    yield Row(f"the same, of the 6 packets of a short connection, net, IPv{family}", work, both, net=True)
    work = Work("take_turns", To.NODE_PORT, family, both, 2)
    yield Row(f"the same, requests in turns over the network, net, IPv{family}", work, both, net=True)
    work = Work(PASS_THROUGH, To.DIRECT, family, both, 2)
    yield Row(f"TCP packet of no Service, ingress, net, IPv{family}", work, ingress, 6, net=True)
    forward = ("forward",)
    work = Work(FORWARD, To.FAR_NODE_PORT, family, forward, 2)
    yield Row(f"TCP packet to another node, whole at XDP, net, IPv{family}", work, forward, 250, net=True)


ROWS = [row for rows in (_sockets, _packets) for family in (4, 6) for row in rows(family)]
WORKS = list(dict.fromkeys(row.work for row in ROWS))


class Bench:
    """``checkout``: another version, whose programs are measured in the same rounds, as peers' are."""

    def __init__(self, lab: Lab, load: Path, checkout: Path | None) -> None:
        self.ours = subjects.agent(lab, "ours", load, SERVICES, arguments=("--xdp", "native"))
        self.empty = subjects.empty(lab, load, SERVICES)
        self.others: dict[str, Subject] = {}
        if checkout:
            self.others["base"] = subjects.agent(lab, "base", load, SERVICES, checkout)
        if calico := peers.calico(lab, load, SERVICES):
            self.others["Calico"] = calico
        measured = (self.ours, self.empty, *self.others.values())
        self._clients = {subject: subject.clients() for subject in measured}

    def samples(self, rounds: int) -> dict[Way, list[Sample]]:
        ways = [
            Way(subject, work)
            for subject in self._clients
            for work in WORKS
            if not set(subject.names).isdisjoint(work.programs)
        ]
        # The first time is not like the others: caches are cold, neighbours unknown.
        in_turns(ways, 1, self._measure)
        return dict(zip(ways, in_turns(ways, rounds, self._measure), strict=True))

    def _done(self, subject: Subject, work: Work) -> list[dict[str, Runs]]:
        if work.operation in (PASS_THROUGH, OPEN_AND_CLOSE, FORWARD):
            passing: packets.Connection | packets.ShortConnections | packets.ForwardedConnection
            if work.operation == FORWARD:
                passing = packets.forwarded(subject, work.family)
            else:
                passing = packets.connection(subject, work.to, work.family)
                if work.operation == OPEN_AND_CLOSE:
                    passing = packets.ShortConnections(passing)
            return subject.node.call(packets.measure, subject.programs, passing, BATCHES)
        inside, outside = self._clients[subject]
        client = outside if work.from_outside else inside
        return client.perform(Task(work.operation, subject.peers(work.to, work.family, OPERATIONS)))

    def _measure(self, way: Way) -> Sample:
        """Raises AssertionError where programs run otherwise than the operation makes them run."""
        subject, work = way
        done = self._done(subject, work)
        runs = BATCH * work.times
        wanted = {name: runs for name in work.programs if name in subject.names}
        good = [batch for batch in done if {name: r.times for name, r in batch.items() if r.times} == wanted]
        assert len(good) > BATCHES / 2, f"{work}: {done}"
        return Sample([{name: r.nanoseconds / runs for name, r in batch.items()} for batch in good])


def _result(row: Row, own: list[Sample], nothing: list[Sample], others: dict[str, list[Sample]]) -> Result:
    """Samples by round; each is compared with those of its round."""
    values, empties = ([each.of(row.programs) for each in samples] for samples in (own, nothing))
    nets = [a - b for a, b in zip(values, empties, strict=True)]
    value, low, high = ratio.middle(nets if row.net else values)
    gross_or_net = (
        f"gross {statistics.median(values):.0f}" if row.net else f"net {statistics.median(nets):.0f}"
    )
    details = [f"95 % [{low:.0f} {high:.0f}]", f"{gross_or_net}, empty {statistics.median(empties):.0f}"]
    for name, samples in others.items():
        theirs = [each.of(row.programs) for each in samples]
        if any(theirs):
            found = ratio.of_medians(values, theirs)
            details.append(f"{name} {statistics.median(theirs):.0f}, ratio {found}")
    if not others:
        parts = ((name, statistics.median(each.of((name,)) for each in own)) for name in row.programs)
        details.append(" + ".join(f"{name} {part:.0f}" for name, part in parts))
    detail = "; ".join(details)
    if row.goal is None:
        return Result(row.what, value, "ns", detail=detail)
    return at_most(row.what, value, "ns", row.goal, detail)


def run(rounds: int, checkout: Path | None = None) -> list[Result]:
    with (
        tempfile.TemporaryDirectory() as folder,
        Lab(takes_xdp=True, executes_agents=True) as lab,
        run_statistics(),
    ):
        bench = Bench(lab, build(Path(folder)), checkout)
        samples = bench.samples(rounds)
        return [
            _result(
                row,
                samples[Way(bench.ours, row.work)],
                samples[Way(bench.empty, row.work)],
                {name: samples.get(Way(subject, row.work), []) for name, subject in bench.others.items()},
            )
            for row in ROWS
        ]
