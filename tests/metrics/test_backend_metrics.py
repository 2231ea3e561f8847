"""Metrics of the backends of Services, from real maps that the writer changes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry

from ebpfproxy.config.datapath import BPFFS
from ebpfproxy.datapath.abi.layout import REJECTIONS, U32, U64
from ebpfproxy.datapath.kernel.roots import ensure_bpffs
from ebpfproxy.metrics.map_metrics import MapCollector
from ebpfproxy.services.model import Policy, ServicePort
from tests.datapath.writing import FEW_IDS, Bench, port

pytestmark = pytest.mark.root


@pytest.fixture
def bench() -> Iterator[Bench]:
    ensure_bpffs(BPFFS)
    folder = BPFFS / f"test-backend-metrics-{os.getpid()}"
    folder.mkdir()
    made = Bench(folder)
    made.empty(FEW_IDS)
    yield made
    made.close()
    shutil.rmtree(folder)


def choose(bench: Bench, of: ServicePort, times: int = 1) -> None:
    """Connections that got a backend."""
    assert bench.maps is not None
    bench.maps["service_choices"].update(U32.pack(bench.service_ids[of.key]), U64.pack(times))


def collector(bench: Bench, services: int = 1, *, backends: bool = False) -> MapCollector:
    assert bench.maps is not None
    return MapCollector(bench.maps, services, backends=backends)


def samples(made: MapCollector) -> dict[tuple[str, ...], float]:
    """By name, Service, and what changes or the address."""
    registry = CollectorRegistry()
    registry.register(made)
    return {
        (
            sample.name.removeprefix("ebpfproxy_service_"),
            sample.labels["service"],
            *(sample.labels[each] for each in ("change", "address") if each in sample.labels),
        ): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name.startswith("ebpfproxy_service_backend")
    }


def test_services_with_connections_have_the_number_of_their_backends(bench: Bench) -> None:
    """Those of both policies count once, and those that only serve old connections do not."""
    web, quiet = port("web", [1, 2], [2, 3], external=Policy.LOCAL, terminating=(4,)), port("api", [5])
    bench.writer.apply([web, quiet])
    choose(bench, web)
    assert samples(collector(bench)) == {
        ("backends", "web"): 3,
        ("backend_changes_total", "web", "added"): 0,
        ("backend_changes_total", "web", "removed"): 0,
    }


def test_a_service_that_only_refuses_has_none(bench: Bench) -> None:
    empty = port("web", [])
    bench.writer.apply([empty])
    assert bench.maps is not None
    REJECTIONS.pack_into(
        bench.maps.shared("service_rejections").bytes, bench.service_ids[empty.key] * REJECTIONS.size, 1, 0
    )
    assert samples(collector(bench))["backends", "web"] == 0


def test_a_rollout_counts_what_came_and_what_went(bench: Bench) -> None:
    bench.writer.apply([port("web", [1, 2, 3])])
    choose(bench, port("web", []))
    made = collector(bench)
    # What is there at first is no change.
    assert samples(made)["backend_changes_total", "web", "added"] == 0
    for cluster, leaving in (([1, 2, 3, 4], ()), ([2, 3, 4], (1,)), ([3, 4, 5], (2,)), ([3, 4, 5], ())):
        bench.writer.apply([port("web", cluster, terminating=leaving)])
        samples(made)
    found = samples(made)
    assert found["backends", "web"] == 3
    assert found["backend_changes_total", "web", "added"] == 2
    assert found["backend_changes_total", "web", "removed"] == 2


def test_a_service_that_is_made_again_begins_anew(bench: Bench) -> None:
    web = port("web", [1])
    made = collector(bench)
    bench.writer.apply([web])
    choose(bench, web)
    samples(made)
    bench.writer.apply([], [web.key])
    assert samples(made) == {}
    bench.writer.apply([port("web", [2, 3])])
    choose(bench, web)
    assert samples(made)["backends", "web"] == 2
    assert samples(made)["backend_changes_total", "web", "added"] == 0


def test_backends_of_the_busiest_are_named_where_that_is_wanted(bench: Bench) -> None:
    web, api = port("web", [1, 2]), port("api", [2, 3])
    bench.writer.apply([web, api])
    choose(bench, web, 2)
    choose(bench, api, 1)

    def named(made: MapCollector) -> set[tuple[str, ...]]:
        return {key[1:] for key in samples(made) if key[0] == "backend_info"}

    assert named(collector(bench, 1)) == set()
    of_web = {("web", "10.0.0.1:80"), ("web", "10.0.0.2:80")}
    assert named(collector(bench, 1, backends=True)) == of_web
    assert named(collector(bench, 50, backends=True)) == of_web | {
        ("api", "10.0.0.2:80"),
        ("api", "10.0.0.3:80"),
    }
