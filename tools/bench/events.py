"""What reporting decisions costs: a connect at each level, against plain programs; requests; the process that reads.

Two nodes differ in their programs alone: plain ones, and those that report. On the second the levels take turns
by what the map says that is wanted, which is how the command changes them. Rates are of one node, whose agent
replaces the programs in between, as it does for the command.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from ebpfproxy.datapath.abi.decision_layout import SUCCESSES, DecisionKind, TracingPrograms, Wanted
from ebpfproxy.datapath.decisions import DecisionReader, Tracing, lease
from ebpfproxy.datapath.dump import open_maps
from ebpfproxy.datapath.kernel.roots import pin_folder
from ebpfproxy.datapath.programs.attach import attachments
from tests.lab import Lab
from tests.lab.spaces import Space
from tests.lab.waiting import until
from tools.bench import ratio, subjects
from tools.bench.hooks import BATCHES, OPERATIONS, Sample
from tools.bench.operations import BATCH, Task
from tools.bench.results import Result, at_least, at_most
from tools.bench.runtime import run_statistics
from tools.bench.sockets import MODES, build, in_turns, rate
from tools.bench.subjects import SERVICE, Subject, To

SERVICES = 10
_NO_LIMIT = 1_000_000_000
_ERRORS = Wanted(frozenset(DecisionKind) - SUCCESSES, rate=_NO_LIMIT)
_ALL = Wanted(frozenset(DecisionKind), rate=_NO_LIMIT)
#: Decisions a second for the reader, for so many seconds.
_RATE, _SECONDS = 2000, 5
#: Requests while decisions are reported, against those without.
RATIO = 0.99


class Level(NamedTuple):
    """``wanted``: None for plain programs."""

    what: str
    wanted: Wanted | None
    goal: float | None


LEVELS = (
    Level("plain programs", None, None),
    Level("programs that report, nothing wanted", Wanted(frozenset()), None),
    Level("errors", _ERRORS, 10),
    Level("all", _ALL, 150),
)


class Bench:
    def __init__(self, lab: Lab, load: Path) -> None:
        self.plain = subjects.agent(lab, "plain", load, SERVICES)
        self.reporting = subjects.agent(lab, "reporting", load, SERVICES, arguments=("--trace-decisions",))
        self._load = load
        self._clients = {each: each.clients()[0] for each in (self.plain, self.reporting)}

    def levels(self, rounds: int) -> Iterator[Result]:
        """What connect4 takes more than the plain one, in nanoseconds."""
        maps = open_maps(self.reporting.node.bpf_root)
        with lease(maps) as tracing:
            reader = DecisionReader(maps)

            def measure(level: Level) -> float:
                return self._measure(level, tracing, reader)

            in_turns(LEVELS, 1, measure)
            plain, *others = in_turns(LEVELS, rounds, measure)
            reader.close()
        for level, samples in zip(LEVELS[1:], others, strict=True):
            nets = [a - b for a, b in zip(samples, plain, strict=True)]
            value, low, high = ratio.middle(nets)
            what = f"TCP connect, level {level.what}" if level.goal else level.what
            detail = f"95 % [{low:.0f} {high:.0f}]; plain {sorted(plain)[len(plain) // 2]:.0f}"
            if level.goal is None:
                yield Result(f"{what}, net", value, "ns", detail=detail)
            else:
                yield at_most(f"{what}, net", value, "ns", level.goal, detail)

    def _measure(self, level: Level, tracing: Tracing, reader: DecisionReader) -> float:
        subject: Subject = self.plain
        if level.wanted is not None:
            subject = self.reporting
            tracing.want(level.wanted)
            tracing.renew()
        task = Task("connect_and_close", subject.peers(To.SERVICE, 4, OPERATIONS))
        done = self._clients[subject].perform(task)
        reported = len(reader.read())
        assert reported == (OPERATIONS if level.wanted is _ALL else 0), (level, reported)
        good = [batch for batch in done if batch["connect4"].times == BATCH]
        assert len(good) > BATCHES / 2, done
        return Sample([{"connect4": batch["connect4"].nanoseconds / BATCH} for batch in good]).of(
            ("connect4",)
        )

    def rates(self, seconds: float, rounds: int) -> Iterator[Result]:
        """Requests at the levels of the command, against those with plain programs, on one node in turns."""
        root = self.plain.node.bpf_root
        maps = open_maps(root)
        reader = DecisionReader(maps)
        levels = [level for level in LEVELS if level.wanted is None or level.goal]
        ways = [(mode, level) for mode in ("crr", "rr") for level in levels]

        #: The ids of programs that have reported.
        replaced: set[int] = set()

        def measure(way: tuple[str, Level]) -> float:
            mode, level = way
            with ExitStack() as held:
                if level.wanted is None:
                    until(lambda: _attached(root).isdisjoint(replaced))
                else:
                    plain_ones = _attached(root)
                    tracing = held.enter_context(lease(maps))
                    tracing.want(level.wanted)
                    until(lambda: tracing.programs is TracingPrograms.REPORTING)
                    replaced.update(_attached(root) - plain_ones)
                    tracing.renew()
                found = rate(self.plain.client, self._load, mode, seconds, SERVICE)
            reported = len(reader.read())
            assert bool(reported) == (level.wanted is _ALL), (way, reported)
            return found

        found = dict(zip(ways, in_turns(ways, rounds, measure), strict=True))
        reader.close()
        for mode, level in ways:
            if level.wanted is None:
                plain = found[mode, level]
                continue
            cost = ratio.of_medians(found[mode, level], plain)
            medians = f"{statistics.median(plain):.6g} → {statistics.median(found[mode, level]):.6g}/s"
            detail = f"95 % [{cost.low:.3f} {cost.high:.3f}]; {medians}"
            yield at_least(f"{MODES[mode]}, level {level.what}", cost.value, RATIO, detail)

    def reader(self) -> Result:
        """The share of a CPU that the command takes."""
        node = self.reporting.node
        command = [sys.executable, "-m", "ebpfproxy", "trace", "--bpf-root", str(node.bpf_root)]
        trace = node.popen(command, join_cgroup=False, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert trace.stderr is not None and trace.stdout is not None
        assert trace.stderr.readline() == b"tracing\n"
        counting = subprocess.Popen(["wc", "-l"], stdin=trace.stdout, stdout=subprocess.PIPE)
        before = _cpu_seconds(trace.pid)
        _connect_at_rate(self.reporting.client)
        used = _cpu_seconds(trace.pid) - before
        trace.terminate()
        trace.stdout.close()
        shown = int(counting.communicate()[0])
        detail = f"{shown} of {_RATE * _SECONDS} decisions shown as text"
        return at_most(f"the reader, at {_RATE:,}/s", 100 * used / _SECONDS, "% of a CPU", 5, detail)


def _attached(bpf_root: Path) -> set[int]:
    """The ids of the programs that sockets run."""
    found = attachments(pin_folder(bpf_root))
    return {each.program_id for each in found if each.alive and each.program_id is not None}


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


#: Each connect() of a datagram socket is a decision, and sends nothing.
_SCRIPT = f"""
import socket, time
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
began = time.monotonic()
for number in range({_RATE * _SECONDS}):
    sock.connect(({SERVICE!r}, 7777))
    if number % 10 == 0:
        time.sleep(max(0.0, began + number / {_RATE} - time.monotonic()))
"""


def _connect_at_rate(space: Space) -> None:
    space.run([sys.executable, "-c", _SCRIPT])
    time.sleep(0.2)


def run(seconds: float, rounds: int) -> list[Result]:
    with tempfile.TemporaryDirectory() as folder, Lab(executes_agents=True) as lab:
        bench = Bench(lab, build(Path(folder)))
        with run_statistics():
            results = list(bench.levels(rounds))
        return [*results, *bench.rates(seconds, rounds), bench.reader()]
