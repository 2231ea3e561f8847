"""What programs have cached of frontends (bpf/lib/frontend_cache.h) never outlives a change of these.

The tests write lines of the cache themselves: valid ones that lead astray show that programs read it, and that
they do no more after any change.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

import pytest

from ebpfproxy.datapath.abi import layout
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.maps import MapSet
from tests.e2e.two_node_cluster import NODE_PORT, SERVICE_IPS, SLICE_PORTS, TwoNodeCluster
from tests.field.frontend_lines import (
    FACTORS,
    LINE,
    RANGE_OF_BACKENDS,
    generation_of,
    key_sum,
    key_words,
    line_of,
    mix,
    place_of,
    range_generation_of,
    range_in,
    service_at,
    without_range,
    write,
)
from tests.field.records import maps_of
from tests.lab import Agent, Lab, clients, manifests
from tests.lab.waiting import until

pytestmark = pytest.mark.root

#: Its backends are w1 and w2, those of the other one w1 alone.
IP, IP6 = SERVICE_IPS["v4"], SERVICE_IPS["v6"]
OTHER = "10.96.0.40"
MOVED, MOVED6 = "10.96.0.60", "fd00:10:96::60"


def lead_astray(cluster: TwoNodeCluster, host: str = IP) -> None:
    """Connections to the host go to the other Service, as long as the line counts."""
    with maps_of(cluster.a) as maps:
        until_cached(maps)
        key = key_words(host, 80)
        write(maps, key, line_of(key, service_at(maps, OTHER, 80), generation_of(maps)))


def until_cached(maps: MapSet) -> None:
    """The agent has all frontends cached after their last change: afterwards lines of tests stay."""

    def is_cached() -> bool:
        key, service = key_words(OTHER, 80), service_at(maps, OTHER, 80)
        line = maps["frontend_cache"].lookup(place_of(maps, key))
        word = LINE.unpack(line or bytes(LINE.size))[6]
        is_valid = line == line_of(
            key, service, generation_of(maps), word, range_generation_of(maps, service)
        )
        # Programs at sockets cache ranges of slots.
        return is_valid and bool(layout.selection_range(word)[1] & RANGE_OF_BACKENDS)

    until(is_cached, "frontends are not cached")
    # The others of the same run.
    time.sleep(0.05)


def spread(cluster: TwoNodeCluster, host: str = IP) -> set[str]:
    return set(cluster.client.call(clients.spread_tcp, host, 80, clients.ENOUGH))


def name_at(cluster: TwoNodeCluster, host: str) -> str:
    """The backend that a connection reaches, or the error."""
    try:
        return str(cluster.client.call(clients.ask_tcp, host, 80, 0.5)["name"])
    except OSError as error:
        return type(error).__name__


class MovingCluster(TwoNodeCluster):
    def write_moving(self, name: str, pod: str) -> None:
        """Writes a Service of the cluster IPs that move, and forgets the one that had them before."""
        server = self.w1 if pod == "w1" else self.w2
        slices = [
            manifests.slice_of(name, [manifests.endpoint(address, server.node.name)], ports=SLICE_PORTS)
            for address in (server.address, server.address6)
        ]
        ports = [{"name": "http", "port": 80, "protocol": "TCP"}]
        manifests.write(
            self.manifests / "moving.yaml",
            manifests.service(name, clusterIPs=[MOVED, MOVED6], ports=ports),
            *slices,
        )

    def remove_moving(self) -> None:
        (self.manifests / "moving.yaml").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[MovingCluster]:
    with Lab() as lab:
        yield MovingCluster(lab)


@pytest.fixture(scope="module")
def agent(cluster: MovingCluster) -> Agent:
    # Comparisons with what the agent has written would end lines of tests.
    return cluster.agent("--drift-check-seconds", "0").start()


@pytest.mark.parametrize("host", [IP, IP6, SERVICE_IPS["mapped"]])
def test_found_frontends_are_cached(cluster: MovingCluster, agent: Agent, host: str) -> None:
    assert spread(cluster, host) == {"w1", "w2"}
    with maps_of(cluster.a) as maps:
        key = key_words(IP if host != IP6 else IP6, 80)
        service = service_at(maps, IP if host != IP6 else IP6, 80)
        found = maps["frontend_cache"].lookup(place_of(maps, key))
        assert without_range(found) == without_range(line_of(key, service, generation_of(maps)))
        assert range_in(maps, IP if host != IP6 else IP6, 80)[1] == 2


def test_node_ports_are_cached_and_found_at_the_node_only(cluster: MovingCluster, agent: Agent) -> None:
    found = Counter(cluster.client.call(clients.spread_tcp, cluster.a.address, NODE_PORT, clients.ENOUGH))
    assert set(found) == {"w1", "w2"}
    with maps_of(cluster.a) as maps:
        key = key_words("0.0.0.0", NODE_PORT)
        line = line_of(key, service_at(maps, "0.0.0.0", NODE_PORT), generation_of(maps))
        assert without_range(maps["frontend_cache"].lookup(place_of(maps, key))) == without_range(line)


@pytest.mark.parametrize("host", [IP, IP6])
def test_line_counts_until_any_frontend_changes(cluster: MovingCluster, agent: Agent, host: str) -> None:
    lead_astray(cluster, host)
    assert spread(cluster, host) == {"w1"}
    with maps_of(cluster.a) as maps:
        before = generation_of(maps)
        cluster.write_moving("moving", "w2")
        until(lambda: generation_of(maps) != before, "the generation stays")
    until(lambda: spread(cluster, host) == {"w1", "w2"}, "the line still counts")
    cluster.remove_moving()
    until(lambda: name_at(cluster, MOVED) != "w2", "the frontend is still there")


@pytest.mark.parametrize("word", range(6))
def test_torn_line_is_ignored_and_replaced(cluster: MovingCluster, agent: Agent, word: int) -> None:
    """It has a word of another line."""
    with maps_of(cluster.a) as maps:
        key, generation = key_words(IP, 80), generation_of(maps)
        own = line_of(key, service_at(maps, IP, 80), generation)
        other = line_of(key_words(OTHER, 81), service_at(maps, OTHER, 80)[:8] + b"\x05" * 8, generation)
        words = list(LINE.unpack(own))
        words[word] = LINE.unpack(other)[word] ^ (1 if LINE.unpack(other)[word] == words[word] else 0)
        write(maps, key, LINE.pack(*words))
        assert spread(cluster) == {"w1", "w2"}
        assert without_range(maps["frontend_cache"].lookup(place_of(maps, key))) == without_range(own)


def test_colliding_frontends_are_found(cluster: MovingCluster, agent: Agent) -> None:
    """A valid line of another frontend stays there."""
    with maps_of(cluster.a) as maps:
        key, other = key_words(IP, 80), key_words(OTHER, 80)
        line = line_of(other, service_at(maps, OTHER, 80), generation_of(maps))
        write(maps, key, line)
        assert spread(cluster) == {"w1", "w2"}
        assert maps["frontend_cache"].lookup(place_of(maps, key)) == line
        write(maps, key, bytes(LINE.size))


def test_frontend_is_removed_added_again_and_moves_to_another_service(
    cluster: MovingCluster, agent: Agent
) -> None:
    for name, pod in (("moving", "w1"), ("moving", "w2"), ("other", "w1"), ("moving", "w2")):
        cluster.write_moving(name, pod)
        for host in (MOVED, MOVED6):
            until(lambda host=host, pod=pod: name_at(cluster, host) == pod, f"{host} is not {pod}")  # type: ignore[misc]
        assert [name_at(cluster, host) for host in (MOVED, MOVED6)] == [pod, pod]
    cluster.remove_moving()
    for host in (MOVED, MOVED6):
        until(lambda host=host: name_at(cluster, host) != "w2", f"{host} is still there")  # type: ignore[misc]


def test_changed_endpoints_leave_the_generation(cluster: MovingCluster, agent: Agent) -> None:
    cluster.write_moving("moving", "w1")
    until(lambda: name_at(cluster, MOVED) == "w1", "the frontend is missing")
    with maps_of(cluster.a) as maps:
        before = generation_of(maps)
        cluster.write_moving("moving", "w2")
        until(lambda: name_at(cluster, MOVED) == "w2", "the endpoint is the former one")
        assert generation_of(maps) == before
    cluster.remove_moving()


@pytest.mark.parametrize("same", ["sum", "mixed"])
def test_halves_of_two_lines_whose_keys_are_alike_are_no_line(
    cluster: MovingCluster, agent: Agent, same: str
) -> None:
    """Highest bits of two words cancel out, in any sum of odd multiples, and where a round mixes them in."""
    with maps_of(cluster.a) as maps:
        until_cached(maps)
        key, generation = key_words(IP6, 80), generation_of(maps)
        upper = 1 << 63 if same == "sum" else 1 << 63 | 1 << 31
        crafted = (key[0] ^ upper, key[1] ^ 1 << 63, key[2])
        assert (key_sum(crafted) == key_sum(key)) is (same == "sum")
        assert (mix(generation ^ FACTORS[4], *crafted) == mix(generation ^ FACTORS[4], *key)) is (
            same == "mixed"
        )
        astray = service_at(maps, OTHER, 80)
        write(maps, key, line_of(key, astray, generation))
        assert spread(cluster, IP6) == {"w1"}
        torn = LINE.unpack(line_of(crafted, astray, generation))
        write(maps, key, LINE.pack(*key, *torn[3:]))
        assert spread(cluster, IP6) == {"w1", "w2"}


@pytest.mark.parametrize("is_of_backends", [False, True])
def test_cached_range_counts_until_the_service_s_endpoints_change(
    cluster: MovingCluster, agent: Agent, is_of_backends: bool
) -> None:
    other = ask_range(cluster, OTHER)
    with maps_of(cluster.a) as maps:
        until_cached(maps)
        key, service = key_words(IP, 80), service_at(maps, IP, 80)
        if is_of_backends:
            (slot,) = maps.selections().slots(other)
            word = layout.selection_word(slot & 0xFFFFFFFF, 1 | RANGE_OF_BACKENDS)
        else:
            word = layout.selection_word(*other)
        line = line_of(key, service, generation_of(maps), word, range_generation_of(maps, service))
        write(maps, key, line)
        assert spread(cluster) == {"w1"}
        before = range_generation_of(maps, service)
        cluster.write_web(cluster.w2)
        until(lambda: range_generation_of(maps, service) != before, "the range still counts")
        until(lambda: spread(cluster) == {"w2"}, "the range still counts")
        cluster.write_web(cluster.w1, cluster.w2)
        until(lambda: spread(cluster) == {"w1", "w2"}, "the endpoints are the former ones")


def ask_range(cluster: MovingCluster, host: str) -> tuple[int, int]:
    with maps_of(cluster.a) as maps:
        service = layout.unpack_service(service_at(maps, host, 80))
        return maps.selections().ranges(service.id)[0]


@pytest.mark.parametrize("stale", ["range", "check", "generation", "line"])
def test_range_that_is_not_whole_is_ignored_and_replaced(
    cluster: MovingCluster, agent: Agent, stale: str
) -> None:
    """It has a word of another range, of another generation, or of the range of another line."""
    other = layout.selection_word(*ask_range(cluster, OTHER))
    with maps_of(cluster.a) as maps:
        until_cached(maps)
        key, service, generation = key_words(IP, 80), service_at(maps, IP, 80), generation_of(maps)
        of_range = range_generation_of(maps, service)
        own = LINE.unpack(
            line_of(key, service, generation, layout.selection_word(*ask_range(cluster, IP)), of_range)
        )
        wrong = LINE.unpack(line_of(key, service, generation, other, of_range))
        if stale == "generation":
            wrong = LINE.unpack(line_of(key, service, generation, other, of_range - 1))
        elif stale == "line":
            line = line_of(key_words(OTHER, 80), service_at(maps, OTHER, 80), generation, other, of_range)
            wrong = LINE.unpack(line)
        taken = {"range": (wrong[6], own[7]), "check": (own[6], wrong[7])}.get(stale, wrong[6:])
        write(maps, key, LINE.pack(*own[:6], *taken))
        assert spread(cluster) == {"w1", "w2"}
        assert range_in(maps, IP, 80)[1] == 2


@pytest.mark.parametrize("what", ["frontend_generation", "range_generations"])
def test_line_does_not_count_while_a_change_is_being_made(
    cluster: MovingCluster, agent: Agent, what: str
) -> None:
    """Nor is it replaced: what programs find may be what was there before. An agent may be killed meanwhile."""
    other = layout.selection_word(*ask_range(cluster, OTHER))
    with maps_of(cluster.a) as maps:
        until_cached(maps)
        key, service = key_words(IP, 80), service_at(maps, IP, 80)
        line = line_of(key, service, generation_of(maps), other, range_generation_of(maps, service))
        write(maps, key, line)
        assert spread(cluster) == {"w1"}
        words = maps.shared(what).words()
        at = 0 if what == "frontend_generation" else layout.unpack_service(service).id
        words[at % len(words)] |= 1
        try:
            assert spread(cluster) == {"w1", "w2"}
            assert maps["frontend_cache"].lookup(place_of(maps, key)) == line
        finally:
            words[at % len(words)] ^= 1
        assert spread(cluster) == {"w1"}
        write(maps, key, bytes(LINE.size))


def test_agent_caches_all_frontends_after_a_change(cluster: MovingCluster, agent: Agent) -> None:
    """Nobody has to connect first. Slots with successive backend ids need not be read."""
    cluster.write_moving("moving", "w2")
    until(lambda: name_at(cluster, MOVED) == "w2", "the frontend is missing")
    with maps_of(cluster.a) as maps:

        def cached(host: str, port: int) -> bool:
            key = key_words(host, port)
            line = line_of(key, service_at(maps, host, port), generation_of(maps))
            found = maps["frontend_cache"].lookup(place_of(maps, key))
            return without_range(found) == without_range(line)

        for host, port in ((IP, 80), (IP6, 80), (OTHER, 80), (MOVED6, 80), ("0.0.0.0", NODE_PORT)):
            until(lambda host=host, port=port: cached(host, port), f"{host}:{port} is not cached")  # type: ignore[misc]
        base, count, is_of_backends = range_in(maps, OTHER, 80)
        (slot,) = maps.selections().slots(ask_range(cluster, OTHER))
        assert (base, count, is_of_backends) == (slot & 0xFFFFFFFF, 1, True)
    cluster.remove_moving()


def test_sockets_choose_apart_although_the_random_sequence_is_set_back(
    cluster: MovingCluster, agent: Agent
) -> None:
    """A program that is preempted between read and store of the sequence does that."""
    with maps_of(cluster.a) as maps:
        fd, cpus = maps["random_state"].fd, bpf.possible_cpus()
        places = [layout.U32.pack(number) for number in range(layout.RANDOM_SEQUENCES)]
        names = set()
        for _ in range(clients.ENOUGH):
            for place in places:
                bpf.map_update(fd, place, layout.U64.pack(1 << 40) * cpus)
            names.add(name_at(cluster, IP))
        assert names == {"w1", "w2"}
        # What sockets draw does not set back the sequence of packets.
        of_packets, of_sockets = (bpf.map_lookup(fd, place, layout.U64.size * cpus) for place in places)
        assert of_packets == layout.U64.pack(1 << 40) * cpus
        assert of_sockets != of_packets


def test_what_programs_found_before_a_foreign_change_was_undone_does_not_last(
    cluster: MovingCluster, agent: Agent
) -> None:
    """The comparison finds nothing to repair, and the frontends do not change."""
    agent.stop()
    with_checks = cluster.agent("--drift-check-seconds", "1").start()
    lead_astray(cluster)
    until(lambda: spread(cluster) == {"w1", "w2"}, "the line still counts")
    with_checks.stop()
    agent.start()


def test_killed_agent_s_successor_makes_lines_invalid(cluster: MovingCluster, agent: Agent) -> None:
    """An agent may be killed between a change of the tables and the new generation."""
    lead_astray(cluster)
    agent.kill()
    assert spread(cluster) == {"w1"}
    cluster.agent("--drift-check-seconds", "0").start()
    assert spread(cluster) == {"w1", "w2"}
