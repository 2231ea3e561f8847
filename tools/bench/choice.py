"""What each algorithm costs, as nanoseconds of connect() more than with a random choice; and Maglev's tables.

The kernel's own clock: while statistics are on it counts a program's runs and their nanoseconds. A process of
a pod opens datagram sockets and connects them to a Service, 500 that are open at once, so that loads are real
and every socket has a hash of its own. The difference of two Services is then what choosing costs, for all
else that connect4 does is the same: to find the Service, to read the backend, to count, to note the origin.

Services take turns in every round, in a new order each time. A round's sample is compared with that of random
choice among as many backends in the same round. Tables of other sizes need agents of their own, so there are
three nodes; each is compared with random choice on itself. A second random Service shows what noise alone does.

With many backends each choice meets memory that no cache has: so random choice among many is shown against few,
and a hash, which sends this one client to one backend, is measured among few only.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ebpfproxy.datapath.services import maglev
from ebpfproxy.services.balancing import ALGORITHM_ANNOTATION, WEIGHTS_ANNOTATION
from tests.lab import Lab, LabNode, manifests
from tools.bench import operations, ratio
from tools.bench.results import Result, at_most
from tools.bench.runtime import run_statistics
from tools.bench.sockets import in_turns

#: Sockets of a sample; all are open together. The median of the batches is the sample: another process
#: that takes the CPU inside of a program hits a few of them only.
SOCKETS = 500
PORT = 53
PORTS = [{"name": "dns", "port": PORT, "protocol": "UDP"}]
FEW, MANY = 5, 1000
#: Nanoseconds more than random.
NEAR, FAR = 30.0, 100.0
TABLE_SIZES = (251, 16381, 131071)
#: The tables that are timed: backends, milliseconds, and how often each is built.
TABLE_BACKENDS, TABLE_GOAL, TABLE_BUILDS = 5000, 200.0, 5
WEIGHTS = (1, 2, 3, 6)


class Service(NamedTuple):
    """``goal``: nanoseconds more than random, None where there is no such goal."""

    name: str
    algorithm: str
    backends: int = FEW
    goal: float | None = None
    weighted: bool = False
    affinity: bool = False


RANDOM = Service("random", "random")
RANDOM_MANY = Service("random", "random", MANY)
MAGLEV = Service("maglev", "maglev", goal=FAR)
SERVICES = (
    RANDOM,
    Service("random again (no change)", "random"),
    Service("random, weighted", "random", weighted=True),
    Service("round-robin", "rr", goal=NEAR),
    Service("round-robin, weighted", "wrr", goal=NEAR, weighted=True),
    Service("source-hash", "sh", goal=NEAR),
    Service("destination-hash", "dh", goal=NEAR),
    Service("least-connections", "lc"),
    Service("least-connections, weighted", "wlc", weighted=True),
    Service("shortest-expected-delay", "sed", weighted=True),
    Service("never-queue", "nq", weighted=True),
    MAGLEV,
    Service("session affinity, known client", "random", affinity=True),
    RANDOM_MANY,
    Service("round-robin", "rr", MANY, NEAR),
    Service("least-connections", "lc", MANY, FAR),
)


def cluster_ip(service: Service) -> str:
    return f"10.96.5.{SERVICES.index(service) + 1}"


def backends(service: Service) -> list[str]:
    """Each Service has its own: what is open to a backend counts for all who use it."""
    number = SERVICES.index(service)
    return [f"10.{100 + number}.{i // 250}.{i % 250 + 1}" for i in range(service.backends)]


def documents() -> Iterator[manifests.Document]:
    for number, service in enumerate(SERVICES):
        name, addresses = f"service-{number}", backends(service)
        document = manifests.service(
            name,
            clusterIPs=[cluster_ip(service)],
            ports=PORTS,
            sessionAffinity="ClientIP" if service.affinity else "None",
        )
        annotations = {ALGORITHM_ANNOTATION: service.algorithm}
        if service.weighted:
            annotations[WEIGHTS_ANNOTATION] = ", ".join(
                f"{address}={WEIGHTS[i % len(WEIGHTS)]}" for i, address in enumerate(addresses)
            )
        document["metadata"]["annotations"] = annotations
        yield document
        yield manifests.slice_of(
            name, [manifests.endpoint(a, "node-z") for a in addresses], ports=[{**PORTS[0], "port": 8053}]
        )


class Client:
    """A process in a new pod of a node, and the node's connect4."""

    def __init__(self, node: LabNode) -> None:
        program = next((node.bpf_root / "ebpfproxy").glob("v*/progs-*/connect4"))
        self._client = operations.Client(node.pod("client"), {"connect4": program})

    def nanoseconds(self, host: str) -> float:
        """What a run takes as sockets are connected to ``host``."""
        done = self._client.perform(operations.Task("connect_datagrams", [(host, PORT)] * SOCKETS))
        counts = {batch["connect4"].times for batch in done}
        assert counts == {operations.BATCH}, f"{counts} runs of {operations.BATCH}"
        return statistics.median(batch["connect4"].nanoseconds / operations.BATCH for batch in done)


class Way(NamedTuple):
    """A Service on the node whose tables have this size."""

    table_size: int
    service: Service

    @property
    def what(self) -> str:
        size = f" of {self.table_size}" if self.service is MAGLEV else ""
        return f"{self.service.name}{size}, {self.service.backends:,} backends"

    @property
    def base(self) -> Way:
        """Random choice among as many on the same node; what many cost is shown against few."""
        is_of_many = self.service.backends == MANY and self.service is not RANDOM_MANY
        return Way(self.table_size, RANDOM_MANY if is_of_many else RANDOM)


WAYS = [Way(TABLE_SIZES[0], service) for service in SERVICES] + [
    Way(size, service) for size in TABLE_SIZES[1:] for service in (RANDOM, MAGLEV)
]


def start(lab: Lab) -> Callable[[Way], float]:
    """A node with an agent for each size; what measures a way."""
    folder = lab.folder / "manifests"
    manifests.write(folder / "all.yaml", *documents())
    nodes = {size: lab.node(f"node-{size}") for size in TABLE_SIZES}
    agents = [
        node.agent("--maglev-table-size", str(size), manifests=folder).start(wait=False)
        for size, node in nodes.items()
    ]
    for agent in agents:
        agent.wait_ready()
    clients = {size: Client(node) for size, node in nodes.items()}
    return lambda way: clients[way.table_size].nanoseconds(cluster_ip(way.service))


def compared(way: Way, samples: dict[Way, list[float]]) -> Result:
    """The median of the rounds' differences to the base."""
    own, base = samples[way], samples[way.base]
    value, low, high = ratio.middle([a - b for a, b in zip(own, base, strict=True)])
    median, of_base = statistics.median(own), statistics.median(base)
    times = f"ratio {ratio.of_medians(own, base)}; {of_base:.0f} → {median:.0f} ns"
    detail = f"95 % [{low:+.0f} {high:+.0f}]; {times}"
    if way.service.goal is None:
        return Result(way.what, value, "ns", detail=detail)
    return at_most(way.what, value, "ns", way.service.goal, detail)


def choices(rounds: int) -> list[Result]:
    with Lab(executes_agents=True) as lab, run_statistics():
        measure = start(lab)
        # The first time is not like the others: what is learnt (affinity), faulted in, translated.
        in_turns(WAYS, 2, measure)
        samples = dict(zip(WAYS, in_turns(WAYS, rounds, measure), strict=True))
    return [compared(way, samples) for way in WAYS if way.service is not RANDOM]


def tables() -> list[Result]:
    """How long the agent takes for Maglev's tables."""
    names = [b"%05d" % i for i in range(TABLE_BACKENDS)]
    equal, weighted = [1] * TABLE_BACKENDS, [WEIGHTS[i % len(WEIGHTS)] for i in range(TABLE_BACKENDS)]
    found = []
    for size in TABLE_SIZES[1:]:
        for label, weights in (("", equal), (", weighted", weighted)):
            took = [_milliseconds(names, weights, size) for _ in range(TABLE_BUILDS)]
            detail = f"median of {min(took):.0f} to {max(took):.0f}"
            what = f"table of {size} for {TABLE_BACKENDS:,} backends{label}"
            found.append(at_most(what, statistics.median(took), "ms", TABLE_GOAL, detail))
    return found


def _milliseconds(names: list[bytes], weights: list[int], size: int) -> float:
    began = time.perf_counter()
    maglev.table(names, weights, size)
    return (time.perf_counter() - began) * 1000


def run(rounds: int) -> list[Result]:
    return choices(rounds) + tables()
