"""The reflector against a server that does to it what API servers and networks do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ebpfproxy.kube.client import ApiConnection
from ebpfproxy.kube.reflector import Reflector, Timing
from ebpfproxy.kube.status import State
from ebpfproxy.objects import Changed, Deleted, Event, ObjectKey, Replaced, Resource
from tests.apiserver import ApiServer, Fault, objects

QUICK = Timing(backoff_first=0.02, backoff_most=0.1, watch=300, idle=0.5, list_wait=0.5)
KEY = ObjectKey("load", "a")


class Follower:
    """Who listens to a reflector: what it knows, and what it was told."""

    def __init__(self, server: ApiServer, **options: Any) -> None:
        self.events: list[Event] = []
        self.known: dict[ObjectKey, object] = {}
        connection = ApiConnection.from_options(None, server.url)
        options.setdefault("timing", QUICK)
        self.reflector = Reflector(connection, Resource.SERVICES, self._tell, **options)

    def _tell(self, event: Event) -> None:
        if isinstance(event, Replaced):
            self.known = dict(event.objects)
        elif isinstance(event, Changed):
            self.known[event.key] = event.object
        else:
            self.known.pop(event.key, None)
        self.events.append(event)

    @property
    def names(self) -> set[str]:
        return {key.name for key in self.known}

    def count(self, kind: type[Event]) -> int:
        return sum(isinstance(event, kind) for event in self.events)

    def failures(self, reason: str) -> int:
        return self.reflector.status.failures.get(reason, 0)

    def until(self, condition: Callable[[], bool], what: str = "it did not happen") -> None:
        deadline = time.monotonic() + 8
        while not condition():
            assert time.monotonic() < deadline, f"{what}: {self.reflector.status} {self.names}"
            time.sleep(0.005)


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as made:
        for name in ("a", "b"):
            made.store.put("services", objects.service(name, "10.96.0.1"))
        yield made


@pytest.fixture(params=["streaming", "pages"])
def follower(request: pytest.FixtureRequest, server: ApiServer) -> Iterator[Follower]:
    """After its first list, by either kind of list."""
    server.streaming_list = request.param == "streaming"
    made = Follower(server)
    made.reflector.start()
    made.until(lambda: made.names == {"a", "b"})
    made.until(lambda: any(p.get("watch") for _, p in server.requests))
    yield made
    made.reflector.stop()


def still_works(server: ApiServer, follower: Follower) -> None:
    name = f"later-{len(follower.events)}"
    server.store.put("services", objects.service(name, "10.96.0.9"))
    follower.until(lambda: name in follower.names, "changes do not come any more")
    follower.until(lambda: follower.reflector.status.state is State.CONNECTED)


def test_first_one_list_then_changes_as_they_happen(server: ApiServer, follower: Follower) -> None:
    assert follower.count(Replaced) == 1
    server.store.put("services", objects.service("c", "10.96.0.3"))
    server.store.put("services", objects.service("a", "10.96.0.4"))
    server.store.delete("services", "load", "b")
    follower.until(lambda: follower.names == {"a", "c"})
    assert [type(event) for event in follower.events] == [Replaced, Changed, Changed, Deleted]
    assert follower.known[KEY].spec.cluster_ip == "10.96.0.4"  # type: ignore[attr-defined]


def test_a_list_of_many_pages_is_one_event(server: ApiServer) -> None:
    for i in range(1201):
        server.store.put("services", objects.service(f"s{i}", "10.96.0.1"))
    server.streaming_list = False
    follower = Follower(server)
    follower.reflector.start()
    follower.until(lambda: len(follower.known) == 1203)
    assert follower.count(Replaced) == 1
    lists = [p for _, p in server.requests if "limit" in p]
    assert [("continue" in p) for p in lists] == [False, True, True]
    follower.reflector.stop()


def test_a_continue_token_that_expires_starts_the_list_again(server: ApiServer) -> None:
    for i in range(600):
        server.store.put("services", objects.service(f"s{i}", "10.96.0.1"))
    server.streaming_list = False
    follower = Follower(server)
    original = server.take_fault
    hits = iter([None, None, "410"])

    def second_page_fails(resource: str, *, stream: bool) -> Any:
        kind = next(hits, None) if not stream else None
        return Fault(kind) if kind else original(resource, stream=stream)

    server.take_fault = second_page_fails  # type: ignore[method-assign]
    follower.reflector.start()
    follower.until(lambda: len(follower.known) == 602)
    assert follower.failures("expired") == 1
    follower.reflector.stop()


def test_selectors_are_sent(server: ApiServer) -> None:
    meshed = objects.service("meshed", "10.96.0.3")
    meshed["metadata"]["labels"]["service.kubernetes.io/service-proxy-name"] = "mesh"
    server.store.put("services", meshed)
    follower = Follower(server, label_selector="!service.kubernetes.io/service-proxy-name")
    follower.reflector.start()
    follower.until(lambda: follower.names == {"a", "b"})
    follower.reflector.stop()


@pytest.mark.parametrize("kind", ["500", "503", "403", "html", "close"])
def test_a_failing_watch_is_taken_up_where_it_was(server: ApiServer, follower: Follower, kind: str) -> None:
    server.fail(kind, times=3)
    server.drop_connections()
    still_works(server, follower)
    assert follower.count(Replaced) == 1, "nothing is listed again"


@pytest.mark.parametrize("kind", ["cut", "garbage", "silence"])
def test_a_broken_stream_is_taken_up_where_it_was(server: ApiServer, follower: Follower, kind: str) -> None:
    fault = server.fail(kind)
    follower.until(lambda: fault.times <= 0)
    still_works(server, follower)
    assert follower.count(Replaced) == 1
    reason = {"cut": "truncated", "garbage": "garbled", "silence": "idle"}[kind]
    follower.until(lambda: follower.failures(reason) + follower.failures("connection") >= 1)


def test_a_server_that_answers_nothing_is_left_after_a_while(server: ApiServer, follower: Follower) -> None:
    server.fail("hang", times=2)
    server.drop_connections()
    still_works(server, follower)


@pytest.mark.parametrize("how", ["in the stream", "as a status"])
def test_410_lists_again_and_nothing_known_vanishes_meanwhile(
    server: ApiServer, follower: Follower, how: str
) -> None:
    if how == "in the stream":
        server.fail("expire")
    else:
        server.fail("410")
        server.drop_connections()
    follower.until(lambda: follower.count(Replaced) == 2)
    assert follower.names == {"a", "b"}
    assert follower.count(Deleted) == 0
    still_works(server, follower)


def test_what_was_deleted_while_away_is_missing_from_the_new_list(
    server: ApiServer, follower: Follower
) -> None:
    server.fail("500", times=5)
    server.drop_connections()
    server.store.delete("services", "load", "b")
    server.store.compact()
    follower.until(lambda: follower.names == {"a"})
    still_works(server, follower)


def test_retry_after_is_honoured(server: ApiServer, follower: Follower) -> None:
    server.fail("429", retry_after=1)
    began = time.monotonic()
    server.drop_connections()
    follower.until(lambda: follower.failures("429") == 1)
    server.requests.clear()
    still_works(server, follower)
    assert time.monotonic() - began >= 1.0


def test_while_the_server_is_away_everything_known_stays(server: ApiServer, follower: Follower) -> None:
    server.fail("close", times=1_000_000)
    server.drop_connections()
    follower.until(lambda: follower.reflector.status.state is State.FAILING)
    time.sleep(0.3)
    assert follower.names == {"a", "b"}
    assert follower.reflector.status.error
    server.heal()
    still_works(server, follower)


def test_one_line_when_it_begins_to_fail_and_one_when_it_works(
    server: ApiServer, follower: Follower, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ebpfproxy")
    server.fail("500", times=6)
    server.drop_connections()
    follower.until(lambda: follower.failures("500") == 6)
    still_works(server, follower)
    lines = [r.getMessage() for r in caplog.records if r.levelname in ("INFO", "WARNING")]
    assert lines == ["watch is failing, what is known stays in force", "watch is connected"]


def test_an_object_that_cannot_be_decoded_is_lost_alone(
    server: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    bad = objects.service("bad", "10.96.0.3")
    bad["spec"]["ports"][0]["port"] = "eighty"
    server.store.put("services", bad)
    for streaming in (True, False):
        server.streaming_list = streaming
        follower = Follower(server)
        follower.reflector.start()
        follower.until(lambda follower=follower: follower.names == {"a", "b"})  # type: ignore[misc]
        first = follower.events[0]
        assert isinstance(first, Replaced)
        assert first.unreadable == {ObjectKey("load", "bad")}
        server.store.put("services", bad)
        still_works(server, follower)
        follower.reflector.stop()
        server.store.delete("services", "load", next(n for n in follower.names if n.startswith("later")))
    lines = [r for r in caplog.records if "cannot be decoded" in r.getMessage()]
    assert len(lines) == 2, "one for each reflector, not one for each time"
    facts = lines[0].ebpfproxy_facts  # type: ignore[attr-defined]
    assert facts["object"] == "load/bad"
    assert facts["error"] == "spec.ports[0].port: Expected `int`, got `str`"


def test_bookmarks_move_the_version_on(server: ApiServer) -> None:
    server.bookmark_seconds = 0.1
    follower = Follower(server)
    follower.reflector.start()
    follower.until(lambda: follower.names == {"a", "b"})
    # Other resources' changes move the server's version; only bookmarks tell this watch.
    server.store.put("nodes", objects.node("x"))
    time.sleep(0.4)
    server.store.compact()
    server.requests.clear()
    server.drop_connections()
    still_works(server, follower)
    assert follower.count(Replaced) == 1, "the bookmark's version was recent enough"
    follower.reflector.stop()


def test_a_watch_that_the_server_ends_in_time_goes_on(server: ApiServer) -> None:
    follower = Follower(server, timing=Timing(backoff_first=0.01, watch=1, idle=5))
    follower.reflector.start()
    follower.until(lambda: sum("resourceVersion" in p for _, p in server.requests) >= 1)
    still_works(server, follower)
    assert follower.reflector.status.failures == {}
    follower.reflector.stop()


def test_a_large_object_comes_whole(server: ApiServer, follower: Follower) -> None:
    ports = [{"name": f"p{n}", "port": n + 1, "protocol": "TCP"} for n in range(5000)]
    server.store.put("services", objects.service("large", "10.96.0.3", ports=ports))
    follower.until(lambda: "large" in follower.names)
    large = follower.known[ObjectKey("load", "large")]
    assert len(large.spec.ports) == 5000  # type: ignore[attr-defined]
