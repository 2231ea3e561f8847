"""Every algorithm, at the socket and in packets, on the node's own maps and programs.

Backends need not exist: a connect() of a UDP socket, or one packet through the program, shows the choice.
Tests of chance fail once in a hundred million runs of right code (``tests.statistics.UNLIKELY``).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from scapy.layers.inet import IP, UDP

from tests.lab import Lab, choices, manifests
from tests.packets.wire import PASS, Wire
from tests.statistics import UNLIKELY, chance

pytestmark = pytest.mark.root

WEIGHTS = (1, 2, 3, 6, 0)
#: A Service for each: its algorithm and whether it has weights.
SERVICES = {
    "random": ("", False),
    "random-weighted": ("random", True),
    "rr": ("rr", False),
    "wrr": ("wrr", True),
    "lc": ("least-connections", False),
    "wlc": ("wlc", True),
    "sed": ("sed", True),
    "nq": ("nq", True),
    "sh": ("source-hash", False),
    "dh": ("dh", False),
    "maglev": ("maglev", False),
    "maglev-weighted": ("mh", True),
    "many": ("lc", False),
}


def backends(name: str) -> list[str]:
    """Each Service has its own: what is open to a backend counts for all who use it."""
    count = 40 if name == "many" else 5
    return [f"10.244.{100 + list(SERVICES).index(name)}.{i + 1}" for i in range(count)]


def weights(name: str) -> dict[str, int]:
    return dict(zip(backends(name), WEIGHTS, strict=True))


def cluster_ip(name: str) -> str:
    return f"10.96.4.{list(SERVICES).index(name) + 1}"


def balancer_ip(name: str) -> str:
    return f"203.0.113.{list(SERVICES).index(name) + 1}"


def documents() -> Iterator[manifests.Document]:
    for name, (algorithm, weighted) in SERVICES.items():
        service = manifests.service(
            name,
            type="LoadBalancer",
            clusterIPs=[cluster_ip(name)],
            ports=[{"name": "dns", "port": 53, "protocol": "UDP"}],
        )
        service["status"] = {"loadBalancer": {"ingress": [{"ip": balancer_ip(name)}]}}
        annotations = {"ebpfproxy.io/lb-algorithm": algorithm} if algorithm else {}
        if weighted:
            annotations["ebpfproxy.io/weights"] = ", ".join(f"{a}={w}" for a, w in weights(name).items())
        service["metadata"]["annotations"] = annotations
        yield service
        yield manifests.slice_of(
            name,
            [manifests.endpoint(a, "node-b") for a in backends(name)],
            ports=[{"name": "dns", "port": 8053, "protocol": "UDP"}],
        )


class World:
    def __init__(self, lab: Lab) -> None:
        self.a, self.b = lab.node("node-a"), lab.node("node-b")
        self.pods = [self.a.pod(f"client{i}") for i in range(4)]
        self.manifests = lab.folder / "manifests"
        manifests.write(self.manifests / "all.yaml", *documents())
        for node in (self.a, self.b):
            node.agent(manifests=self.manifests).start()
        self.wires = [Wire(self.a), Wire(self.b)]

    def sockets(self, name: str, count: int, pod: int = 0) -> list[str]:
        return self.pods[pod].call(choices.choices, cluster_ip(name), 53, count)

    def packet(self, name: str, source: str, port: int, node: int = 0) -> str:
        """The backend of one packet's new flow."""
        wire = self.wires[node]
        result = wire.arrive(IP(src=source, dst=balancer_ip(name)) / UDP(sport=port, dport=53) / b"?")
        assert result.verdict == PASS
        backend: str = result.packet[IP].dst
        assert backend != balancer_ip(name)
        return backend

    def packets(self, name: str, count: int) -> list[str]:
        return [self.packet(name, f"198.51.100.{i % 250 + 1}", next(_ports)) for i in range(count)]


_ports = itertools.cycle(range(1024, 65000))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with Lab() as lab:
        made = World(lab)
        yield made
        for wire in made.wires:
            wire.close()


Choose = Callable[[str, int], list[str]]


@pytest.fixture(params=["sockets", "packets"])
def choose(request: pytest.FixtureRequest, world: World) -> Choose:
    found: Choose = getattr(world, request.param)
    return found


def shares(name: str) -> dict[str, float]:
    return {b: float(weights(name)[b]) if SERVICES[name][1] else 1.0 for b in backends(name)}


def windows(chosen: list[str], length: int) -> Iterator[Counter[str]]:
    for start in range(0, len(chosen) - length + 1):
        yield Counter(chosen[start : start + length])


@pytest.mark.parametrize("name", ["random", "maglev"])
def test_equal_backends_get_equal_shares(choose: Choose, name: str) -> None:
    assert chance(Counter(choose(name, 4000)), shares(name)) > UNLIKELY


@pytest.mark.parametrize("name", ["random-weighted", "maglev-weighted"])
def test_weights_are_shares_and_0_is_none(choose: Choose, name: str) -> None:
    counts = Counter(choose(name, 4000))
    weighted = {b: share for b, share in shares(name).items() if share}
    # An even number of degrees of freedom: two equal parts of the heaviest, told apart by turns.
    heaviest = backends(name)[3]
    split = {**weighted, heaviest: 3.0, "other half": 3.0}
    halves = {**counts, heaviest: counts[heaviest] // 2, "other half": -(-counts[heaviest] // 2)}
    assert chance(halves, split) > UNLIKELY


def test_round_robin_is_exact_in_every_window(choose: Choose) -> None:
    chosen = choose("rr", 1003)
    for length in (5, 7, 50):
        for counts in windows(chosen, length):
            assert max(counts.values()) - min(counts[b] for b in backends("rr")) <= (1 if length % 5 else 0)


def test_weighted_round_robin_is_exact_in_every_window_of_a_cycle_and_smooth(choose: Choose) -> None:
    chosen = choose("wrr", 500)
    for counts in windows(chosen, 12):
        assert counts == {b: w for b, w in weights("wrr").items() if w}
    for counts in windows(chosen, 4):
        assert counts[backends("wrr")[3]] <= 3


def test_round_robin_is_exact_over_all_cpus(world: World) -> None:
    with ThreadPoolExecutor(4) as together:
        runs = [together.submit(world.sockets, "rr", 1000, pod) for pod in range(4)]
        counts = Counter(itertools.chain.from_iterable(run.result() for run in runs))
    assert counts == dict.fromkeys(backends("rr"), 800)


def test_least_connections_fills_the_gaps(world: World) -> None:
    third = backends("lc")[2]
    before, after = world.pods[0].call(choices.held, cluster_ip("lc"), 53, 50, third, 10)
    assert Counter(before) == dict.fromkeys(backends("lc"), 10)
    assert set(after) == {third}


def test_least_connections_counts_weights(world: World) -> None:
    before, _ = world.pods[0].call(choices.held, cluster_ip("wlc"), 53, 120, "", 0)
    assert Counter(before) == {b: 10 * w for b, w in weights("wlc").items() if w}


def test_shortest_expected_delay_gives_the_first_to_the_heaviest(world: World) -> None:
    before, _ = world.pods[0].call(choices.held, cluster_ip("sed"), 53, 12, "", 0)
    assert before[0] == backends("sed")[3]
    assert Counter(before) == {b: w for b, w in weights("sed").items() if w}


def test_never_queue_takes_whom_nobody_uses_before_it_weighs(world: World) -> None:
    before, _ = world.pods[0].call(choices.held, cluster_ip("nq"), 53, 12, "", 0)
    assert set(before[:4]) == set(backends("nq")[:4])
    assert Counter(before)[backends("nq")[3]] >= 5


def test_of_many_the_better_of_two_is_taken(world: World) -> None:
    """None is far above the mean of 25: by chance alone the fullest of 40 would have nearly 40."""
    before, _ = world.pods[0].call(choices.held, cluster_ip("many"), 53, 1000, "", 0)
    counts = Counter(before)
    assert set(counts) == set(backends("many"))
    assert max(counts.values()) <= 25 + 5


def test_least_connections_counts_flows_of_packets(world: World) -> None:
    counts = Counter(world.packets("lc", 50))
    assert counts == dict.fromkeys(backends("lc"), 10)


def test_source_hash_keeps_a_client_with_its_backend(world: World) -> None:
    by_pod = [set(world.sockets("sh", 50, pod)) for pod in range(4)]
    assert all(len(found) == 1 for found in by_pod)
    by_client = {
        client: {world.packet("sh", client, next(_ports)) for _ in range(3)}
        for client in (f"198.51.{i}.7" for i in range(100))
    }
    assert all(len(found) == 1 for found in by_client.values())
    assert set.union(*by_client.values()) == set(backends("sh"))


def test_destination_hash_has_one_backend_for_an_address(choose: Choose) -> None:
    assert len(set(choose("dh", 50))) == 1


def test_maglev_sends_a_flow_to_the_same_backend_on_every_node(world: World) -> None:
    for _ in range(300):
        port = next(_ports)
        assert world.packet("maglev", "198.51.100.9", port, 0) == world.packet(
            "maglev", "198.51.100.9", port, 1
        )


def test_service_list_shows_the_algorithm(world: World) -> None:
    shown = world.a.cli("service", "get", "shop/wrr")
    assert "round-robin" in shown
