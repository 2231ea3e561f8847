"""Objects that nobody writes by accident: huge ones, and names that a terminal would obey, beside a Service that has to
go on working. Everything that the product prints is collected."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ebpfproxy.datapath.dump import Dump
from ebpfproxy.datapath.kernel.maps import open_pinned
from tests.lab import Agent, Lab, LabNode, cni, manifests

#: An escape sequence, one that begins with a single character, one that hides, and one that reorders letters.
EVIL = "\x1b[31mred\x9b2J\b\b\u202ereversed"
GOOD = "10.96.0.10"


def _service(name: str, **spec: Any) -> manifests.Document:
    return manifests.service(name, **spec)


def documents(ports: int, endpoints: int, annotation: int) -> Iterator[manifests.Document]:
    yield _service("good", clusterIPs=[GOOD])
    yield manifests.slice_of("good", [manifests.endpoint("10.244.1.2", "node-a")])

    many = [{"name": f"p{n}", "port": n, "protocol": "TCP"} for n in range(1, ports + 1)]
    yield _service("many-ports", clusterIPs=["10.96.0.11"], ports=many)
    targets = [{**each, "port": 8080} for each in many]
    yield manifests.slice_of("many-ports", [manifests.endpoint("10.244.1.2", "node-a")], ports=targets)

    yield _service("many-endpoints", clusterIPs=["10.96.0.12"])
    for first in range(0, endpoints, 1000):
        addresses = [f"100.{64 + (n >> 16)}.{n >> 8 & 255}.{n & 255}" for n in range(first, first + 1000)]
        yield manifests.slice_of(
            "many-endpoints",
            [manifests.endpoint(each, "node-b") for each in addresses],
            suffix=f"-{first}",
        )

    large = _service("large-annotation", clusterIPs=["10.96.0.13"])
    large["metadata"]["annotations"] = {
        "ebpfproxy.io/weights": "node/" + "x" * annotation,
        "ebpfproxy.io/lb-algorithm": EVIL + "y" * annotation,
        "other": "z" * annotation,
    }
    yield large

    # A name in each place that has one.
    yield _service(f"a{EVIL}", clusterIPs=["10.96.0.14"])
    yield _service("b", namespace=f"b{EVIL}", clusterIPs=["10.96.0.15"])
    yield _service("c", clusterIPs=["10.96.0.16"], ports=[{"name": EVIL, "port": 80, "protocol": "TCP"}])
    yield _service("d", clusterIPs=["10.96.0.17"], type=EVIL)
    yield _service("e", clusterIPs=["10.96.0.18", EVIL], externalIPs=[EVIL], loadBalancerSourceRanges=[EVIL])
    yield _service("f", clusterIPs=["10.96.0.19"], internalTrafficPolicy=EVIL, externalTrafficPolicy=EVIL)
    yield _service("g", clusterIPs=["10.96.0.20"], ports=[{"name": "x", "port": 80, "protocol": EVIL}])
    yield _service("good", clusterIPs=["10.96.0.21"], sessionAffinity=EVIL)
    evil = manifests.endpoint("10.244.1.3", f"node{EVIL}")
    evil |= {
        "zone": EVIL,
        "hints": {"forZones": [{"name": EVIL}]},
        "targetRef": {"kind": "Pod", "name": f"pod{EVIL}", "namespace": f"shop{EVIL}"},
    }
    piece = manifests.slice_of("c", [evil, manifests.endpoint(EVIL, EVIL)], suffix=EVIL)
    piece["ports"] = [{"name": EVIL, "port": 8080, "protocol": EVIL}, {"name": "", "port": 8080}]
    yield piece
    named = manifests.slice_of("h", [evil])
    yield {**named, "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}]}
    yield _service("h", clusterIPs=["10.96.0.22"])


class HostileCluster:
    """A node with an agent that reads these objects. Files are JSON: YAML of their size takes minutes."""

    def __init__(self, lab: Lab, *, ports: int, endpoints: int, annotation: int, form: str) -> None:
        self.node: LabNode = lab.node("node-a")
        self.pod = self.node.pod("backend")
        self.client = self.node.pod("client")
        self.folder = lab.folder / "manifests"
        self.folder.mkdir()
        found = list(documents(ports, endpoints, annotation))
        items = {"apiVersion": "v1", "kind": "List", "items": found}
        (self.folder / "hostile.json").write_text(json.dumps(items))
        broken = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": EVIL}, "spec": {"ports": EVIL}}
        (self.folder / f"broken{EVIL.replace('/', '')}.json").write_text(json.dumps(broken))
        self.agent: Agent = self.node.agent("--logging-format", form, manifests=self.folder)

    def start(self) -> None:
        evil = self.node.pod("evil")
        cni.write_result(self.node.cni_results, evil.netns, EVIL, (evil.address, evil.address6))
        # A device may have such a name, too; spaces, slashes and colons are refused.
        self.node.run(["ip", "link", "add", "d\x1b[31m\x9b", "type", "veth", "peer", "name", "d2"])
        self.agent.start(wait=False)
        self.agent.wait_ready(180)

    def is_served(self, address: str = GOOD) -> bool:
        """True if the Service that has to go on working has its backend."""
        maps = open_pinned(next((self.node.bpf_root / "ebpfproxy").glob("v*")))
        try:
            rows = [row for row in Dump(maps).frontends() if row.frontend == f"{address}:80/TCP"]
        finally:
            maps.close()
        return (
            [each.address for row in rows for each in row.backends] == ["10.244.1.2:8080"] * len(rows) != []
        )

    def outputs(self) -> Iterator[tuple[str, str]]:
        """What commands, pages and the log say, by name."""
        yield "log", self.agent.text
        for words in (
            "status",
            "status --verbose",
            "status -o json",
            "status -o yaml",
            "service list",
            "service list -o json",
            "backend list",
            "check",
            "check -o json",
            "affinity list",
            "conntrack list",
            "top --once",
            "top --once -o json",
            f"explain client {GOOD}:80",
            "explain client shop/h",
            "explain client shop/h -o json",
            "explain client shop/c",
            "explain client shop/d",
            "explain client shop/f",
        ):
            yield words, self._command(*words.split())
        yield "explain of an evil Service", self._command("explain", "client", f"shop/{EVIL}")
        yield "explain of an evil pod", self._command("explain", EVIL, "shop/h")
        for path in ("/metrics", "/healthz", "/configz"):
            port = 10249 if path != "/healthz" else 10256
            yield path, self.agent.http(path, port)[1]
        yield "trace", self._traced("text")
        yield "trace -o json", self._traced("json")

    def _command(self, *words: str) -> str:
        arguments = [*words, "--bpf-root", str(self.node.bpf_root)]
        if words[0] == "explain":
            arguments += ["--cni-results", str(self.node.cni_results)]
        done = self.node.run_command(arguments, timeout=600)
        return done.output + done.errors

    def _traced(self, form: str) -> str:
        """A client with an evil name asks meanwhile."""
        words = ["trace", "--bpf-root", str(self.node.bpf_root), "-o", form, "--count", "1"]
        trace = self.node.start_command(words, stdout=-1, stderr=-1)
        assert trace.stderr is not None
        said = trace.stderr.readline()
        assert said == b"tracing\n", said + trace.stderr.read()
        self.client.call(_ask_with_evil_name, GOOD)
        out, errors = trace.communicate(timeout=60)
        return str(out.decode() + errors.decode())


def _ask_with_evil_name(address: str) -> None:
    import socket  # noqa: PLC0415 - in the child alone

    Path("/proc/thread-self/comm").write_bytes(b"\x1b[31m\xff\x9b2J")
    with socket.socket() as client:
        client.settimeout(2)
        client.connect_ex((address, 80))


def unprintable(text: str) -> list[str]:
    """The lines that a terminal would not only show."""
    return [
        repr(line[:400]) for line in text.split("\n") if any(not c.isprintable() and c != "\t" for c in line)
    ]


@contextmanager
def hostile_cluster(
    *, ports: int, endpoints: int, annotation: int, form: str = "text"
) -> Iterator[tuple[HostileCluster, float]]:
    """The cluster, and the seconds until everything was programmed."""
    with Lab() as lab:
        cluster = HostileCluster(lab, ports=ports, endpoints=endpoints, annotation=annotation, form=form)
        started = time.monotonic()
        cluster.start()
        yield cluster, time.monotonic() - started
