"""What a run of tests/cluster showed, as a page of the documentation."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from datetime import date

from tests.cluster.e2e import Outcome, Result

COMMAND = "KUBE_BIN=… make test-cluster"
_GROUP = re.compile(r"\[sig-network\] (\[Feature:\w+\]|[\w-]+)")


@dataclass
class Report:
    """``versions``: name and version of what was run. ``e2e``: by service proxy, results of specs by their names.

    ``sentences``: (module, first sentence of the test's docstring, outcome, seconds), in the order of the run.
    """

    versions: dict[str, str] = field(default_factory=dict)
    e2e: dict[str, dict[str, Result]] = field(default_factory=dict)
    sentences: list[tuple[str, str, str, float]] = field(default_factory=list)

    def page(self, day: date) -> str:
        parts = [
            "# What was tested in a real cluster",
            "",
            f"Written by `{COMMAND}` on {day.isoformat()}; do not edit. tests/cluster says how the cluster is made: two "
            "nodes, each with a kubelet, a containerd, a cgroup subtree and two networks of its own, made with "
            "`kubeadm init --skip-phases=addon/kube-proxy`, dual stack.",
            "",
            *_table(["", "version"], [[name, version] for name, version in self.versions.items()]),
        ]
        if self.e2e:
            parts += ["## The Kubernetes e2e suite, [sig-network]", "", *self._groups(), *self._failures()]
        if self.sentences:
            parts += ["## What else holds", ""]
            rows = [
                [sentence, outcome, f"{seconds:.0f} s"] for _, sentence, outcome, seconds in self.sentences
            ]
            parts += _table(["", "", "took"], rows)
        return "\n".join(parts)

    def _groups(self) -> list[str]:
        """A row for each group of specs, a column for each proxy."""
        names = sorted({name for results in self.e2e.values() for name in results})
        rows = []
        for group in [*sorted({_group(name) for name in names}), ""]:
            row = [group or "**all**"]
            for results in self.e2e.values():
                counted = Counter(r.outcome for name, r in results.items() if group in ("", _group(name)))
                run = counted[Outcome.PASSED] + counted[Outcome.FAILED]
                row.append(f"{counted[Outcome.PASSED]} of {run}")
            rows.append(row)
        return _table(["specs that passed, of those that ran", *self.e2e], rows)

    def _failures(self) -> list[str]:
        """The specs that did not pass with every proxy."""
        rows = []
        for name in sorted({name for results in self.e2e.values() for name in results}):
            outcomes = [
                results[name].outcome if name in results else Outcome.SKIPPED for results in self.e2e.values()
            ]
            if Outcome.FAILED in outcomes:
                rows.append([_escaped(name), *(outcome.value for outcome in outcomes)])
        return _table(["specs that failed with one of them", *self.e2e], rows) if rows else []


def _group(name: str) -> str:
    found = _GROUP.match(name)
    return found[1].strip("[]") if found else "other"


def _escaped(text: str) -> str:
    return text.removeprefix("[sig-network] ").replace("|", r"\|").replace("[", r"\[")


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]
    return [*lines, ""]
