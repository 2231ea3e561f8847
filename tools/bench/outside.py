"""A client outside, through a NodePort and by route to a pod, in turns: what the packet path costs.

Every packet passes node-a, there and back, whichever way it takes: node-a forwards to a pod of its own, or on
to node-b, which answers through node-a. So a direct packet and a translated one see the same devices, and
the difference is the translation alone. Three pods on each node: two reached by route (the second shows
what noise alone does) and one behind the NodePort, for conntrack tuples of both ways must not meet.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.lab import Lab, LabNode, ethtool
from tests.lab.lab import OUTSIDE, routes_of
from tools.bench.results import Result
from tools.bench.sockets import (
    IPERF_PORT,
    PORT,
    build,
    compared,
    in_turns,
    rate,
    serve_all,
    start_api,
    throughput,
)

MODES = {
    "connect": "connect + close",
    "crr": "connect + request + close",
    "rr": "request/response on one connection",
    "udpc": "small UDP packets, one flow",
}
NODE_PORTS = {"local": 30777, "remote": 31777}
#: The goal is for the connect rate with a remote backend.
GOAL = 0.95


class Way(NamedTuple):
    host: str
    port: int
    iperf_port: int


class Bench:
    def __init__(self, lab: Lab, program: Path, services: int, *options: str) -> None:
        self.a, self.b = lab.node("node-a"), lab.node("node-b")
        pods = {"local": self._pods(self.a, program), "remote": self._pods(self.b, program)}
        self.client = lab.outside
        if XDP[0] in options:
            # Hardware computes checksums before XDP sees the frame; a veth leaves them to the receiver.
            for space in (self.client, *self.a.pods, *self.b.pods):
                space.call(ethtool.turn, "eth0", {"tx-checksum": False})
        self.client.route("10.244.2.0/24", self.a)
        with routes_of(self.b.netns) as routes:
            index = routes.link_lookup(ifname="eth0")[0]
            routes.route("add", dst=f"{OUTSIDE}/32", gateway=self.a.address, oif=index)
        url = start_api(
            self.a,
            services,
            node_ports=tuple(f"{NODE_PORTS[where]}={found[2]}" for where, found in pods.items()),
        )
        self.a.agent("--master", url, *options).start()
        self.ways = {
            where: [
                Way(found[0], PORT, IPERF_PORT),
                Way(found[1], PORT, IPERF_PORT),
                Way(self.a.address, NODE_PORTS[where], NODE_PORTS[where] + 1),
            ]
            for where, found in pods.items()
        }

    @staticmethod
    def _pods(node: LabNode, program: Path) -> list[str]:
        pods = [node.pod(name) for name in ("direct", "other", "behind")]
        for pod in pods:
            serve_all(pod, program)
        return [pod.address for pod in pods]


BYPASS = ("--bypass-netfilter",)
XDP = ("--xdp", "native")


def run(seconds: float, rounds: int) -> list[Result]:
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        for way, options in (("", ()), (", bypass", BYPASS), (", XDP", XDP)):
            for services in (1, 10_000):
                label = f"{services} Service{'s' if services > 1 else ''}{way}"
                with Lab(takes_xdp=options == XDP, executes_agents=True) as lab:
                    bench = Bench(lab, program, services, *options)
                    results += _compare(bench, program, label, seconds, rounds)
    return results


def _compare(bench: Bench, program: Path, label: str, seconds: float, rounds: int) -> Iterator[Result]:
    for where, ways in bench.ways.items():
        for mode, name in MODES.items():
            measure = partial(_rate, bench, program, mode, seconds)
            what = f"{name}, {where} backend, {label}"
            yield compared(what, in_turns(ways, rounds, measure), GOAL, "/s")
        measure = partial(_throughput, bench)
        what = f"throughput, {where} backend, {label}"
        yield compared(what, in_turns(ways, rounds // 2 or 1, measure), GOAL, " Gbit/s")


def _rate(bench: Bench, program: Path, mode: str, seconds: float, way: Way) -> float:
    return rate(bench.client, program, mode, seconds, way.host, way.port)


def _throughput(bench: Bench, way: Way) -> float:
    return throughput(bench.client, way.host, way.iperf_port)
