"""All load-balancing algorithms, at the socket and in packets, with the maps and programs of an agent.

No backend listens: connect() of a UDP socket, or one packet through the program, shows the selected one.
Statistical tests fail once in a hundred million runs of correct code (``tests.statistics.UNLIKELY``).
"""

from __future__ import annotations

import itertools
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from scapy.compat import raw
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from tests.lab import Lab, choices, manifests
from tests.packets.wire import PASS, Wire
from tests.statistics import UNLIKELY, chance

pytestmark = pytest.mark.root

#: Offsets of the IPv4 addresses and of the source port in an Ethernet frame.
_SRC, _DST, _SPORT = 26, 30, 34

WEIGHTS = (1, 2, 3, 6, 0)
#: The algorithm of each Service, and whether it has weights.
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
    """Services share no backend, because open connections count per backend."""
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


class AlgorithmsCluster:
    def __init__(self, lab: Lab) -> None:
        self.a, self.b = lab.node("node-a"), lab.node("node-b")
        self.pods = [self.a.pod(f"client{i}") for i in range(4)]
        self.manifests = lab.folder / "manifests"
        manifests.write(self.manifests / "all.yaml", *documents())
        for node in (self.a, self.b):
            node.agent(manifests=self.manifests).start()
        self.wires = [Wire(self.a), Wire(self.b)]
        self._first: dict[tuple[str, int], bytes] = {}

    def sockets(self, name: str, count: int, pod: int = 0) -> list[str]:
        return self.pods[pod].call(choices.choices, cluster_ip(name), 53, count)

    def packet(self, name: str, source: str, port: int, node: int = 0) -> str:
        """The backend of a new flow."""
        wire = self.wires[node]
        verdict, after = wire.send_bytes("from_device", "eth0", self._first_packet(name, source, port, node))
        assert verdict == PASS
        backend = socket.inet_ntoa(after[_DST : _DST + 4])
        assert backend in backends(name)
        return backend

    def _first_packet(self, name: str, source: str, port: int, node: int) -> bytes:
        """Copies one packet per Service, because scapy takes a millisecond; checksums are not tested here."""
        if (name, node) not in self._first:
            mac = self.wires[node].mac("eth0")
            packet = IP(src="0.0.0.0", dst=balancer_ip(name)) / UDP(dport=53, chksum=0) / b"?"
            self._first[name, node] = raw(Ether(dst=mac, src="02:00:00:00:00:99") / packet)
        made = bytearray(self._first[name, node])
        made[_SRC : _SRC + 4] = socket.inet_aton(source)
        made[_SPORT : _SPORT + 2] = port.to_bytes(2, "big")
        return bytes(made)

    def packets(self, name: str, count: int) -> list[str]:
        return [self.packet(name, f"198.51.100.{i % 250 + 1}", next(_ports)) for i in range(count)]


_ports = itertools.cycle(range(1024, 65000))


@pytest.fixture(scope="module")
def cluster() -> Iterator[AlgorithmsCluster]:
    with Lab() as lab:
        made = AlgorithmsCluster(lab)
        yield made
        for wire in made.wires:
            wire.close()


Choose = Callable[[str, int], list[str]]


@pytest.fixture(params=["sockets", "packets"])
def choose(request: pytest.FixtureRequest, cluster: AlgorithmsCluster) -> Choose:
    found: Choose = getattr(cluster, request.param)
    return found


def shares(name: str) -> dict[str, float]:
    return {b: float(weights(name)[b]) if SERVICES[name][1] else 1.0 for b in backends(name)}


def windows(chosen: list[str], length: int) -> Iterator[Counter[str]]:
    for start in range(0, len(chosen) - length + 1):
        yield Counter(chosen[start : start + length])


@pytest.mark.parametrize("name", ["random", "maglev"])
def test_backends_without_weights_get_equal_shares(choose: Choose, name: str) -> None:
    assert chance(Counter(choose(name, 4000)), shares(name)) > UNLIKELY


@pytest.mark.parametrize("name", ["random-weighted", "maglev-weighted"])
def test_connections_are_proportional_to_weights_and_weight_0_gets_none(choose: Choose, name: str) -> None:
    counts = Counter(choose(name, 4000))
    weighted = {b: share for b, share in shares(name).items() if share}
    # ``chance`` needs an even number of degrees of freedom: the greatest weight counts as two halves.
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


def test_round_robin_is_exact_over_all_cpus(cluster: AlgorithmsCluster) -> None:
    with ThreadPoolExecutor(4) as together:
        runs = [together.submit(cluster.sockets, "rr", 1000, pod) for pod in range(4)]
        counts = Counter(itertools.chain.from_iterable(run.result() for run in runs))
    assert counts == dict.fromkeys(backends("rr"), 800)


def test_least_connections_selects_the_backend_with_closed_connections(cluster: AlgorithmsCluster) -> None:
    third = backends("lc")[2]
    before, after = cluster.pods[0].call(choices.held, cluster_ip("lc"), 53, 50, third, 10)
    assert Counter(before) == dict.fromkeys(backends("lc"), 10)
    assert set(after) == {third}


def test_weighted_least_connections_distributes_by_weight(cluster: AlgorithmsCluster) -> None:
    before, _ = cluster.pods[0].call(choices.held, cluster_ip("wlc"), 53, 120, "", 0)
    assert Counter(before) == {b: 10 * w for b, w in weights("wlc").items() if w}


def test_shortest_expected_delay_selects_the_greatest_weight_first(cluster: AlgorithmsCluster) -> None:
    before, _ = cluster.pods[0].call(choices.held, cluster_ip("sed"), 53, 12, "", 0)
    assert before[0] == backends("sed")[3]
    assert Counter(before) == {b: w for b, w in weights("sed").items() if w}


def test_never_queue_selects_idle_backends_first(cluster: AlgorithmsCluster) -> None:
    before, _ = cluster.pods[0].call(choices.held, cluster_ip("nq"), 53, 12, "", 0)
    assert set(before[:4]) == set(backends("nq")[:4])
    assert Counter(before)[backends("nq")[3]] >= 5


def test_least_connections_of_many_backends_selects_the_less_loaded_of_two(
    cluster: AlgorithmsCluster,
) -> None:
    """No backend is far above the mean of 25; with random selection the greatest of 40 would be near 40."""
    before, _ = cluster.pods[0].call(choices.held, cluster_ip("many"), 53, 1000, "", 0)
    counts = Counter(before)
    assert set(counts) == set(backends("many"))
    assert max(counts.values()) <= 25 + 5


def test_least_connections_counts_conntrack_flows(cluster: AlgorithmsCluster) -> None:
    counts = Counter(cluster.packets("lc", 50))
    assert counts == dict.fromkeys(backends("lc"), 10)


def test_source_hash_selects_one_backend_per_client(cluster: AlgorithmsCluster) -> None:
    by_pod = [set(cluster.sockets("sh", 50, pod)) for pod in range(4)]
    assert all(len(found) == 1 for found in by_pod)
    by_client = {
        client: {cluster.packet("sh", client, next(_ports)) for _ in range(3)}
        for client in (f"198.51.{i}.7" for i in range(100))
    }
    assert all(len(found) == 1 for found in by_client.values())
    assert set.union(*by_client.values()) == set(backends("sh"))


def test_destination_hash_selects_one_backend_per_address(choose: Choose) -> None:
    assert len(set(choose("dh", 50))) == 1


def test_maglev_selects_the_same_backend_on_every_node(cluster: AlgorithmsCluster) -> None:
    for _ in range(300):
        port = next(_ports)
        assert cluster.packet("maglev", "198.51.100.9", port, 0) == cluster.packet(
            "maglev", "198.51.100.9", port, 1
        )


def test_service_list_shows_the_algorithm(cluster: AlgorithmsCluster) -> None:
    shown = cluster.a.cli("service", "get", "shop/wrr")
    assert "round-robin" in shown
