"""What was lost, by fault and kind of load, and what became of each test: a section of docs/tested.md.

A worker's report of a test carries what the test has found, and the page is written after each: a run that is ended has
its rows. What earlier runs have found is kept (:mod:`tests.tested`), as the whole takes hours: a test replaces what it
has found before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence, Set
from datetime import UTC, date, datetime
from pathlib import Path

import msgspec

from tests import tested
from tests.faults.load import KINDS, Result

TITLE, COMMAND = "Faults", "make test-faults"
_KEPT = "faults"


class Row(msgspec.Struct):
    """Of one fault: how many were made and lost, by kind of load; and the steps at which the fault was done."""

    steps: int = 0
    counts: dict[str, tuple[int, int]] = {}
    #: The load whose losses fail no test.
    excused: set[str] = set()

    def add(self, kind: str, count: int, lost: int) -> None:
        before = self.counts.get(kind, (0, 0))
        self.counts[kind] = before[0] + count, before[1] + lost

    def join(self, other: Row) -> None:
        self.steps += other.steps
        self.excused |= other.excused
        for kind, counts in other.counts.items():
            self.add(kind, *counts)


class Part(msgspec.Struct):
    """One run of a test, which may take one of ``of`` parts of the steps."""

    number: int = 0
    of: int = 1
    rows: dict[str, Row] = {}
    outcome: str = ""
    seconds: float = 0.0
    day: str = ""
    commit: str = ""

    def row(self, fault: str) -> Row:
        return self.rows.setdefault(fault, Row())


class Test(msgspec.Struct):
    """``line``: where it is in its file. Tests and their parts are in the page in this order."""

    line: int
    sentence: str
    parts: list[Part] = []

    def add(self, part: Part) -> None:
        """Replaces the same part, and all where their number was another one."""
        kept = [each for each in self.parts if each.of == part.of and each.number != part.number]
        self.parts = sorted([*kept, part], key=lambda each: each.number)

    @property
    def outcome(self) -> str:
        """The outcomes of the parts, and which of them there are if not all are."""
        outcomes = ", ".join(sorted({each.outcome for each in self.parts}))
        if len(self.parts) == self.parts[0].of:
            return outcomes
        numbers = ", ".join(str(each.number + 1) for each in self.parts)
        return f"{outcomes} (part {numbers} of {self.parts[0].of})"

    @property
    def days(self) -> str:
        found = sorted({each.day for each in self.parts})
        return found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}"

    @property
    def commits(self) -> str:
        return ", ".join(dict.fromkeys(each.commit for each in self.parts if each.commit))


class _Current:
    """What the test that runs has found so far."""

    part = Part()


def begin() -> None:
    _Current.part = Part()


def take_part(number: int, of: int) -> None:
    """The test that runs takes this part of its steps."""
    _Current.part.number, _Current.part.of = number, of


def add(fault: str, found: Mapping[str, Sequence[Result]], excused: Set[str] = frozenset()) -> None:
    """``found``: by place. A fault may be added more than once. ``excused``: the load whose losses fail no test."""
    _Current.part.row(fault).excused |= excused
    for results in found.values():
        for each in results:
            _Current.part.row(fault).add(each.kind, each.count, len(each.lost))


def add_probes(fault: str, count: int, lost: int) -> None:
    """Of health checks."""
    _Current.part.row(fault).add("probes", count, lost)


def add_steps(fault: str, count: int) -> None:
    _Current.part.row(fault).steps += count


def end(line: int, sentence: str, outcome: str, seconds: float) -> str:
    """What the test has found, for :meth:`Found.add`."""
    part = _Current.part
    part.outcome, part.seconds, part.day, part.commit = outcome, seconds, _today(), tested.commit()
    return msgspec.json.encode(Test(line, sentence, [part])).decode()


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


class Found:
    """What this run and those before have found, by name of the test."""

    def __init__(self) -> None:
        self._tests = {name: each for name, each in tested.kept(_KEPT, Test).items() if _exists(name)}

    def add(self, name: str, encoded: str) -> None:
        new = msgspec.json.decode(encoded, type=Test)
        known = self._tests.get(name)
        self._tests[name] = Test(new.line, new.sentence, known.parts if known is not None else [])
        self._tests[name].add(new.parts[0])

    def write(self) -> None:
        if tested.PAGE not in os.environ or not self._tests:
            return
        tested.keep(_KEPT, self._tests)
        parts = [part for each in self._tests.values() for part in each.parts]
        day = max(date.fromisoformat(each.day) for each in parts)
        seconds = sum(each.seconds for each in parts)
        tested.write(Path(os.environ[tested.PAGE]), TITLE, COMMAND, day, seconds, [*self.lines()])

    def lines(self) -> Iterator[str]:
        tests = [
            each
            for _, each in sorted(
                self._tests.items(), key=lambda item: (item[0].partition("::")[0], item[1].line, item[0])
            )
        ]
        rows: dict[str, Row] = {}
        for each in tests:
            for part in each.parts:
                for fault, row in part.rows.items():
                    rows.setdefault(fault, Row()).join(row)
        yield from _ABOUT
        yield from tested.table(
            _HEAD,
            [
                [
                    fault,
                    str(row.steps or ""),
                    *(_cell(row.counts.get(kind)) for kind in (*KINDS, "probes")),
                    ", ".join(sorted(row.excused)),
                ]
                for fault, row in rows.items()
            ],
        )
        yield from tested.table(
            ["", "", "took", "on", "of commit"],
            [
                [
                    each.sentence,
                    each.outcome,
                    f"{sum(part.seconds for part in each.parts):.0f} s",
                    each.days,
                    each.commits,
                ]
                for each in tests
            ],
        )


_HEAD = (
    "fault",
    "steps",
    "connections",
    "requests",
    "datagrams",
    "requests on long connections",
    "health checks",
    "not asserted",
)
_ABOUT = (
    "Two nodes in network namespaces, with the programs in this kernel and the stand-in API server. Load comes from a "
    "pod (sockets) and from outside through NodePorts (packets), half of it IPv4 and half IPv6, to two Services with an "
    "endpoint on each node. A connection or datagram is lost if it has an error, no answer in 10 s, or one of a server "
    "that is no endpoint of the Service. After each fault the maps are compared with the API's objects. A step is a "
    "system call that changes maps, programs, attachments, pins or sysctls, or a line that stores in the maps' memory. "
    "The time is that of all tests together; two run at once.",
    "",
    "A single loss fails a test, but for the load in the last column, whose losses are counted all the same. Where maps "
    "change their size, as they also do between versions, a flow of packets that begins in the last milliseconds before "
    "the programs of its device are replaced may be lost. Sockets are not asserted where an agent of a former version "
    "starts that leaves a moment without a program for sockets of the other maps. A wrong backend fails every test. Lost "
    "of how many:",
    "",
)


def _exists(name: str) -> bool:
    """False for a test of these that is no more, or has another name."""
    file, _, function = name.partition("::")
    if not file.startswith("tests/faults/"):
        return True
    path = Path(__file__).parents[2] / file
    return path.exists() and f"def {function.partition('[')[0]}(" in path.read_text()


def _cell(counts: tuple[int, int] | None) -> str:
    return f"{counts[1]} of {counts[0]:,}" if counts and counts[0] else ""
