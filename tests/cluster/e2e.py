"""The Kubernetes e2e suite: which of its specs concern a service proxy, how they are run, what came out.

``e2e.test`` runs one spec after the other. Most of a spec is waiting, so several processes share the specs.
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

#: Groups of specs that a service proxy makes pass or fail.
FOCUS = re.compile(
    r"\[sig-network\] (Conntrack|Connectivity|DNS HostNetwork|EndpointSlice|HostPort|KubeProxy|NoSNAT|Networking"
    r"|Service|Topology|Traffic|kube-proxy|\[Feature:IPv6DualStack\])"
)
#: A cloud's load balancers, the Internet, SCTP sockets, gates that are off, ssh to nodes: not to be had here.
SKIP = re.compile(
    r"\[Feature:(?!IPv6DualStack|Traffic)|LoadBalancer|Internet|restarting|\[Feature:SCTP|\[Serial\]|\[Disruptive\]"
)
#: Seconds that specs take, by parts of their names, where they are no usual ones.
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
    #: Failed beside others, passed alone.
    PASSED_ALONE = "passed when run again, alone"
    FAILED = "failed"
    #: The spec itself says why it does not run here.
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
    """What ``KUBE_BIN`` lacks for running specs, as a sentence, or nothing."""
    lacking = [name for name in ("e2e.test", "agnhost", "kube-proxy") if not has(name)]
    return f"KUBE_BIN ({KUBE_BIN}) has no {', '.join(lacking)}" if lacking else ""


def specs(focus: re.Pattern[str] = FOCUS, skip: re.Pattern[str] = SKIP) -> list[str]:
    """The names of the specs, from a dry run of the binary."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--ginkgo.dry-run", "--ginkgo.focus=sig-network", f"--report-dir={folder}"]
        subprocess.run([str(KUBE_BIN / "e2e.test"), *arguments], check=True, capture_output=True)
        names = [name for name, result in _read(Path(folder)) if result.outcome is Outcome.PASSED]
    return [name for name in names if focus.search(name) and not skip.search(name)]


def shares(names: Iterable[str], count: int = _SHARDS) -> list[list[str]]:
    """Deals specs to ``count`` processes, so that all take about as long; none of them is empty."""
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
    """Runs the specs by these names, and what failed or was not reached in time again, alone.

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
    # A common beginning lets Go's matcher skip what cannot match: 8,000 texts in a second, not in twenty.
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
    # To each process the specs of all others are skipped ones.
    return {name: result for name, result in _read(folder) if name in names}


def _read(folder: Path) -> Iterable[tuple[str, Result]]:
    for case in ElementTree.parse(folder / "junit_01.xml").iter("testcase"):
        name = case.get("name", "").removeprefix("[It] ")
        outcome, message = Outcome.PASSED, ""
        for kind in ("failure", "error", "skipped"):
            if (said := case.find(kind)) is None:
                continue
            message = said.get("message", "").removeprefix("skipped").removeprefix(" - ")
            if kind != "skipped":
                outcome = Outcome.FAILED
            else:
                outcome = Outcome.SKIPPED if message else Outcome.NOT_REACHED
            break
        yield name, Result(outcome, float(case.get("time", "0")), message)
