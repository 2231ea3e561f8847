"""``make fuzz``: runs all of it, or parts, and writes the section of docs/tested.md. Exits with 1 if there is a fault.

A part that is run alone replaces what was found of it before (:mod:`tests.tested`).

python -m tests.fuzz [decoders] [machine] [packets] [objects] [floods] [--seconds N] [--steps N] [--packets N]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path

import msgspec

from tests import tested
from tests.fuzz import engine, floods, machine
from tests.fuzz.hostile import hostile_cluster, unprintable
from tests.fuzz.packet_world import WORLDS, Outcome, miscounted, packet_world, uncounted
from tests.fuzz.targets import TARGETS

_STEPS_OF_A_MACHINE = 10_000
_PACKETS_OF_A_WORLD = 10_000_000
#: So many take some seconds.
_PACKETS_OF_CACHED_FLOWS = 1_000_000
#: What is counted of packets, and the columns of the tables.
_COUNTS = ("runs", "passed", "translated", "forwarded", "rejected", "dropped", "option_sent", "option_taken")
_COUNTED = (
    "packets",
    "passed",
    "translated",
    "of these forwarded",
    "rejected",
    "dropped",
    "option of DSR sent",
    "taken",
)
KEPT = "fuzz"
_HEAD = (
    "Nothing raised another exception than the one that its callers know, no run hung, each packet's result was as"
    " tests/fuzz/packets says, and tracker and maps agreed with the rules after all that happened."
)


class Part(msgspec.Struct):
    """What was done: lines for the page."""

    lines: list[str] = []
    seconds: float = 0.0
    day: str = ""
    commit: str = ""


class Run:
    """One part, and the faults that were found."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self._given = given
        self._folder = folder
        self.lines: list[str] = []
        self.faults: list[str] = []

    def _table(self, title: str, head: tuple[str, ...], rows: list[list[str]]) -> None:
        self.lines += [f"### {title}", "", *tested.table(head, rows)]
        print(title, *map(" ".join, rows), sep="\n  ", flush=True)

    def _fault(self, text: str) -> None:
        """A run may be ended before the page is written."""
        self.faults.append(text)
        print(text, file=sys.stderr, flush=True)

    def decoders(self) -> None:
        """Each target for the same time, guided by coverage."""
        rows = []
        for name, target in TARGETS.items():
            done = engine.guided(name, self._given.seconds / len(TARGETS), self._folder / name)
            about = (target.run.__doc__ or "").split("\n")[0].rstrip(".:")
            rows.append([name, about, f"{done.executions:,}", f"{done.edges:,}"])
            if done.failed:
                self._fault(f"{name}: {done.failed}")
        total = sum(int(row[2].replace(",", "")) for row in rows)
        rows.append(["**all**", "", f"{total:,}", ""])
        self._table("Decoders (atheris)", ("target", "", "executions", "branches reached"), rows)

    def machine(self) -> None:
        """Machines one after the other, each with other random numbers."""
        done: Counter[str] = Counter()
        killed_in: Counter[str] = Counter()
        objects = machine.population(400)
        seed = 0
        with machine.bench() as bench:
            while sum(done.values()) - done["killed"] < self._given.steps and not self.faults:
                made = machine.Machine(bench, objects, seed)
                steps = min(_STEPS_OF_A_MACHINE, self._given.steps)
                try:
                    made.run(steps)
                except Exception:
                    self._fault(f"machine {seed}: {dict(made.steps)}\n{traceback.format_exc()}")
                done.update(made.steps)
                killed_in.update(made.killed_in)
                seed += 1
        killed = done.pop("killed", 0)
        rows = [[name, f"{count:,}"] for name, count in sorted(done.items())]
        rows.append(["**all**", f"{sum(done.values()):,}"])
        self._table("Tracker and writer against the rules", ("step", "how often"), rows)
        files = ", ".join(f"{name} {count:,}" for name, count in killed_in.most_common())
        self.lines += [
            f"In {killed:,} of these an agent was killed: {killed - killed_in.total():,} when it wrote to a map, and"
            f" others at any line of the modules that write maps, in a change, a clean-up or a start: {files}.",
            "",
        ]

    def packets(self) -> None:
        """A share of them in each world; worlds of one kind one after the other: maps fill up in each."""
        worlds: dict[str, list[int]] = {}
        programs: dict[str, list[int]] = {}
        unserved, seed = 0, 1
        for name in WORLDS:
            left = -(-self._given.packets // len(WORLDS))
            while left > 0:
                outcome = self._packets_of_a_world(name, min(left, _PACKETS_OF_A_WORLD), seed)
                for each in outcome.programs:
                    counts = [getattr(each, count) for count in _COUNTS]
                    counts[0] -= each.refused
                    for total, key in ((worlds, name), (programs, each.name)):
                        known = total.setdefault(key, [0] * len(counts))
                        total[key] = [a + b for a, b in zip(known, counts, strict=True)]
                unserved += outcome.unserved
                left -= _PACKETS_OF_A_WORLD
                seed += 1
        sums = [sum(column) for column in zip(*worlds.values(), strict=True)]
        for title, head, total in (
            ("Packets", "agents with", {**worlds, "**all**": sums}),
            ("Packets by program", "program @ device", programs),
        ):
            rows = [[name, *(f"{n:,}" for n in counts)] for name, counts in total.items()]
            self._table(title, (head, *_COUNTED), rows)
        self.lines += [
            f"{unserved:,} of these were no Service's by packets/model.c, and passed unchanged. Those that are"
            " forwarded are translated, too; with `--measure-traffic` what Services count is the same as what"
            " packets/translation.c counts. The kernel runs no program on a packet of less than an IP header; these"
            " are left out.",
            "",
        ]

    def _packets_of_a_world(self, name: str, count: int, seed: int) -> Outcome:
        with packet_world(self._folder, name) as world:
            before = world.events()
            outcome, report = world.send(count, seed)
            after, traffic = world.events(), world.traffic()
            # What bypasses netfilter has no fast path but at XDP.
            if count >= _PACKETS_OF_CACHED_FLOWS and "bypass" not in name and not world.has_flow_cache():
                self._fault(f"{name}: no flow has lasted long enough for the flow cache")
            if world.cluster.agent.process is None or world.cluster.agent.process.poll() is not None:
                self._fault(f"the agent has ended:\n{world.cluster.agent.text[-4000:]}")
        if outcome.violations:
            self._fault(f"packets, {name}, seed {seed}: {outcome.violations}\n{report.read_text()[:20000]}")
        if missed := uncounted(before, after, outcome):
            self._fault(f"{name}: {missed} dropped, rejected or forwarded packets are in no counter")
        if "--measure-traffic" in name and (wrong := miscounted(traffic, outcome)):
            self._fault(f"{name}: {wrong}")
        return outcome

    def objects(self) -> None:
        """Huge objects and evil names, beside a Service that has to go on working."""
        rows = []
        for form in ("text", "json"):
            with hostile_cluster(ports=10_000, endpoints=100_000, annotation=1 << 20, form=form) as found:
                cluster, seconds = found
                printed = 0
                if not cluster.is_served():
                    self._fault("the Service beside hostile ones is not served")
                for name, text in cluster.outputs():
                    printed += len(text)
                    if wrong := unprintable(text):
                        self._fault(f"{name} prints {wrong[:5]}")
                if cluster.agent.process is None or cluster.agent.process.poll() is not None:
                    self._fault(f"the agent has ended:\n{cluster.agent.text[-4000:]}")
            rows.append([f"log as {form}", f"{seconds:.0f} s", f"{printed:,}"])
        head = (
            "",
            "from the agent's start to attached programs",
            "characters printed, none of which is obeyed",
        )
        self._table(
            "A Service with 10,000 ports, one with 100,000 endpoints, annotations of 1 MiB", head, rows
        )

    def floods(self) -> None:
        """What is left of established flows."""
        with floods.flooded_world() as world:
            rows = [[*each] for each in floods.measure(world)]
        self._table("Floods: established flows that are still there", floods.HEAD, rows)
        with floods.flooded_world(floods.LARGE) as world:
            rows = [list(each) for each in floods.measure_new(world)]
        self._table("Floods: new flows while the table has room", floods.NEW_HEAD, rows)


_PARTS: dict[str, Callable[[Run], None]] = {
    "decoders": Run.decoders,
    "machine": Run.machine,
    "packets": Run.packets,
    "objects": Run.objects,
    "floods": Run.floods,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(_PARTS)}; all without any")
    parser.add_argument("--seconds", type=int, default=1400, help="for all decoders together")
    parser.add_argument("--steps", type=int, default=1_000_000, help="of tracker and writer")
    parser.add_argument("--packets", type=int, default=10_000_000)
    given = parser.parse_args()
    if unknown := set(given.parts) - _PARTS.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    return given


def write(parts: dict[str, Part]) -> None:
    """Keeps the parts, and writes the section of what is kept so far."""
    tested.keep(KEPT, parts)
    page = os.environ.get(tested.PAGE)
    missing = [f"`{name}`" for name in _PARTS if name not in parts]
    if page is None or not parts:
        return
    day = max(date.fromisoformat(each.day) for each in parts.values())
    seconds = sum(each.seconds for each in parts.values())
    lines = [line for name in _PARTS if name in parts for line in parts[name].lines]
    commits = [f"`{name}` {each.commit}" for name, each in parts.items() if each.commit]
    about = [_HEAD, ""]
    if commits:
        about += [f"Of commits: {', '.join(commits)}.", ""]
    if missing:
        about += [f"Not run yet: {', '.join(missing)}.", ""]
    tested.write(Path(page), "Bad input", "make fuzz", day, seconds, [*about, *lines])


def main() -> int:
    given = _arguments()
    parts, has_faults = tested.kept(KEPT, Part), False
    for name, part in _PARTS.items():
        if given.parts and name not in given.parts:
            continue
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            run = Run(given, Path(folder))
            part(run)
        if run.faults:
            has_faults = True
            parts.pop(name, None)
        else:
            seconds, day = time.monotonic() - started, datetime.now(UTC).date().isoformat()
            parts[name] = Part(run.lines, seconds, day, tested.commit())
        write(parts)
    return has_faults


if __name__ == "__main__":
    sys.exit(main())
