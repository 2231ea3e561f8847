"""Other proxies whose programs or rules are in the way: what ``migrate`` knows, as findings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from ebpfproxy.datapath.drift.findings import Finding
from ebpfproxy.operator.migrate.node import leftovers, obstacles
from ebpfproxy.operator.migrate.node.leftovers import Leftovers
from ebpfproxy.operator.migrate.node.obstacles import Conflict, Severity


def find(bpf_root: Path) -> list[Finding]:
    """Raises ToolError where netfilter's tools fail."""
    conflicts = obstacles.find(obstacles.look(obstacles.bpffs_of(bpf_root)))
    return [*conflicting(conflicts), *left(leftovers.find())]


def conflicting(conflicts: Iterable[Conflict]) -> Iterator[Finding]:
    for each in conflicts:
        yield Finding(
            where="proxies",
            kind="foreign",
            what=each.what,
            consequence=each.consequence,
            mend=each.advice,
            warning=each.severity is Severity.WARNS,
        )


def left(found: Leftovers) -> Iterator[Finding]:
    """kube-proxy's rules serve what our programs do not translate, as of when it last ran."""
    if found.modes:
        yield Finding(
            where="proxies",
            kind="foreign",
            what=f"rules of kube-proxy, mode {' and '.join(found.modes)}",
            consequence="what our programs leave alone goes to endpoints as of when kube-proxy last ran",
            mend="ebpfproxy migrate plan, then ebpfproxy migrate run",
            warning=True,
        )
