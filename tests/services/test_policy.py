"""The policy function against the written rules, implemented here literally."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ebpfproxy.services.endpoints import Traits
from ebpfproxy.services.model import Backend, Protocol
from ebpfproxy.services.policy import usable_endpoints

NODE = "node-a"

#: An endpoint is ready, draining or neither.
conditions = st.sampled_from([(True, False), (False, True), (False, False)])
traits = st.builds(
    lambda condition, **other: Traits(*condition, **other),
    conditions,
    local=st.booleans(),
    zones=st.lists(st.sampled_from(["z1", "z2"]), max_size=2, unique=True).map(tuple),
    nodes=st.lists(st.sampled_from([NODE, "node-b"]), max_size=2, unique=True).map(tuple),
)
backends = st.integers(1, 40).map(lambda n: Backend(bytes([10, 0, 0, n]), 80, Protocol.TCP))
populations = st.dictionaries(backends, traits, max_size=12)
zones = st.sampled_from([None, "z1", "z3"])


def naive_cluster(population: dict[Backend, Traits], zone: str | None) -> set[Backend]:
    ready = {b: c for b, c in population.items() if c.ready}
    if not ready:
        return {b for b, c in population.items() if c.draining}
    if all(c.nodes for c in ready.values()) and any(NODE in c.nodes for c in ready.values()):
        return {b for b, c in ready.items() if NODE in c.nodes}
    if (
        zone is not None
        and all(c.zones for c in ready.values())
        and any(zone in c.zones for c in ready.values())
    ):
        return {b for b, c in ready.items() if zone in c.zones}
    return set(ready)


def naive_local(population: dict[Backend, Traits]) -> set[Backend]:
    ready = {b for b, c in population.items() if c.local and c.ready}
    return ready or {b for b, c in population.items() if c.local and c.draining}


@given(populations, zones)
def test_sets_equal_those_of_the_written_rules(population: dict[Backend, Traits], zone: str | None) -> None:
    usable = usable_endpoints(population, NODE, zone)
    assert set(usable.cluster) == naive_cluster(population, zone)
    assert set(usable.local) == naive_local(population)


@given(populations, zones)
def test_every_terminating_endpoint_is_accounted_for(
    population: dict[Backend, Traits], zone: str | None
) -> None:
    usable = usable_endpoints(population, NODE, zone)
    leaving = {b for b, c in population.items() if c.draining}
    used = {*usable.cluster, *usable.local}
    assert set(usable.draining) == leaving - used
    assert set(usable.terminating) == leaving & used
    assert set(usable.idle) == {b for b, c in population.items() if not c.ready and not c.draining}


@given(populations, zones)
def test_sets_are_sorted_and_empty_only_without_usable_endpoints(
    population: dict[Backend, Traits], zone: str | None
) -> None:
    usable = usable_endpoints(population, NODE, zone)
    for backends in (usable.cluster, usable.local, usable.draining, usable.idle):
        assert list(backends) == sorted(set(backends))
    assert bool(usable.cluster) == any(c.ready or c.draining for c in population.values())


@given(populations, zones, st.randoms())
def test_the_order_of_endpoints_does_not_matter(
    population: dict[Backend, Traits], zone: str | None, order: object
) -> None:
    items = list(population.items())
    order.shuffle(items)  # type: ignore[attr-defined]
    assert usable_endpoints(dict(items), NODE, zone) == usable_endpoints(population, NODE, zone)
