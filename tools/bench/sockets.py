"""Pod to pod, directly and through the ClusterIP, in turns: what the Service costs.

Three ways in each round, in a new order every time, so that what else the machine does hits all alike:
to one pod, to another pod, and to the Service in front of that one. Service against the first pod is
the result; the second pod against the first is a result of no change, and shows what noise alone does.

Client and servers share one CPU. Left to the scheduler, which moves them together and apart, the rate of
requests on one connection varies by 40 % and the ratio of no change by 10 %; on one CPU by 2 % and 0.5 %.
It is the strictest way, too: no waiting for a wake-up hides what a hook costs.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from tests.lab import Lab, LabNode, Pod
from tests.lab.spaces import Space
from tools.bench import ratio
from tools.bench.results import Result, at_least

PORT = 7777
IPERF_PORT = 5201
SERVICE = "10.96.250.10"
MODES = {
    "connect": "connect + close",
    "crr": "connect + request + close",
    "rr": "request/response on one connection",
    "udp": "UDP request, unconnected socket",
    "udpc": "UDP request, connected socket",
}
RATIO, THROUGHPUT_RATIO = 0.98, 0.99
IPERF_SECONDS = 1
ONE_CPU = max(os.sched_getaffinity(0))
ON_ONE_CPU = ["taskset", "-c", str(ONE_CPU)]


def build(folder: Path) -> Path:
    """Compiles the load generator."""
    program = folder / "load"
    source = Path(__file__).with_name("load.c")
    subprocess.run(
        ["clang", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(program), str(source)], check=True
    )
    return program


def rate(pod: Space, program: Path, mode: str, seconds: float, host: str, port: int = PORT) -> float:
    """Operations a second."""
    count, took = pod.run([*ON_ONE_CPU, str(program), mode, host, str(port), str(seconds)]).split()
    return int(count) / float(took)


def throughput(pod: Space, host: str, port: int = IPERF_PORT) -> float:
    """Gbit/s of one TCP stream."""
    command = ["iperf3", "-J", "-c", host, "-p", str(port), "-t", str(IPERF_SECONDS)]
    report = json.loads(pod.run([*ON_ONE_CPU, *command]))
    return float(report["end"]["sum_received"]["bits_per_second"]) / 1e9


def serve(pod: Pod, program: Path, port: int = PORT, *, join_cgroup: bool = True) -> None:
    """The load generator's server, also for IPv6."""
    command = [*ON_ONE_CPU, str(program), "server", str(port)]
    server = pod.popen(command, join_cgroup=join_cgroup, stdout=subprocess.PIPE)
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"


def serve_all(pod: Pod, program: Path) -> None:
    """The load generator's server, and iperf3's."""
    serve(pod, program)
    pod.popen([*ON_ONE_CPU, "iperf3", "-s", "-p", str(IPERF_PORT)], stdout=subprocess.DEVNULL)


class Bench:
    def __init__(self, lab: Lab, program: Path, services: int) -> None:
        self.node: LabNode = lab.node(f"node-{services}")
        self.client = self.node.pod("client")
        self.direct = self.node.pod("direct")
        self.behind = self.node.pod("behind")
        self.program = program
        for pod in (self.direct, self.behind):
            serve_all(pod, program)
        url = start_api(self.node, services, (f"{SERVICE}={self.behind.address}",))
        self.node.agent("--master", url).start()

    def interleaved(self, rounds: int, measure: Callable[[str], float]) -> list[list[float]]:
        """Samples of each way, by round: to the first pod, to the second, to the Service."""
        return in_turns([self.direct.address, self.behind.address, SERVICE], rounds, measure)


W = TypeVar("W")
S = TypeVar("S")


def in_turns(ways: Sequence[W], rounds: int, measure: Callable[[W], S]) -> list[list[S]]:
    """Samples of each way, by round; each round takes them in an order of its own."""
    found: list[list[S]] = [[] for _ in ways]
    order = random.Random(0)
    for _ in range(rounds):
        for i in order.sample(range(len(ways)), k=len(ways)):
            found[i].append(measure(ways[i]))
    return found


def start_api(
    node: LabNode,
    services: int,
    bench_services: tuple[str, ...] = (),
    *,
    node_ports: tuple[str, ...] = (),
    endpoints: int = 10,
) -> str:
    """The API stand-in in the node's namespace; its URL."""
    command = [sys.executable, "-m", "tests.apiserver", "--services", str(services), "--node", node.name]
    command += ["--endpoints", str(endpoints)]
    for each in bench_services:
        command += ["--bench-service", each]
    for each in node_ports:
        command += ["--bench-node-port", each]
    process = node.popen(command, join_cgroup=False, stdout=subprocess.PIPE)
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()


def run(seconds: float, rounds: int) -> list[Result]:
    results = []
    with tempfile.TemporaryDirectory() as folder, Lab(executes_agents=True) as lab:
        program = build(Path(folder))
        for services in (1, 10_000):
            bench = Bench(lab, program, services)
            label = f"{services} Service{'s' if services > 1 else ''}"
            for mode, name in MODES.items():
                samples = bench.interleaved(rounds, partial(rate, bench.client, program, mode, seconds))
                results.append(compared(f"{name}, {label}", samples, RATIO, "/s"))
            samples = bench.interleaved(rounds // 2 or 1, partial(throughput, bench.client))
            results.append(compared(f"throughput, {label}", samples, THROUGHPUT_RATIO, " Gbit/s"))
    return results


def compared(what: str, samples: list[list[float]], goal: float, unit: str) -> Result:
    """Samples of a direct way, of another that should be like it, and of the one in question."""
    direct, other, through = samples
    found, none = ratio.of_medians(through, direct), ratio.of_medians(other, direct)
    rates = f"{statistics.median(direct):.6g} → {statistics.median(through):.6g}{unit}"
    detail = f"95 % [{found.low:.3f} {found.high:.3f}]; no change: {none}; {rates}"
    return at_least(what, found.value, goal, detail)
