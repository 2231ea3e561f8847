"""The results of a run of tests/cluster as a section of docs/tested.md."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

from tests.cluster.e2e import Outcome, Result
from tests.tested import table

TITLE = "In a real cluster"
COMMAND = "KUBE_BIN=… make test-cluster"
_SUITE = (
    "In two clusters of their own, of three nodes in three zones: nodes, pods, Services and the DNS have IPv4 as their "
    "first family, or IPv6. What failed was run again, alone. What then does not pass with the agent was run with "
    "kube-proxy (nftables); where it has no column there was nothing to run. The spec that restarts kube-proxy ran last, "
    "with agents that have the label of its pods. Specs that need a cloud's load balancer, the Internet, SCTP sockets, "
    "gates that are off or ssh to nodes were left out, and those about migration of kube-proxy itself."
)
_GROUP = re.compile(r"\[sig-network\] (\[Feature:\w+\]|[\w-]+)")


@dataclass
class Report:
    """``versions``: name and version of what was run. ``e2e``: by service proxy, results of specs by their names.

    ``sentences``: (module, first sentence of the test's docstring, outcome, seconds), in the order of the run.
    ``began``: by :func:`time.monotonic`.
    """

    versions: dict[str, str] = field(default_factory=dict)
    e2e: dict[str, dict[str, Result]] = field(default_factory=dict)
    sentences: list[tuple[str, str, str, float]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def add(self, part: Report) -> None:
        """Adds what another process of the same run has recorded."""
        self.versions |= part.versions
        self.e2e |= part.e2e
        self.sentences += part.sentences

    def lines(self) -> list[str]:
        """Returns the section's Markdown, below its heading."""
        parts = [
            "tests/cluster says how the cluster is made: two nodes, each with a kubelet, a containerd, a cgroup subtree "
            "and two networks of its own, made with `kubeadm init --skip-phases=addon/kube-proxy`, dual stack.",
            "",
            *table(["", "version"], [[name, version] for name, version in self.versions.items()]),
        ]
        if self.e2e:
            parts += [
                "### The Kubernetes e2e suite, [sig-network]",
                "",
                _SUITE,
                "",
                *self._groups(),
                *self._failures(),
                *self._skipped(),
            ]
        if self.sentences:
            parts += ["### What else holds", ""]
            rows = [
                [sentence, outcome, f"{seconds:.0f} s"] for _, sentence, outcome, seconds in self.sentences
            ]
            parts += table(["", "", "took"], rows)
        return parts

    def _groups(self) -> list[str]:
        """Returns a row for each group of specs and a column for each proxy."""
        names = sorted({name for results in self.e2e.values() for name in results})
        rows = []
        for group in [*sorted({_group(name) for name in names}), ""]:
            row = [group or "**all**"]
            for results in self.e2e.values():
                own = [result.outcome for name, result in results.items() if group in ("", _group(name))]
                passed = sum(outcome.good for outcome in own)
                run = passed + own.count(Outcome.FAILED)
                row.append(f"{passed} of {run}" if run else "")
            rows.append(row)
        return table(["specs that passed, of those that ran", *self.e2e], rows)

    def _failures(self) -> list[str]:
        """Returns specs that failed with a proxy or passed alone; a cell is empty where a spec was not selected."""
        rows = []
        for name in sorted({name for results in self.e2e.values() for name in results}):
            outcomes = [results[name].outcome if name in results else None for results in self.e2e.values()]
            if {*outcomes} & {Outcome.FAILED, Outcome.PASSED_ALONE, Outcome.NOT_REACHED}:
                rows.append([_escaped(name), *(each.value if each else "" for each in outcomes)])
        return table(["specs that failed beside others with one of them", *self.e2e], rows) if rows else []

    def _skipped(self) -> list[str]:
        """Returns the specs that skip themselves here, with their reason."""
        rows = {
            _escaped(name): result.message
            for results in self.e2e.values()
            for name, result in results.items()
            if result.outcome is Outcome.SKIPPED
        }
        told = [list(row) for row in sorted(rows.items())]
        return table(["specs that did not run", "what they say"], told) if told else []


def _group(name: str) -> str:
    found = _GROUP.match(name)
    return found[1].strip("[]") if found else "other"


def _escaped(text: str) -> str:
    return text.removeprefix("[sig-network] ").replace("|", r"\|").replace("[", r"\[")
