"""Pod to pod, directly and through the ClusterIP, in turns: what the Service costs.

Direct and Service load go to different backend pods of one node. Rounds alternate (A B B A …), so that
what else the machine does hits both alike; the ratio is of the medians.
"""

from __future__ import annotations

import json
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
    count, took = pod.run([str(program), mode, host, str(PORT), str(seconds)]).split()
    return int(count) / float(took)


def throughput(pod: Pod, seconds: float, host: str) -> float:
    """Gbit/s of one TCP stream."""
    command = ["iperf3", "-J", "-c", host, "-p", str(IPERF_PORT), "-t", str(max(1, round(seconds)))]
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
            server = pod.popen([str(program), "server", str(PORT)], stdout=subprocess.PIPE)
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            pod.popen(["iperf3", "-s", "-p", str(IPERF_PORT)], stdout=subprocess.DEVNULL)
        url = start_api(self.node, services, f"{SERVICE}={self.behind.address}")
        self.node.agent("--master", url).start()

    def interleaved(self, rounds: int, measure: Callable[[str], float]) -> tuple[list[float], list[float]]:
        found: dict[str, list[float]] = {self.direct.address: [], SERVICE: []}
        order = [self.direct.address, SERVICE]
        for _ in range(rounds):
            for host in order:
                found[host].append(measure(host))
            order.reverse()
        return found[self.direct.address], found[SERVICE]


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
                direct, through = bench.interleaved(
                    rounds, partial(rate, bench.client, program, mode, seconds)
                )
                results.append(_ratio(f"{name}, {label}", direct, through, RATIO, "/s"))
            direct, through = bench.interleaved(rounds, partial(throughput, bench.client, seconds))
            results.append(_ratio(f"throughput, {label}", direct, through, THROUGHPUT_RATIO, " Gbit/s"))
    return results


def _ratio(what: str, direct: list[float], through: list[float], goal: float, unit: str) -> Result:
    a, b = statistics.median(direct), statistics.median(through)
    spread = statistics.pstdev(direct) / a
    detail = f"direct {a:.6g}{unit}, Service {b:.6g}{unit}; direct varies by {spread:.1%}"
    return at_least(what, b / a, goal, detail)
