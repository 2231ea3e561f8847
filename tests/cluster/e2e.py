"""The Kubernetes e2e suite: which of its specs concern a service proxy, how they are run, what came out.

``e2e.test`` runs one spec after the other. Most of a spec is waiting, so several processes share the specs.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from tests.cluster.binaries import KUBE_BIN
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
_SHARDS = 7
_PREFIX = "[sig-network] "


class Outcome(Enum):
    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


class Result(NamedTuple):
    outcome: Outcome
    seconds: float
    message: str


def specs(focus: re.Pattern[str] = FOCUS, skip: re.Pattern[str] = SKIP) -> list[str]:
    """The names of the specs, from a dry run of the binary."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--ginkgo.dry-run", "--ginkgo.focus=sig-network", f"--report-dir={folder}"]
        subprocess.run([str(KUBE_BIN / "e2e.test"), *arguments], check=True, capture_output=True)
        names = [name for name, result in _read(Path(folder)) if result.outcome is not Outcome.SKIPPED]
    return [name for name in names if focus.search(name) and not skip.search(name)]


def run(cluster: Cluster, label: str, names: list[str], *, timeout: float = 1500) -> dict[str, Result]:
    """Runs the specs by these names; logs and JUnit files are in the cluster's folder, by ``label``."""
    processes = []
    for number in range(_SHARDS):
        share = names[number::_SHARDS]
        if not share:
            continue
        folder = cluster.folder / f"e2e-{label}-{number}"
        folder.mkdir()
        # A common beginning lets Go's matcher skip what cannot match: 8,000 texts in a second, not in twenty.
        rest = "|".join(re.escape(name.removeprefix(_PREFIX)).replace("\\ ", " ") for name in share)
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
        log = (folder / "log").open("wb")
        processes.append((subprocess.Popen(command, stdout=log, stderr=log), folder, set(share)))
    found: dict[str, Result] = {}
    for process, folder, own in processes:
        process.wait(timeout + 120)
        # To each process the specs of all others are skipped ones.
        found |= {name: result for name, result in _read(folder) if name in own}
    return found


def _read(folder: Path) -> Iterable[tuple[str, Result]]:
    for case in ElementTree.parse(folder / "junit_01.xml").iter("testcase"):
        name = case.get("name", "").removeprefix("[It] ")
        bad = case.find("failure")
        if bad is None:
            bad = case.find("error")
        outcome = Outcome.PASSED
        if bad is not None:
            outcome = Outcome.FAILED
        elif case.find("skipped") is not None:
            outcome = Outcome.SKIPPED
        message = bad.get("message", "") if bad is not None else ""
        yield name, Result(outcome, float(case.get("time", "0")), message)
