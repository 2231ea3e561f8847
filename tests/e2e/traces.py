"""Runs of ``ebpfproxy trace``, and what they and the programs say."""

from __future__ import annotations

import itertools
import json
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ebpfproxy.datapath.programs.attach import attachments
from ebpfproxy.datapath.programs.devices import link_attachments
from tests.e2e.outside_client import OutsideClientCluster
from tests.e2e.two_node_cluster import SERVICE_IPS
from tests.lab import Agent, LabNode

WEB = SERVICE_IPS["v4"]
Row = dict[str, Any]
_numbers = itertools.count()


class Trace:
    """A running ``ebpfproxy trace -o json``."""

    def __init__(self, node: LabNode, *arguments: str) -> None:
        command = ["trace", "--bpf-root", str(node.bpf_root), "-o", "json", *arguments]
        # A pipe that nobody reads would hold it up.
        self._output = node.lab.folder / f"trace-{next(_numbers)}.json"
        with self._output.open("wb") as output:
            self.process = node.start_command(command, stdout=output, stderr=-1)
        assert self.process.stderr is not None
        said = self.process.stderr.readline()
        assert said == b"tracing\n", said + self.process.stderr.read()
        self.said = ""

    def end(self) -> list[Row]:
        """Ends the command, and returns all lines that it has printed."""
        # SIGINT is ignored in background jobs of a shell, and in what they start.
        self.process.send_signal(signal.SIGTERM)
        self.said = self.process.communicate(timeout=20)[1].decode()
        return self.shown()

    def shown(self) -> list[Row]:
        """The complete lines so far."""
        return [json.loads(line) for line in self._output.read_text().splitlines(True) if line.endswith("\n")]


@contextmanager
def trace_during(node: LabNode, *arguments: str) -> Iterator[list[Row]]:
    """Runs a trace during the block; the list has its lines afterwards."""
    trace = Trace(node, *arguments)
    rows: list[Row] = []
    yield rows
    rows += trace.end()


def outcomes_of(rows: list[Row]) -> list[tuple[str, str, str, str]]:
    return [(row["kind"], row["reason"], row["service"], row["frontend"]) for row in rows]


def programs(cluster: OutsideClientCluster) -> dict[str, int | None]:
    """The ids of the programs at all hooks and devices."""
    pins = cluster.a.bpf_root / "ebpfproxy"
    found: dict[str, int | None] = {each.hook: each.program_id for each in attachments(pins)}
    return found | {f"{d.ifindex} {d.direction}": d.program_id for d in link_attachments(pins)}


def reports(agent: Agent) -> bool:
    """True if the programs that report are attached, or their replacement is not in the log yet."""
    on, off = (agent.text.count(f"replaced programs report_decisions={each}") for each in (True, False))
    return on > off


def connect_again(host: str, port: int, times: int) -> None:
    """Each connect() of a datagram socket is a decision, and sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _ in range(times):
            sock.connect((host, port))
