"""``python -m tools.demo``: two nodes, their pods and an agent each; real traffic, real output.

Ends with exit code 1 and what was expected and seen if anything is off.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ebpfproxy.datapath.abi import layout
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.roots import pin_folder
from ebpfproxy.services.model import Protocol
from tests.lab import Lab, LabNode, Pod, clients, manifests, servers

PORTS = [
    {"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30080},
    {"name": "dns", "port": 53, "protocol": "UDP"},
]
SLICE_PORTS = [
    {"name": "http", "port": 8080, "protocol": "TCP"},
    {"name": "dns", "port": 8053, "protocol": "UDP"},
]
IP, IP6 = "10.96.0.10", "fd00:10:96::10"
REQUESTS = 60


class Demo:
    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.folder = lab.folder / "manifests"

    def say(self, text: str, *, why: str = "") -> None:
        """A heading, and a line that says what is to be seen below it."""
        print(f"\n\033[1m# {text}\033[0m" if sys.stdout.isatty() else f"\n# {text}", flush=True)
        if why:
            print(why, flush=True)

    def expect(self, what: str, expected: Any, seen: Any) -> None:
        if expected != seen:
            raise SystemExit(f"\nDEMO FAILED: {what}\n  expected: {expected}\n  seen:     {seen}")

    def explain(self, source: str, target: str, error: str) -> None:
        """Prints the explanation, and expects what a connection has just shown."""
        node = self.lab.nodes[0]
        arguments = ["explain", source, target, "--cni-results", str(node.cni_results)]
        print(node.cli(*arguments, check=False).rstrip())
        (found,) = json.loads(node.cli(*arguments, "-o", "json", check=False))["explanations"]
        self.expect("what was explained", error, found["error"] or "connected")

    def write(self, *pods: Pod, ready: Sequence[Pod] | None = None) -> None:
        """Replaces the Service; all pods are ready unless ``ready`` names those that are."""
        documents = [
            manifests.service("web", type="NodePort", clusterIPs=[IP, IP6], ports=PORTS),
            *(
                manifests.slice_of("web", endpoints, ports=SLICE_PORTS)
                for endpoints in (
                    [manifests.endpoint(p.address, p.node.name, ready=p in (ready or pods)) for p in pods],
                    [manifests.endpoint(p.address6, p.node.name, ready=p in (ready or pods)) for p in pods],
                )
                if endpoints
            ),
        ]
        manifests.write(self.folder / "web.yaml", *documents)

    def spread(self, client: Pod, expected: set[str]) -> None:
        """Sixty requests over each protocol and family, and who answered them."""
        rows: list[tuple[str, Callable[..., Counter[str]], str, int]] = [
            ("TCP ", clients.spread_tcp, IP, 80),
            ("UDP ", clients.spread_udp, IP, 53),
            ("TCP ", clients.spread_tcp, IP6, 80),
            ("UDP ", clients.spread_udp, IP6, 53),
        ]
        for label, ask, host, port in rows:
            found = client.call(ask, host, port, REQUESTS)
            shown = "  ".join(f"{name}: {found[name]:2}" for name in sorted(found))
            print(f"{label} {host:>15} port {port:<3} {REQUESTS} requests → {shown}")
            self.expect(f"{label.strip()} to {host}: who answers", expected, set(found))

    def until_spread(self, client: Pod, expected: set[str]) -> float:
        """Milliseconds until new connections go to exactly these."""
        began = time.monotonic()
        seen: Any = None
        while seen != expected:
            if time.monotonic() - began > 5:
                self.expect("backends within 5 s of a change", expected, seen)
            try:
                seen = set(client.call(clients.spread_tcp, IP, 80, 20))
            except ConnectionRefusedError as error:
                seen = error
        return (time.monotonic() - began) * 1000

    def trace(self, client: Pod) -> list[str]:
        """The lines of a connection that gets a backend, and of one to a port that the Service does not have."""
        node = client.node
        command = [
            sys.executable,
            "-m",
            "ebpfproxy",
            "trace",
            "--bpf-root",
            str(node.bpf_root),
            "--count",
            "2",
        ]
        traced = node.popen(command, join_cgroup=False, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert traced.stderr is not None
        # The agent has replaced its programs once it says so.
        self.expect("start of trace", b"tracing\n", traced.stderr.readline())
        client.call(clients.ask_tcp, IP, 80)
        client.call(clients.connect_error, IP, 81)
        lines = traced.communicate(timeout=30)[0].decode().splitlines()
        self.expect("lines of trace", [True, True], ["⇒" in lines[0], "✗ refused: no-such-port" in lines[-1]])
        return lines


def run(demo: Demo) -> None:
    lab = demo.lab
    demo.say("A lab: two nodes, four pods, real namespaces; a Service shop/web with two backends")
    a, b = lab.node("node-a"), lab.node("node-b")
    client = a.pod("client")
    web = [a.pod("web-1"), b.pod("web-2"), b.pod("web-3")]
    for pod in web:
        servers.start(pod, pod.name, 8080, 8053)
    demo.write(*web[:2])
    # Otherwise the agent would now and then repair what is to be shown broken.
    options = ["--drift-check-seconds", "60"]
    agents = [node.agent(*options, manifests=demo.folder).start(wait=False) for node in (a, b)]
    for node in (a, b):
        print(f"{node.name} {node.address:>12} pods {', '.join(p.name for p in node.pods)}")
    for agent in agents:
        agent.wait_ready()

    demo.say("ebpfproxy service list")
    print(a.cli("service", "list").rstrip())
    rows = json.loads(a.cli("service", "list", "-o", "json"))
    demo.expect("rows of service list", 12, len(rows))

    demo.say("Requests from the pod client, spread over the backends")
    demo.spread(client, {"web-1", "web-2"})
    answer = client.call(clients.ask_tcp, IP, 80)
    print(f"getpeername() in the client: {answer['getpeername']}; the server saw {answer['peer']}")
    demo.expect("getpeername", (IP, 80), answer["getpeername"])
    answer = a.call(clients.ask_tcp, "127.0.0.1", 30080)
    print(f"NodePort 30080 on the node's own loopback: answered by {answer['name']}")

    demo.say("A client outside the cluster, through node-a's NodePort to pods of both nodes")
    found = Counter[str]()
    for _ in range(REQUESTS):
        answer = lab.outside.call(clients.ask_tcp, a.address, 30080)
        found[f"{answer['name']} (sees {answer['peer']})"] += 1
    print(
        f"{lab.outside.address} → {a.address}:30080 → "
        + "  ".join(f"{n}: {c}" for n, c in sorted(found.items()))
    )
    demo.expect("who answers outside", 2, len(found))

    demo.say("Scaled up to three backends")
    demo.write(*web)
    print(f"all three get connections after {demo.until_spread(client, {p.name for p in web}):.0f} ms")
    demo.spread(client, {p.name for p in web})

    demo.say("web-1 removed")
    demo.write(*web[1:])
    print(f"web-1 gets none after {demo.until_spread(client, {'web-2', 'web-3'}):.0f} ms")
    demo.spread(client, {"web-2", "web-3"})

    demo.say("ebpfproxy status (node-a)")
    print(a.cli("status").rstrip())
    status = json.loads(a.cli("status", "-o", "json"))
    demo.expect("health", True, status["healthy"])

    demo.say(
        "ebpfproxy trace (node-a), while the pod client connects to port 80 and to port 81",
        why="One line for each decision: the backend that a connection gets, or why it gets none.",
    )
    for line in demo.trace(client):
        print(line)

    demo.write()
    began = time.monotonic()
    while (error := client.call(clients.connect_error, IP, 80)) == "connected":
        demo.expect("refusal within 5 s", True, time.monotonic() - began < 5)
    demo.expect("error of connect()", "ECONNREFUSED", error)
    demo.say(
        f"All backends removed: connect() to {IP}:80 → {error}; ebpfproxy explain says why",
        why="Nothing is sent: what happens is read from the maps, and the reasons are those of the agent's rules.",
    )
    demo.explain("shop/client", f"{IP}:80", error)

    demo.write(*web, ready=web[1:])
    demo.until_spread(client, {p.name for p in web[1:]})
    outcome = client.call(clients.connect_error, IP, 80)
    demo.say(
        f"They are back, and web-1 is not ready: connect() to {IP}:80 → {outcome}; ebpfproxy explain",
        why="Which endpoints a connection may get, with their shares, and why it does not get the others.",
    )
    demo.explain("shop/client", f"{IP}:80", outcome)

    tamper(a)
    error = client.call(clients.connect_error, IP, 80, 0.5)
    demo.say(
        f"Somebody with root deletes the Service's entry: connect() to {IP}:80 → {error}; ebpfproxy check --repair",
        why="Sockets still find it in their cache. The agent mends the maps, by itself every few seconds.",
    )
    print(a.cli("check", "--repair").rstrip())
    checked = json.loads(a.cli("check", "-o", "json"))
    entries = [each["finding"]["what"] for each in checked["earlier"]]
    demo.expect("differences that are left", True, checked["good"])
    demo.expect("repaired entry", True, any(f"{IP}:80/TCP" in each for each in entries))
    demo.expect("connect() after the repair", "connected", client.call(clients.connect_error, IP, 80))
    print(f"connect() to {IP}:80 → connected")


def tamper(node: LabNode) -> None:
    """Deletes the frontend IP:80/TCP from the pinned map."""
    (table,) = pin_folder(node.bpf_root).glob("v*/maps/services4")
    key = layout.pack_service_key(socket.inet_aton(IP), 80, Protocol.TCP, layout.Scope.INTERNAL)
    with bpf.opened(table) as fd:
        bpf.map_delete(fd, key)


def main() -> None:
    began = time.monotonic()
    with Lab(executes_agents=True) as lab:
        run(Demo(lab))
        took = time.monotonic() - began
    print(f"\ndemo passed in {took:.1f} s; everything it made is removed")


if __name__ == "__main__":
    main()
