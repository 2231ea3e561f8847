"""The Kubernetes e2e suite: selection of specs about a service proxy, their runs and results.

``e2e.test`` runs specs one by one. They mostly wait, so that several processes share them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from tests.cluster.binaries import KUBE_BIN, has
from tests.cluster.cluster import Cluster

#: Groups of specs whose result depends on the service proxy.
FOCUS = re.compile(
    r"\[sig-network\] (Conntrack|Connectivity|DNS HostNetwork|EndpointSlice|HostPort|KubeProxy|NoSNAT|Networking"
    r"|Service|Topology|Traffic|kube-proxy|\[Feature:IPv6DualStack\])"
)
#: The spec that deletes all pods of the service proxy, while others must not run.
RESTART = re.compile(r"\[sig-network\] Services should work after restarting kube-proxy")
#: These need cloud load balancers, the Internet, SCTP sockets, disabled gates or ssh to nodes, which are missing here.
#: [Serial] are otherwise the specs of SCTP, which may run beside others where the kernel has no SCTP.
SKIP = re.compile(r"\[Feature:(?!IPv6DualStack|Traffic)|\[Disruptive\]")
#: Seconds that unusual specs take, by parts of their names.
_SLOW = {
    "session affinity timeout": 145,
    "invalid conntrack state": 100,
    "should update endpoints": 135,
    "terminating": 80,
    "CLOSE_WAIT": 75,
    "should update nodePort": 75,
    "hostNetwork": 75,
    "Traffic Distribution": 60,
    "Granular Checks": 35,
}
_USUAL = 18
_SHARDS = 8
_PREFIX = "[sig-network] "


class Outcome(Enum):
    PASSED = "passed"
    #: The spec failed beside others and passed alone.
    PASSED_ALONE = "passed when run again, alone"
    FAILED = "failed"
    #: The spec skips itself with a reason.
    SKIPPED = "skipped"
    NOT_REACHED = "not reached"

    @property
    def good(self) -> bool:
        return self in (Outcome.PASSED, Outcome.PASSED_ALONE)


UNPROVEN = (Outcome.FAILED, Outcome.NOT_REACHED)


class Result(NamedTuple):
    """``message``: of the failure, or why the spec was skipped."""

    outcome: Outcome
    seconds: float
    message: str


def missing() -> str:
    """Returns a sentence about what ``KUBE_BIN`` lacks for running specs, or an empty one."""
    lacking = [name for name in ("e2e.test", "agnhost", "kube-proxy") if not has(name)]
    return f"KUBE_BIN ({KUBE_BIN}) has no {', '.join(lacking)}" if lacking else ""


def specs(focus: re.Pattern[str] | None = None) -> list[str]:
    """Returns the names of the specs from a dry run of the binary: those of ``FOCUS`` but for ``SKIP``, or of ``focus``."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--ginkgo.dry-run", "--ginkgo.focus=sig-network", f"--report-dir={folder}"]
        subprocess.run([str(KUBE_BIN / "e2e.test"), *arguments], check=True, capture_output=True)
        names = [name for name, result in _read(Path(folder)) if result.outcome is Outcome.PASSED]
    if focus:
        return [name for name in names if focus.search(name)]
    return [name for name in names if FOCUS.search(name) and not SKIP.search(name)]


def shares(names: Iterable[str], count: int = _SHARDS) -> list[list[str]]:
    """Distributes specs over ``count`` processes of about equal duration, none of them empty."""
    found: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for name in sorted(names, key=lambda name: (-_seconds(name), name)):
        least = loads.index(min(loads))
        found[least].append(name)
        loads[least] += _seconds(name)
    return [share for share in found if share]


def _seconds(name: str) -> int:
    return next((seconds for part, seconds in _SLOW.items() if part in name), _USUAL)


def run(cluster: Cluster, label: str, names: Sequence[str], *, timeout: float = 1200) -> dict[str, Result]:
    """Runs the specs by these names, and again alone those that failed or were not reached in time.

    ``timeout``: of each of the two, in seconds. Logs and JUnit files are in the cluster's folder, by ``label``.
    """
    started = [
        (share, *_start(cluster, f"{label}-{number}", share, timeout))
        for number, share in enumerate(shares(names))
    ]
    found: dict[str, Result] = {}
    for share, process, folder in started:
        found |= _finish(share, process, folder, timeout)
    failed = [name for name, result in found.items() if result.outcome in UNPROVEN]
    if failed:
        for name, result in _finish(
            failed, *_start(cluster, f"{label}-again", failed, timeout), timeout
        ).items():
            if result.outcome is Outcome.PASSED:
                found[name] = result._replace(outcome=Outcome.PASSED_ALONE, message=found[name].message)
    return found


def _start(
    cluster: Cluster, label: str, names: list[str], timeout: float
) -> tuple[subprocess.Popen[Any], Path]:
    folder = cluster.folder / f"e2e-{label}"
    folder.mkdir()
    # A common prefix lets Go's matcher skip mismatches: 8,000 texts take a second instead of twenty.
    rest = "|".join(re.escape(name.removeprefix(_PREFIX)).replace("\\ ", " ") for name in names)
    focus = f"{re.escape(_PREFIX)}(?:{rest})$".replace("\\ ", " ")
    command = [
        "nsenter",
        f"--net=/run/netns/{cluster.network.outside}",
        str(KUBE_BIN / "e2e.test"),
        f"--kubeconfig={cluster.kubeconfig}",
        f"--kubectl-path={KUBE_BIN / 'kubectl'}",
        "--provider=skeleton",
        "--node-os-distro=debian",
        f"--num-nodes={len(cluster.nodes)}",
        f"--report-dir={folder}",
        "--ginkgo.no-color",
        "--ginkgo.silence-skips",
        f"--ginkgo.timeout={timeout:.0f}s",
        f"--ginkgo.focus={focus}",
    ]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log), folder


def _finish(
    names: list[str], process: subprocess.Popen[Any], folder: Path, timeout: float
) -> dict[str, Result]:
    process.wait(timeout + 120)
    # Each process reports the specs of all others as skipped.
    return {name: result for name, result in _read(folder) if name in names}


def _read(folder: Path) -> Iterable[tuple[str, Result]]:
    for case in ElementTree.parse(folder / "junit_01.xml").iter("testcase"):
        name = case.get("name", "").removeprefix("[It] ")
        outcome, message = Outcome.PASSED, ""
        for kind in ("failure", "error", "skipped"):
            if (output := case.find(kind)) is None:
                continue
            message = output.get("message", "").removeprefix("skipped").removeprefix(" - ")
            if kind != "skipped":
                outcome = Outcome.FAILED
            else:
                outcome = Outcome.SKIPPED if message else Outcome.NOT_REACHED
            break
        yield name, Result(outcome, float(case.get("time", "0")), message)
