"""The cluster of these tests: two nodes, Services of the stand-in API server, load from a pod and from outside."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlencode

from tests.apiserver import objects
from tests.faults import losses, report
from tests.faults.load import KINDS, PAUSE, Load, Result, Way, WrongBackendError
from tests.lab import Agent, Lab, LabNode, Pod, servers
from tests.lab.lab import OUTSIDE
from tests.lab.processes import Child
from tests.lab.waiting import READY_SECONDS, until

PORT, UDP_PORT = 80, 53
#: The last parts of Services' addresses, in both families.
WEB, OTHER, CHECKED, FURTHER = 10, 20, 30, 40
NODE_PORTS = {WEB: (30080, 30053), OTHER: (30180, 30153)}
#: The health check port of a Service with local endpoints on node a.
HEALTH_PORT = 32000
#: Services beside, whose endpoints change.
CHURNED, ENDPOINTS = 40, 5

#: An endpoint that is removed for a moment may be away for longer where a fault hides that it is back.
KEEPS_CONNECTIONS = ("--stale-tcp-seconds", "600")

Item = dict[str, Any]

#: The suffixes of slices' names, and whose addresses they have.
_SLICES: tuple[tuple[str, Callable[[Pod], str]], ...] = (
    ("x7k2p", lambda pod: pod.address),
    ("ipv6", lambda pod: pod.address6),
)


class Faulted:
    """``a`` has the agent; ``w1`` and ``x1`` are servers on it, ``w2`` and ``x2`` on ``b``."""

    def __init__(self, lab: Lab, *arguments: str) -> None:
        """``arguments``: further ones of the API server."""
        self.lab = lab
        self.a: LabNode = lab.node("node-a")
        self.b: LabNode = lab.node("node-b")
        self.client: Pod = self.a.pod("client")
        self.pods = {
            name: node.pod(name)
            for name, node in (("w1", self.a), ("w2", self.b), ("x1", self.a), ("x2", self.b))
        }
        for pod in self.pods.values():
            servers.start(pod, pod.name, 8080, 8053)
        self.outside = lab.outside
        self.token = ""
        self.start_api(*arguments)
        self.put_services()

    # -- the API server

    def start_api(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "tests.apiserver", "--host", OUTSIDE]
        command += ["--services", str(CHURNED), "--endpoints", str(ENDPOINTS), *arguments]
        self.api = self.outside.popen(command, join_cgroup=False, stdout=subprocess.PIPE)
        assert self.api.stdout is not None
        self.url = self.api.stdout.readline().decode().strip()

    def control(self, action: str, body: object = None, *, patience: float = 120, **query: object) -> Any:
        return self.outside.call(_control, self.url, action, query, body, patience, timeout=patience)

    def churn(self, rate: float, seconds: float) -> Child:
        """Begins to change endpoints of Services that have no load."""
        query = {"rate": rate, "seconds": seconds}
        return self.outside.fork(_control, self.url, "churn", query, None, 10 * seconds + 60)

    def put_services(self) -> None:
        self.put_web_services()
        self.put_service(
            "checked",
            CHECKED,
            type="LoadBalancer",
            externalTrafficPolicy="Local",
            healthCheckNodePort=HEALTH_PORT,
        )
        self.put_endpoints("web", "w1", "w2")
        self.put_endpoints("other", "x1", "x2")
        self.put_endpoints("checked", "w1")

    def put_web_services(self, **spec: object) -> None:
        """Those under load."""
        for name, number in (("web", WEB), ("other", OTHER)):
            tcp, udp = NODE_PORTS[number]
            ports = [
                {"name": "http", "protocol": "TCP", "port": PORT, "nodePort": tcp},
                {"name": "dns", "protocol": "UDP", "port": UDP_PORT, "nodePort": udp},
            ]
            self.put_service(name, number, ports=ports, type="NodePort", **spec)

    def put_service(self, name: str, number: int, **spec: object) -> int:
        """Adds or replaces a Service with an address of each family. Returns its version."""
        addresses = [*addresses_of(number)]
        both = {"clusterIPs": addresses, "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack"}
        made = objects.service(name, addresses[0], namespace="shop", **both, **spec)
        return int(self.control("put", made, resource="services")["resourceVersion"])

    def put_endpoints(self, service: str, *names: str) -> None:
        """In a slice of each family."""
        pods = [self.pods[name] for name in names]
        for suffix, addresses in _SLICES:
            found = [
                objects.endpoint(address, pod.node.name)
                for pod, address in zip(pods, map(addresses, pods), strict=True)
            ]
            made = objects.endpoint_slice(service, found, namespace="shop", suffix=suffix)
            made["ports"] = [
                {"name": "http", "protocol": "TCP", "port": 8080},
                {"name": "dns", "protocol": "UDP", "port": 8053},
            ]
            self.control("put", made, resource="endpointslices")

    def put_further(self) -> int:
        """Another Service, with an endpoint that the others have, too. Returns its version."""
        version = self.put_service("further", FURTHER)
        self.put_endpoints("further", "w1")
        return version

    def delete_further(self) -> None:
        self.control("delete", resource="services", namespace="shop", name="further")
        for suffix, _ in _SLICES:
            self.control("delete", resource="endpointslices", namespace="shop", name=f"further-{suffix}")

    # -- the agent

    def agent(self, *arguments: str) -> Agent:
        return self.a.agent("--master", self.url, *KEEPS_CONNECTIONS, *arguments)

    def end_agents(self, besides: Sequence[Agent]) -> None:
        """Kills those that a test has left, so that the next one does not fail for them."""
        for each in self.lab.agents:
            if each not in besides and each.process is not None and each.process.poll() is None:
                each.kill()

    # -- the load

    def ways(self) -> dict[str, list[Way]]:
        names, node = {WEB: ("w1", "w2"), OTHER: ("x1", "x2")}, (self.a.address, self.a.address6)
        return {
            "pod": [Way(addresses_of(number), PORT, names[number], UDP_PORT) for number in names],
            "outside": [
                Way(node, NODE_PORTS[number][0], names[number], NODE_PORTS[number][1]) for number in names
            ],
        }

    @contextmanager
    def under_load(
        self,
        fault: str,
        kinds: Sequence[str] = KINDS,
        *,
        packets: bool = True,
        sockets: bool = True,
        pause: float = PAUSE,
    ) -> Iterator[None]:
        """The assertion for all faults: nothing is lost meanwhile; :meth:`wait_equal` is its other half.

        ``fault``: what the table of results calls it. ``packets``: it holds for the load from outside, too, and
        ``sockets`` for that from a pod; both are counted anyway, and nothing is answered by a wrong backend in any
        case. ``pause``: between two of a thread of the load.
        """
        ways = self.ways()
        loads = {
            "pod": Load(self.client, ways["pod"], kinds, pause),
            "outside": Load(self.outside, ways["outside"], kinds, pause),
        }
        before, lost_before = self.packet_events(), self.losses()
        for load in loads.values():
            load.wait()
        found: dict[str, list[Result]] = {}
        try:
            yield
        finally:
            for place, load in loads.items():
                found[place] = load.stop()
            asserted = {"packets": packets, "sockets": sockets}
            report.add(fault, found, {name for name, is_so in asserted.items() if not is_so})
        lost = [
            f"{time.strftime('%H:%M:%S', time.gmtime(when))}.{int(when % 1 * 1000):03} "
            f"{place}, {each.kind} to {each.host}: {why}"
            for place, results in found.items()
            for each in results
            for when, why in each.lost
            if (sockets if place == "pod" else packets) or WrongBackendError.__name__ in why
        ]
        assert not lost, (
            f"{len(lost)} lost:\n"
            + "\n".join(sorted(lost)[:30])
            + f"\npackets: {self.packet_events() - before}\nlost by the kernel: {self.losses() - lost_before}"
        )
        assert all(each.count for results in found.values() for each in results), "a load did nothing"

    def packet_events(self) -> Counter[str]:
        """What node a counts of packets that it did not just translate; nothing without maps."""
        try:
            status = json.loads(self.a.cli("status", "-o", "json", check=False))
        except ValueError:
            return Counter()
        return Counter({each["reason"]: each["packets"] for each in status["packets"]})

    def losses(self) -> Counter[str]:
        """What the kernel has lost so far, by place."""
        places = {"a": self.a, "b": self.b, "outside": self.outside, "client": self.client, **self.pods}
        return Counter(
            {
                f"{place}: {what}": count
                for place, each in places.items()
                for what, count in each.call(losses.here).items()
            }
        )

    # -- the end

    def wait_equal_or(self, agent: Agent) -> None:
        """Waits until the maps hold what the API says, or the agent has ended."""
        assert agent.process is not None
        process = agent.process
        until(
            lambda: process.poll() is not None or not self.differences(),
            "the agent neither ends nor programs the change",
            every=0.1,
        )

    def wait_equal(self, seconds: float = READY_SECONDS, *, every: float = 0.2) -> None:
        """Waits until the maps hold what the API says, and ``ebpfproxy check`` has no complaint."""
        wrong: list[object] = []

        def is_equal() -> bool:
            wrong[:] = [self.differences()]
            return not wrong[0]

        try:
            until(is_equal, "", seconds, every=every)
        except AssertionError:
            raise AssertionError(f"maps differ from the API: {wrong[0]}") from None
        done = self.a.run_command(["check", "-o", "json", "--bpf-root", str(self.a.bpf_root)])
        checked = json.loads(done.output)
        assert checked["agent"] == "answered", checked
        assert checked["good"], checked["findings"]

    def differences(self) -> object:
        """By Service, the endpoints that the API and the maps have; nothing where they are equal."""
        wanted: dict[str, set[str]] = {}
        for each in self.outside.call(
            _list, self.url, "/apis/discovery.k8s.io/v1/endpointslices", self.token
        ):
            name = each["metadata"]["labels"]["kubernetes.io/service-name"]
            wanted.setdefault(name, set()).update(
                f"{_in_url(one['addresses'][0])}:{port['port']}/{port['protocol']}"
                for one in each["endpoints"]
                for port in each["ports"]
                if one["conditions"]["ready"]
            )
        served: dict[str, set[str]] = {}
        protocols: dict[str, set[str]] = {}
        try:
            listed = self.a.cli("service", "list", "-o", "json")
        except RuntimeError as error:
            # There are no maps yet.
            return str(error)
        for row in json.loads(listed):
            protocol = row["frontend"].rpartition("/")[2]
            protocols.setdefault(row["name"], set()).add(protocol)
            served.setdefault(row["name"], set()).update(
                f"{each['address']}/{protocol}" for each in row["backends"] if each["state"] == "active"
            )
        for name, found in wanted.items():
            # A port whose protocol the Service has not is not served.
            has = protocols.get(name, set()) or {"TCP"}
            wanted[name] = {each for each in found if each.rpartition("/")[2] in has}
        return {
            name: (sorted(wanted.get(name, ())), sorted(served.get(name, ())))
            for name in wanted.keys() | served.keys()
            if wanted.get(name, set()) != served.get(name, set())
        }


def addresses_of(number: int) -> tuple[str, str]:
    """Returns a Service's addresses."""
    return f"10.96.200.{number}", f"fd00:10:96:200::{number}"


def _in_url(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _control(url: str, action: str, query: dict[str, object], body: object, seconds: float) -> Any:
    connection = http.client.HTTPConnection(url.partition("://")[2], timeout=seconds)
    data = json.dumps(body) if body is not None else None
    connection.request("POST", f"/control/{action}?{urlencode(query)}", data)
    if action == "drop":
        # Also this connection is reset.
        with suppress(OSError, http.client.HTTPException):
            connection.getresponse().read()
        return None
    response = connection.getresponse()
    said = response.read()
    assert response.status == 200, said
    return json.loads(said)


def _list(url: str, path: str, token: str) -> list[Item]:
    connection = http.client.HTTPConnection(url.partition("://")[2], timeout=20)
    connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
    found: list[Item] = json.loads(connection.getresponse().read())["items"]
    return found
