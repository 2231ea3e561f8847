"""The agent: from its start to everything programmed, and from an event to the maps."""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import time
from pathlib import Path

from tests.lab import Agent, Lab, LabNode
from tools.bench.results import Result, at_most
from tools.bench.sockets import start_api

SERVICES, ENDPOINTS = 10_000, 10
CHANGES_A_SECOND, CHURN_SECONDS = 1000.0, 10.0
_TICK = os.sysconf("SC_CLK_TCK")


def cold_start(node: LabNode, url: str) -> tuple[Agent, list[Result]]:
    began = time.monotonic()
    agent = node.agent("--master", url).start(wait=False)
    while "programs are attached" not in agent.text:
        assert time.monotonic() - began < 60, agent.text
        time.sleep(0.005)
    took = time.monotonic() - began
    assert agent.process is not None
    fields = Path(f"/proc/{agent.process.pid}/stat").read_text().rpartition(")")[2].split()
    cpu = sum(map(int, fields[11:15])) / _TICK
    status = Path(f"/proc/{agent.process.pid}/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1000  # type: ignore[index]
    what = f"{SERVICES} Services x {ENDPOINTS} endpoints"
    return agent, [
        at_most("cold start, exec to programmed and attached", took, "s", 3.0, what),
        at_most("peak memory of the agent", peak, "MB", 150.0, "VmHWM, 1 MB = 1000 kB"),
        at_most("CPU, the compiler's process included", cpu, "s", 3.0),
    ]


def restart(node: LabNode, url: str, agent: Agent) -> list[Result]:
    """Adoption: nothing is compiled and nothing written."""
    agent.stop()
    began = time.monotonic()
    again = node.agent("--master", url).start()
    return [
        Result("restart, exec to everything compared", time.monotonic() - began, "s", detail=again.log.name)
    ]


def _churn(url: str) -> dict[str, float]:
    """Changes made, and the seconds that they took: more than asked for where the stand-in cannot keep up."""
    host = url.partition("://")[2]
    connection = http.client.HTTPConnection(host, timeout=CHURN_SECONDS * 3 + 30)
    connection.request("POST", f"/control/churn?rate={CHANGES_A_SECOND}&seconds={CHURN_SECONDS}")
    answer: dict[str, float] = json.loads(connection.getresponse().read())
    return answer


def latency(node: LabNode, url: str, agent: Agent) -> list[Result]:
    before = _histogram(agent)
    made = node.call(_churn, url, timeout=CHURN_SECONDS * 3 + 60)
    deadline = time.monotonic() + 10
    # Changes that wait in the agent are the slow ones: without them the result would flatter.
    while (after := _histogram(agent))[math.inf] - before[math.inf] < made["changes"]:
        assert time.monotonic() < deadline, "the agent does not catch up"
        time.sleep(0.1)
    counts = [(bound, after[bound] - before[bound]) for bound in sorted(after)]
    total = counts[-1][1]
    found = []
    for quantile, goal in ((0.5, None), (0.99, 10.0)):
        bound = next(b for b, count in counts if count >= quantile * total)
        what = f"event to map write, p{quantile * 100:g}"
        detail = f"upper bound of the bucket; {total:.0f} changes at {total / made['seconds']:.0f}/s"
        value = bound * 1000
        if goal is None:
            found.append(Result(what, value, "ms", detail=detail))
        else:
            found.append(at_most(what, value, "ms", goal, detail))
    return found


def _histogram(agent: Agent) -> dict[float, float]:
    _, text = agent.http("/metrics", 10249)
    pattern = r'^ebpfproxy_event_to_map_seconds_bucket\{le="([^"]+)"\} (\S+)$'
    return {float(bound): float(count) for bound, count in re.findall(pattern, text, re.M)}


def run() -> list[Result]:
    with Lab() as lab:
        node = lab.node("node-a")
        url = start_api(node, SERVICES, endpoints=ENDPOINTS)
        agent, results = cold_start(node, url)
        results += latency(node, url, agent)
        return results + restart(node, url, agent)
