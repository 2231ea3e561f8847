"""Explanations of every case against the programs themselves, which run on a packet (BPF_PROG_TEST_RUN).

An agent has programmed the case; the client is outside, or a pod whose sockets are left to packets.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6

from ebpfproxy.datapath.dump import Dump, open_maps
from tests.lab import Lab, LabNode, command
from tests.lab.waiting import until
from tests.packets.test_flows import segment
from tests.packets.wire import DROP, PASS, REDIRECT, Result, Wire, ip_of
from tests.services.test_cases import CASES

pytestmark = pytest.mark.root

Json = dict[str, Any]
#: A first choice among so many is enough: the used set itself is compared with the expected one.
PACKETS = 4


class Row(NamedTuple):
    """A row of an expected file. ``backends`` are addresses with ports, or ``dropped`` or ``rejected``."""

    service: str
    kind: str
    scope: str
    frontend: str
    backends: frozenset[str]


def expected_rows(case: Path) -> set[Row]:
    found = set()
    for line in case.with_suffix(".expected").read_text().splitlines()[1:]:
        words = line.split()
        if len(words) < 5 or words[2] not in ("internal", "external"):
            break
        service, kind, scope, frontend, *backends = words
        names = frozenset(each.removesuffix("(terminating)") for each in backends)
        found.add(Row(service, kind, scope, frontend, names))
    return found


class Node:
    """node-a with an agent that reads one case at a time, a pod, and a host outside."""

    def __init__(self, lab: Lab) -> None:
        self.node: LabNode = lab.node("node-a")
        self.pod = self.node.pod("client")
        self.outside = lab.outside
        self.folder = lab.folder / "manifests"
        self.folder.mkdir()
        self.node.agent("--no-pod-sockets", manifests=self.folder).start()
        self.wire = Wire(self.node)
        self._ports = itertools.count(20000)

    def load(self, case: Path) -> None:
        """Programs the case, and waits until the maps have its rows."""
        beside = self.folder / ".case.yaml"
        beside.write_text(case.read_text())
        beside.rename(self.folder / "case.yaml")
        wanted = {
            (row.frontend, row.scope, row.backends - {"dropped", "rejected"}) for row in expected_rows(case)
        }
        until(lambda: self._rows() == wanted, f"the maps have {self._rows()}, and should have {wanted}", 10)

    def _rows(self) -> set[tuple[str, str, frozenset[str]]]:
        maps = open_maps(self.node.bpf_root)
        try:
            return {
                (row.frontend, row.scope, frozenset(each.address for each in row.backends))
                for row in Dump(maps).frontends()
            }
        finally:
            maps.close()

    def explain(self, rows: list[Row]) -> list[Json]:
        """Explains each frontend to the client of its scope: the pod, or the host outside."""
        answers = []
        for done in self.node.call(_run_all, [self._question(row) for row in rows]):
            assert done.errors == ""
            answers += json.loads(done.output)["explanations"]
        return answers

    def _question(self, row: Row) -> list[str]:
        host, port, protocol = split(row.frontend)
        is_v6 = ":" in host
        client = self.outside.address6 if is_v6 else self.outside.address
        if row.scope == "internal":
            client = f"shop/{self.pod.name}"
        if row.kind == "NodePort":
            host = self.node.address6 if is_v6 else self.node.address
        target = f"[{host}]:{port}" if is_v6 else f"{host}:{port}"
        roots = ["--bpf-root", str(self.node.bpf_root), "--cni-results", str(self.node.cni_results)]
        return ["explain", client, target, "--protocol", protocol, "-o", "json", *roots]

    def send(self, place: str, target: str) -> Result:
        """A first packet from a port that no other has used, as it comes in."""
        host, port, protocol = split(target)
        client = self.pod if place == "pod" else self.outside
        is_v6 = ":" in host
        ip = (IPv6 if is_v6 else IP)(src=client.address6 if is_v6 else client.address, dst=host)
        packet = ip / segment(protocol, next(self._ports), port)
        return self.wire.ingress(packet, "p1" if place == "pod" else "eth0")


def _run_all(questions: list[list[str]]) -> list[command.Done]:
    return [command.run(arguments) for arguments in questions]


def split(frontend: str) -> tuple[str, int, str]:
    endpoint, _, protocol = frontend.rpartition("/")
    host, _, port = endpoint.rpartition(":")
    return host.strip("[]"), int(port), protocol


def destination(result: Result) -> str:
    ip = ip_of(result.packet)
    return f"[{ip.dst}]:{ip.payload.dport}" if ":" in ip.dst else f"{ip.dst}:{ip.payload.dport}"


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    command.import_commands()
    with Lab() as lab:
        made = Node(lab)
        yield made
        made.wire.close()


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_programs_do_what_was_explained(node: Node, case: Path) -> None:
    node.load(case)
    rows = list(expected_rows(case))
    places = {"internal": "pod", "external": "outside"}
    for row, answer in zip(rows, node.explain(rows), strict=True):
        assert (answer["place"], answer["hook"]) == (places[row.scope], "tc-ingress")
        assert (answer["scope"], answer["frontend"]) == (row.scope, row.kind)
        agrees(node, row, answer)


def agrees(node: Node, row: Row, answer: Json) -> None:
    used = {each["address"] for each in answer["endpoints"] if each["used"]}
    if answer["source_ranges"] != "denied":
        refused = {"refused": "rejected", "dropped": "dropped"}
        assert (used or {refused[answer["outcome"]]}) == set(row.backends), (row, answer)
    for _ in range(PACKETS):
        result = node.send(answer["place"], answer["target"])
        match answer["outcome"]:
            case "translated":
                assert result.verdict == PASS and destination(result) in used, (row, answer)
            case "refused":
                assert result.verdict == REDIRECT, (row, answer)
            case "dropped":
                assert result.verdict == DROP, (row, answer)
            case other:
                raise AssertionError(f"{other}: {row}")
