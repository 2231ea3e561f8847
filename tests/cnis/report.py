"""The results of a run of tests/cnis as a section of docs/tested.md."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.tested import table

TITLE = "Networks"
COMMAND = "make test-cnis"
_ABOUT = (
    "tests/cnis connects the pods of two nodes as CNIs do, with agents in their default configuration but where a row says"
    " otherwise. The plugins of Debian's containernetworking-plugins are executed; what flannel, Calico and Cilium leave on"
    " a node is made from their sources, which the modules name, and they do not run themselves."
)
_NOT_SHOWN = "Not shown, as this kernel lacks the devices: IPIP, Geneve, WireGuard, GRE, bonds, VLANs, VRF, ipvlan, netkit, dummy."


@dataclass
class Report:
    """``cells``: family and outcome by row and column. ``reasons``: row and column of what was left out, and why.

    ``sentences``: variant and outcome by the sentence of other tests.
    """

    cells: dict[tuple[str, str], list[tuple[str, str]]] = field(default_factory=dict)
    reasons: set[tuple[str, str, str]] = field(default_factory=set)
    sentences: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def add_cell(self, row: str, column: str, family: str, outcome: str, reason: str = "") -> None:
        if outcome == "skipped" and column != "hostPort":
            self.reasons.add((row, column, reason))
        self.cells.setdefault((row, column), []).append((family, outcome))

    def lines(self) -> list[str]:
        """Returns the section's Markdown, below its heading."""
        columns = list(dict.fromkeys(column for _, column in self.cells))
        rows = list(dict.fromkeys(row for row, _ in self.cells))
        made = [[row, *(_cell(self.cells.get((row, column), ())) for column in columns)] for row in rows]
        lines = [_ABOUT, "", "4 and 6: passed with IPv4, IPv6.", "", *table(["", *columns], made)]
        told = [list(each) for each in sorted(self.reasons)]
        lines += table(["network", "check", "left out because"], told) if told else []
        if self.sentences:
            lines += ["### What else holds", ""]
            told = [[sentence, _count(results)] for sentence, results in self.sentences.items()]
            lines += table(["", "passed, in networks and families"], told)
        return [*lines, _NOT_SHOWN]


def _cell(results: Iterable[tuple[str, str]]) -> str:
    found = {family[-1]: outcome for family, outcome in sorted(results)}
    passed = [family for family, outcome in found.items() if outcome == "passed"]
    failed = [f"**{family} failed**" for family, outcome in found.items() if outcome == "failed"]
    return " ".join([*passed, *failed]) or "-"


def _count(results: list[tuple[str, str]]) -> str:
    failed = [variant for variant, outcome in results if outcome != "passed"]
    passed = f"{len(results) - len(failed)} of {len(results)}"
    return f"{passed}; **not with {'; '.join(failed)}**" if failed else passed
