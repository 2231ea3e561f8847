"""Endpoints that terminate, are removed or stop responding, under load, at the socket and in packets."""

from __future__ import annotations

import copy
import gzip
import http.client
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from ebpfproxy.datapath.dump import Dump, open_maps
from ebpfproxy.datapath.kernel.roots import find_cgroup_root
from ebpfproxy.kube.objects import Resource
from tests import recordings
from tests.apiserver import objects
from tests.data import RECORDINGS
from tests.lab import Lab, LabNode, Pod
from tests.lab.graceful import Load, Mount, Server
from tests.lab.spaces import Space
from tests.lab.waiting import until

pytestmark = pytest.mark.root

Item = dict[str, Any]

#: Servers accept connections for this long after SIGTERM, as the agent needs time to program the change.
LINGER = 1.5
#: The ports of the recorded Services, and of everything without a recorded port.
PORT, TARGET_PORT = 80, 8080
_numbers = itertools.count(1)


class Step(NamedTuple):
    """An EndpointSlice of the recording from time ``t`` on, in seconds."""

    t: float
    item: Item

    def where(self, condition: str) -> set[str]:
        """The addresses of endpoints whose condition is true."""
        found = self.item.get("endpoints") or []
        return {each["addresses"][0] for each in found if each["conditions"][condition]}

    @property
    def addresses(self) -> set[str]:
        return self.where("serving")


def recorded(service: str, first: str, last: str) -> list[Step]:
    """The states of the Service's only slice between two steps of the recording, and the one before."""
    times = {each["step"]: each["t"] for each in json.loads((RECORDINGS / "steps.json").read_text())}
    begin, end = (next(t for step, t in times.items() if step.startswith(text)) for text in (first, last))
    (item,) = (
        each
        for each in recordings.lists("initial")[Resource.ENDPOINTSLICES]
        if each["metadata"]["labels"].get("kubernetes.io/service-name") == service
    )
    states = [Step(0.0, item)]
    for line in gzip.decompress((RECORDINGS / "watch-events.jsonl.gz").read_bytes()).splitlines():
        entry = json.loads(line)
        event = json.loads(entry["line"])
        if event["object"]["metadata"].get("name") == item["metadata"]["name"]:
            states.append(Step(entry["t"], event["object"]))
    before = [each for each in states if each.t < begin][-1]
    return [before._replace(t=begin), *(each for each in states if begin <= each.t < end)]


def recorded_service(name: str) -> Item:
    (item,) = (
        each
        for each in recordings.lists("initial")[Resource.SERVICES]
        if each["metadata"]["name"] == name and each["metadata"]["namespace"] == "shop"
    )
    return item


class Cluster:
    """An API server, and the recorded nodes in a lab; node-a1 has an agent.

    The API server has only Services that tests add, because recorded pods have other addresses than lab pods.
    """

    def __init__(self, lab: Lab) -> None:
        self.nodes: dict[str, LabNode] = {name: lab.node(name) for name in ("node-a1", "node-a2", "node-b1")}
        self.node = self.nodes["node-a1"]
        self.client: Pod = self.node.pod("client")
        self.outside: Space = lab.outside
        command = [sys.executable, "-m", "tests.apiserver", "--services", "0", "--node", self.node.name]
        self.api = self.node.popen(command, join_cgroup=False, stdout=subprocess.PIPE)
        assert self.api.stdout is not None
        self.url = self.api.stdout.readline().decode().strip()
        self.node.agent("--master", self.url, "--stale-tcp-seconds", "0.5").start()
        self._maps = open_maps(self.node.bpf_root)

    def put(self, resource: Resource, *items: Item) -> None:
        self.node.call(_put, self.url.partition("://")[2], resource.value, items)

    def serving(self, service: str) -> set[frozenset[str]]:
        """The sets of backends that frontends of the Service's port http have for new connections."""
        rows = [row for row in Dump(self._maps).frontends() if (row.name, row.port_name) == (service, "http")]
        return {frozenset(each.address.partition(":")[0] for each in row.backends) for row in rows}

    def wait_serving(self, service: str, wanted: set[str]) -> float:
        """Waits until all frontends have these backends; returns the time (CLOCK_MONOTONIC)."""
        until(
            lambda: self.serving(service) == {frozenset(wanted)},
            f"{service} does not have the backends {wanted}",
        )
        return time.monotonic()


def _put(api: str, resource: str, items: tuple[Item, ...]) -> None:
    connection = http.client.HTTPConnection(api, timeout=10)
    for item in items:
        connection.request("POST", f"/control/put?resource={resource}", json.dumps(item))
        response = connection.getresponse()
        assert response.status == 200, response.read()
        response.read()
    connection.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Lab() as lab:
        yield Cluster(lab)


def node_port_service(item: Item, name: str, address: str, node_port: int, **spec: Any) -> Item:
    """A copy of the Service with another name and address, and with a NodePort."""
    made = copy.deepcopy(item)
    made["metadata"]["name"] = name
    made["spec"] |= {"type": "NodePort", "clusterIP": address, "clusterIPs": [address], **spec}
    for number, port in enumerate(made["spec"]["ports"]):
        port["nodePort"] = node_port + number
    return made


class Rollout:
    """Pods and servers that follow the recorded endpoints of a Service.

    Each of ``services`` has these endpoints in a slice of its own.
    """

    def __init__(self, cluster: Cluster, services: list[Item], steps: list[Step], linger: float) -> None:
        self.cluster = cluster
        self.services = [each["metadata"]["name"] for each in services]
        self.linger = linger
        #: All pods by recorded address, created in advance because the recorded pace leaves no time for it.
        self.pods: dict[str, Pod] = {}
        for endpoint in itertools.chain.from_iterable(each.item["endpoints"] or () for each in steps):
            (address,) = endpoint["addresses"]
            if address not in self.pods:
                pod = cluster.nodes[endpoint["nodeName"]].pod(endpoint["targetRef"]["name"])
                self.pods[address] = pod
        self.servers: dict[str, Server] = {}
        #: The time from which a backend gets no new connections, by recorded address.
        self.left: dict[str, float] = {}
        self.step: Step | None = None
        cluster.put(Resource.SERVICES, *services)

    def names(self, addresses: set[str]) -> set[str]:
        return {self.pods[address].name for address in addresses}

    def play(self, steps: list[Step]) -> None:
        """Applies the steps at the recorded pace, or later: an endpoint is removed after its server exits."""
        due = time.monotonic()
        for before, step in itertools.pairwise(steps):
            due = max(time.monotonic(), due + min(step.t - before.t, 1.0))
            time.sleep(max(0.0, due - time.monotonic()))
            self.put(step)

    def put(self, step: Step) -> None:
        before = self.step or Step(0.0, {})
        started = step.where("ready") - before.addresses
        for address in started:
            self.servers[address] = Server(
                self.pods[address], self.pods[address].name, TARGET_PORT, self.linger
            )
        for address in started:
            self.servers[address].wait_ready()
        for address in before.addresses - step.addresses:
            self.servers[address].wait_ended()
        for address in step.where("terminating") - before.where("terminating"):
            self.servers[address].terminate()
        self.cluster.put(Resource.ENDPOINTSLICES, *(self._slice(step.item, name) for name in self.services))
        self.step = step

        ready = step.where("ready")
        wanted = {self.pods[address].address for address in ready or step.addresses}
        since = max(self.cluster.wait_serving(name, wanted) for name in self.services)
        for address in before.addresses - ready if ready else ():
            self.left.setdefault(address, since)

    def _slice(self, item: Item, service: str) -> Item:
        made = copy.deepcopy(item)
        labels = made["metadata"]["labels"]
        if labels["kubernetes.io/service-name"] != service:
            made["metadata"]["name"] = f"{service}-abcde"
            labels["kubernetes.io/service-name"] = service
        for endpoint in made["endpoints"] or []:
            endpoint["addresses"] = [self.pods[each].address for each in endpoint["addresses"]]
        return made

    def check_servers(self) -> None:
        """Asserts that no server accepted a connection that began after its endpoint was deselected."""
        for address, moment in self.left.items():
            late = [each for each in self.servers[address].accepted if each.began > moment]
            assert not late, f"{self.pods[address].name}, terminating and left by {moment}, accepted {late}"
            assert self.servers[address].accepted


# -- terminating


def test_rolling_update_under_load_loses_no_request(cluster: Cluster) -> None:
    """A pod (socket hooks) and an external client (packets) use two Services with the recorded endpoints:
    one with the recorded ClientIP affinity, one without."""
    steps = recorded("cart", "rolling update of cart", "one payments pod")
    old, new = steps[0].addresses, steps[-1].addresses
    assert (len(old), len(new), len(old & new)) == (3, 3, 0)
    item = recorded_service("cart")
    assert item["spec"]["sessionAffinity"] == "ClientIP"
    rollout = Rollout(
        cluster,
        [
            node_port_service(item, "cart", item["spec"]["clusterIP"], 30180),
            node_port_service(item, "cart-spread", "10.96.66.246", 30190, sessionAffinity="None"),
        ],
        steps,
        LINGER,
    )
    rollout.put(steps[0])
    loads = {
        ("cart", "socket"): Load(cluster.client, item["spec"]["clusterIP"], PORT),
        ("cart", "packets"): Load(cluster.outside, cluster.node.address, 30180),
        ("cart-spread", "socket"): Load(cluster.client, "10.96.66.246", PORT),
        ("cart-spread", "packets"): Load(cluster.outside, cluster.node.address, 30190),
    }
    for load in loads.values():
        load.wait_ready()
    rollout.play(steps)
    ended = time.monotonic()
    seen = {key: load.stop() for key, load in loads.items()}

    assert {key: each.errors for key, each in seen.items()} == {key: [] for key in loads}
    assert set(rollout.left) == old
    for key, each in seen.items():
        assert each.requests > 200, key
        for address, moment in rollout.left.items():
            assert rollout.pods[address].name not in each.after(moment), key
        assert each.after(ended), key
    for path in ("socket", "packets"):
        each = seen["cart-spread", path]
        assert set(each.after(ended)) == rollout.names(new)
        for address, moment in rollout.left.items():
            assert each.kept[rollout.pods[address].name] > moment, (
                "established connections to the terminating backend were closed"
            )
    rollout.check_servers()


def test_terminating_endpoints_serve_if_no_endpoint_is_ready(cluster: Cluster) -> None:
    """After the last is removed, connections are refused, and served again by the next ready endpoints."""
    steps = recorded("checkout", "checkout scaled to 0", "orders-api scaled to 130")
    address = "10.96.156.118"
    everywhere = {"internalTrafficPolicy": "Cluster"}
    item = node_port_service(recorded_service("checkout"), "checkout", address, 30200, **everywhere)
    # The servers exit at the second SIGTERM.
    rollout = Rollout(cluster, [item], steps, 600)
    rollout.put(steps[0])
    where = ((cluster.client, address, PORT), (cluster.outside, cluster.node.address, 30200))

    def start() -> list[Load]:
        loads = [Load(*each) for each in where]
        for load in loads:
            load.wait_ready()
        return loads

    def stop(loads: list[Load], after: float, names: set[str]) -> None:
        for load in loads:
            seen = load.stop()
            assert seen.errors == []
            assert set(seen.after(after)) == names
            assert set(seen.kept) == rollout.names(terminating)

    loads = start()
    terminating = set[str]()
    for step in steps[1:]:
        gone = terminating - step.addresses
        if gone and loads:
            # While the pods linger, both new connections and replies on old ones count.
            stop(loads, time.monotonic(), rollout.names(terminating))
            loads = []
        for each in gone:
            rollout.servers[each].terminate()
        rollout.put(step)
        terminating = step.where("terminating")
        if step.where("ready"):
            continue
        if len(terminating) == 1:
            stop(start(), 0.0, rollout.names(terminating))
        elif not terminating:
            for space, host, port in where:
                assert space.call(_connect, host, port) == "ConnectionRefusedError"
    stop(start(), 0.0, rollout.names(steps[-1].addresses))
    assert not terminating


def _connect(host: str, port: int) -> str:
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.connect()
    except OSError as error:
        return type(error).__name__
    return "connected"


# -- clients without a socket hook, with a fixed source port


class Pair:
    """A Service whose endpoint ``goes`` has all connections, and whose endpoint ``stays`` is added later."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        self.cluster = cluster
        self.name = f"nfs-{number}"
        self.address, self.node_port = f"10.96.77.{number}", 31000 + number
        self.goes = cluster.nodes["node-a2"].pod(f"goes-{number}")
        self.stays = cluster.nodes["node-b1"].pod(f"stays-{number}")
        self.servers = [Server(pod, pod.name, TARGET_PORT, 0.0) for pod in (self.goes, self.stays)]
        for server in self.servers:
            server.wait_ready()
        item = objects.service(self.name, self.address, namespace="shop")
        cluster.put(Resource.SERVICES, node_port_service(item, self.name, self.address, self.node_port))
        self.put(goes="ready")
        cluster.wait_serving(self.name, {self.goes.address})

    def put(self, **states: str) -> None:
        """Writes the slice. A state is ready, unready or terminating; an absent name is a removed endpoint."""
        endpoints = []
        for name, state in states.items():
            pod: Pod = getattr(self, name)
            made = objects.endpoint(pod.address, pod.node.name, ready=state == "ready")
            made["conditions"] |= {"serving": state != "unready", "terminating": state == "terminating"}
            endpoints.append(made)
        piece = objects.endpoint_slice(self.name, endpoints, namespace="shop")
        self.cluster.put(Resource.ENDPOINTSLICES, piece)

    def mount(self) -> dict[str, Mount]:
        """Clients outside, on the host and in a pod; two pass a socket hook for their first connection."""
        root, own = find_cgroup_root(), 900
        made = {"outside": Mount(self.cluster.outside, self.cluster.node.address, self.node_port, own)}
        for place, space in (("host", self.cluster.node), ("pod", self.cluster.client)):
            for number, is_hooked in enumerate((False, True), 1):
                made[f"{place}, {'first hooked' if is_hooked else 'never hooked'}"] = Mount(
                    space, self.address, PORT, own + number, is_hooked=is_hooked, then=root
                )
        return made


@pytest.mark.parametrize(
    ("state", "is_unreachable", "ended"),
    [
        # The server still responds, but is removed from the slice.
        ("gone", False, {"ECONNRESET", "ECONNABORTED"}),
        # The backend is unreachable; the client's kernel times out before or after the endpoint is removed.
        ("gone", True, {"ECONNRESET", "ECONNABORTED", "ETIMEDOUT"}),
        ("unready", True, {"ETIMEDOUT"}),
        ("terminating", True, {"ETIMEDOUT"}),
        # The server closes the connection.
        ("terminating", False, {"closed"}),
    ],
)
def test_client_without_a_socket_hook_reconnects_from_a_fixed_port_to_a_serving_backend(
    cluster: Cluster, state: str, is_unreachable: bool, ended: set[str]
) -> None:
    """NFS in the kernel connects in this way: on the node, in a pod, and outside."""
    pair = Pair(cluster, next(_numbers))
    mounts = pair.mount()
    assert {name: each.next().name for name, each in mounts.items()} == dict.fromkeys(mounts, pair.goes.name)
    pair.put(goes="ready", stays="ready")
    cluster.wait_serving(pair.name, {pair.goes.address, pair.stays.address})
    if is_unreachable:
        pair.goes.run(["ip", "route", "replace", "blackhole", "default"])
    pair.put(**({} if state == "gone" else {"goes": state}), stays="ready")
    cluster.wait_serving(pair.name, {pair.stays.address})
    if not is_unreachable and state == "terminating":
        pair.servers[0].terminate()
    for name, each in mounts.items():
        again = each.next()
        assert again.ended in ended, name
        assert again.name == pair.stays.name, name
        assert again.failed == [], f"{name}: the first attempt to reconnect failed"
        each.end()
