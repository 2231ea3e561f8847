"""Pod to pod, directly and through the ClusterIP, in turns: what the Service costs.

Direct and Service load go to different backend pods of one node. Short rounds alternate (A B, B A, …), and
the ratio is the median of the pairs' own ratios: a machine that slows down for a second slows both of a
pair. Clients run on the first CPU, servers on the last.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.bench.results import Result, at_least
from tests.lab import Lab, LabNode, Pod

PORT = 7777
IPERF_PORT = 5201
SERVICE = "10.96.250.10"
MODES = {
    "connect": "connect + close",
    "crr": "connect + request + close",
    "rr": "request/response on one connection",
    "udp": "UDP request, unconnected socket",
}
RATIO, THROUGHPUT_RATIO = 0.98, 0.99
FIRST_CPU = ["taskset", "-c", "0"]
LAST_CPU = ["taskset", "-c", str((os.cpu_count() or 1) - 1)]


def build(folder: Path) -> Path:
    """Compiles the load generator."""
    program = folder / "load"
    source = Path(__file__).with_name("load.c")
    subprocess.run(
        ["clang", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(program), str(source)], check=True
    )
    return program


def rate(pod: Pod, program: Path, mode: str, seconds: float, host: str) -> float:
    """Operations a second."""
    count, took = pod.run([*FIRST_CPU, str(program), mode, host, str(PORT), str(seconds)]).split()
    return int(count) / float(took)


def throughput(pod: Pod, seconds: float, host: str) -> float:
    """Gbit/s of one TCP stream."""
    command = [
        *FIRST_CPU,
        "iperf3",
        "-J",
        "-c",
        host,
        "-p",
        str(IPERF_PORT),
        "-t",
        str(max(1, round(seconds))),
    ]
    report = json.loads(pod.run(command))
    return float(report["end"]["sum_received"]["bits_per_second"]) / 1e9


class Bench:
    def __init__(self, lab: Lab, program: Path, services: int) -> None:
        self.node: LabNode = lab.node(f"node-{services}")
        self.client = self.node.pod("client")
        self.direct = self.node.pod("direct")
        self.behind = self.node.pod("behind")
        self.program = program
        for pod in (self.direct, self.behind):
            server = pod.popen([*LAST_CPU, str(program), "server", str(PORT)], stdout=subprocess.PIPE)
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            pod.popen([*LAST_CPU, "iperf3", "-s", "-p", str(IPERF_PORT)], stdout=subprocess.DEVNULL)
        url = start_api(self.node, services, f"{SERVICE}={self.behind.address}")
        self.node.agent("--master", url).start()

    def interleaved(self, rounds: int, measure: Callable[[str], float]) -> list[tuple[float, float]]:
        """Pairs of the direct and the Service's rate."""
        pairs = []
        order = [self.direct.address, SERVICE]
        for _ in range(rounds):
            found = {host: measure(host) for host in order}
            pairs.append((found[self.direct.address], found[SERVICE]))
            order.reverse()
        return pairs


def start_api(node: LabNode, services: int, bench_service: str = "", *, endpoints: int = 10) -> str:
    """The API stand-in in the node's namespace; its URL."""
    command = [sys.executable, "-m", "tests.apiserver", "--services", str(services), "--node", node.name]
    command += ["--endpoints", str(endpoints)]
    if bench_service:
        command += ["--bench-service", bench_service]
    process = node.popen(command, join_cgroup=False, stdout=subprocess.PIPE)
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()


def run(seconds: float, rounds: int) -> list[Result]:
    results = []
    with tempfile.TemporaryDirectory() as folder, Lab() as lab:
        program = build(Path(folder))
        for services in (1, 10_000):
            bench = Bench(lab, program, services)
            label = f"{services} Service{'s' if services > 1 else ''}"
            for mode, name in MODES.items():
                pairs = bench.interleaved(rounds, partial(rate, bench.client, program, mode, seconds))
                results.append(_ratio(f"{name}, {label}", pairs, RATIO, "/s"))
            pairs = bench.interleaved(max(3, rounds // 4), partial(throughput, bench.client, 1.0))
            results.append(_ratio(f"throughput, {label}", pairs, THROUGHPUT_RATIO, " Gbit/s"))
    return results


def _ratio(what: str, pairs: list[tuple[float, float]], goal: float, unit: str) -> Result:
    """The median of the pairs' ratios, with the range that holds half of them."""
    ratios = [through / direct for direct, through in pairs]
    low, _, high = statistics.quantiles(ratios, n=4)
    direct, through = (statistics.median(values) for values in zip(*pairs, strict=True))
    detail = f"half of the pairs in {low:.3f} to {high:.3f}; {direct:.5g} → {through:.5g}{unit}"
    return at_least(what, statistics.median(ratios), goal, detail)
