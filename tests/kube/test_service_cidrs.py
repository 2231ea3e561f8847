"""ServiceCIDRs, a resource that an API server may lack or forbid."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest

from ebpfproxy.kube.client import ApiConnection
from ebpfproxy.kube.objects import Deleted, Event, ObjectKey, Replaced, Resource
from ebpfproxy.kube.source_status import State
from ebpfproxy.kube.watch.reflector import Reflector
from tests.apiserver import ApiServer
from tests.kube.follower import QUICK

V1 = "/apis/networking.k8s.io/v1/servicecidrs"
BETA = "/apis/networking.k8s.io/v1beta1/servicecidrs"
NAME = ObjectKey("", "kubernetes")


class Watch:
    """A reflector of ServiceCIDRs that retries soon."""

    def __init__(self, server: ApiServer) -> None:
        self.events: list[Event] = []
        self.reflector = Reflector(
            ApiConnection.from_options(None, server.url),
            Resource.SERVICECIDRS,
            self.events.append,
            timing=msgspec.structs.replace(QUICK, absent=0.05),
        )

    def until(self, happens: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 8
        while not happens():
            assert time.monotonic() < deadline, (self.events, self.reflector.status)
            time.sleep(0.005)

    @property
    def state(self) -> State:
        return self.reflector.status.state

    @property
    def lists(self) -> list[set[ObjectKey]]:
        return [set(e.objects) for e in self.events if isinstance(e, Replaced)]


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as made:
        made.store.put(
            "servicecidrs", {"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/12"]}}
        )
        yield made


@pytest.fixture
def watch(server: ApiServer) -> Iterator[Watch]:
    made = Watch(server)
    yield made
    made.reflector.stop()


def test_service_cidrs_are_followed(server: ApiServer, watch: Watch) -> None:
    watch.reflector.start()
    watch.until(lambda: watch.lists == [{NAME}])
    server.store.delete("servicecidrs", "", "kubernetes")
    watch.until(lambda: any(isinstance(e, Deleted) for e in watch.events))


def test_missing_resource_is_logged_once_and_retried(
    server: ApiServer, watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server.unserved |= {V1, BETA}
    watch.reflector.start()
    watch.until(lambda: watch.reflector.status.failures.get("404", 0) >= 6)
    assert watch.state is State.ABSENT
    assert watch.lists == [set()], "the start does not wait for it"
    assert [r.getMessage() for r in caplog.records].count(
        "API server has no such resource for us, using configured values"
    ) == 1
    assert {path for path, _ in server.requests} == {V1, BETA}
    server.unserved.clear()  # The server is upgraded.
    watch.until(lambda: watch.lists == [set(), {NAME}])
    watch.until(lambda: watch.state is State.CONNECTED)


def test_beta_version_is_used_until_the_server_has_v1(server: ApiServer, watch: Watch) -> None:
    server.unserved.add(V1)
    watch.reflector.start()
    watch.until(lambda: watch.lists == [{NAME}])
    server.unserved = {BETA}
    server.drop_connections()
    watch.until(lambda: watch.lists[-1] == {NAME} and len(watch.lists) == 2)
    assert set() not in watch.lists


def test_403_does_not_delay_the_start_and_keeps_known_cidrs(server: ApiServer, watch: Watch) -> None:
    server.denied.add("servicecidrs")
    watch.reflector.start()
    watch.until(lambda: watch.state is State.ABSENT)
    assert watch.lists == [set()]
    server.denied.clear()
    watch.until(lambda: watch.lists == [set(), {NAME}])
    server.denied.add("servicecidrs")
    server.drop_connections()
    watch.until(lambda: watch.state is State.ABSENT)
    assert watch.lists == [set(), {NAME}]
