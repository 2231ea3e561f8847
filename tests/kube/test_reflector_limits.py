"""A reflector neither retries in a hot loop, nor logs without limit, nor stops, whatever a server does."""

from __future__ import annotations

import time

import pytest

from ebpfproxy.kube.backoff import Backoff
from ebpfproxy.kube.objects import Object, ObjectKey, Replaced, Service
from ebpfproxy.kube.source_status import State
from ebpfproxy.kube.watch.reflector import Timing
from tests.apiserver import ApiServer, objects
from tests.kube.follower import QUICK, Follower, still_works

FOREVER = 1_000_000
#: Waits of a second would give fewer requests, no waits thousands.
STEADY = Timing(backoff_first=0.05, backoff_most=0.2, idle=5, list_wait=5)


@pytest.fixture(params=["streaming", "pages"])
def pages_or_streams(request: pytest.FixtureRequest, server: ApiServer) -> ApiServer:
    server.streaming_list = request.param == "streaming"
    return server


def test_backoff_doubles_up_to_its_maximum_and_half_of_it_is_random() -> None:
    backoff = Backoff(1.0, 5.0)
    for step in (1, 2, 4, 5, 5):
        assert step / 2 <= backoff.next() <= step
    backoff.reset()
    assert backoff.next() <= 1
    assert len({Backoff(1.0, 5.0).next() for _ in range(20)}) > 1


@pytest.mark.parametrize("how", ["410", "expire"])
def test_repeated_410_does_not_cause_a_hot_loop(pages_or_streams: ApiServer, how: str) -> None:
    server = pages_or_streams
    follower = Follower(server, timing=STEADY)
    fault = server.fail(how, times=FOREVER)
    follower.reflector.start()
    follower.until(lambda: follower.failures("expired") >= 3)
    assert follower.reflector.status.state is not State.STARTING
    asked, began = len(server.requests), time.monotonic()
    time.sleep(0.5)
    # Each round waits 25 ms at least, and is a list and a watch.
    assert len(server.requests) - asked <= 2 * (time.monotonic() - began) / 0.025
    server.heal()
    assert fault.times > FOREVER // 2
    still_works(server, follower)
    follower.reflector.stop()


@pytest.mark.parametrize("kind", ["cut", "garbage"])
def test_streams_that_break_at_once_are_not_logged_each_time(
    server: ApiServer, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    caplog.set_level("INFO", "ebpfproxy")
    server.fail(kind, times=FOREVER)
    follower = Follower(server, timing=Timing(backoff_first=0.01, backoff_most=0.02))
    follower.reflector.start()
    reason = {"cut": "truncated", "garbage": "garbled"}[kind]
    follower.until(lambda: follower.failures(reason) + follower.failures("connection") >= 15)
    # These are the list with its failing watch, and the first watch: later accepted streams do not count.
    assert len(caplog.records) <= 4
    assert follower.reflector.status.state is State.FAILING
    server.heal()
    still_works(server, follower)
    follower.reflector.stop()


def test_watch_from_a_future_resource_version_causes_a_relist() -> None:
    """After etcd is restored, versions continue from the backup's, and watches receive no event."""
    first = ApiServer()
    for i in range(50):
        first.store.put("services", objects.service(f"old-{i}", "10.96.0.1"))
    with first:
        follower = Follower(first, timing=Timing(backoff_first=0.02, idle=0.2))
        follower.reflector.start()
        follower.until(lambda: len(follower.known) == 50)
    restored = ApiServer(port=first.port)
    restored.store.put("services", objects.service("new", "10.96.0.2"))
    with restored:
        follower.until(lambda: follower.names == {"new"})
        assert follower.count(Replaced) == 2
        still_works(restored, follower)
        follower.reflector.stop()


def test_idle_watch_after_a_streaming_list_is_not_interrupted(server: ApiServer) -> None:
    """The short timeout of initial events does not apply to later events."""
    follower = Follower(server, timing=Timing(list_wait=1, idle=30))
    follower.reflector.start()
    follower.until(lambda: follower.names == {"a", "b"})
    time.sleep(1.2)
    assert len(server.requests) == 1
    still_works(server, follower)
    assert follower.reflector.status.failures == {}
    follower.reflector.stop()


def test_unfinished_initial_events_fall_back_to_pages_and_later_to_a_stream(
    server: ApiServer,
) -> None:
    follower = Follower(server)
    server.fail("hang", param="sendInitialEvents")
    follower.reflector.start()
    follower.until(lambda: follower.names == {"a", "b"})
    assert [("limit" in p) for _, p in server.requests[:2]] == [False, True]
    server.requests.clear()
    server.fail("expire")
    follower.until(lambda: follower.count(Replaced) == 2)
    assert any("sendInitialEvents" in p for _, p in server.requests)
    follower.reflector.stop()


def test_interrupted_list_is_not_delivered(pages_or_streams: ApiServer) -> None:
    for i in range(20):
        pages_or_streams.store.put("services", objects.service(f"s-{i}", "10.96.0.1"))
    follower = Follower(pages_or_streams)
    pages_or_streams.fail("half", times=3)
    follower.reflector.start()
    follower.until(lambda: len(follower.known) == 22)
    assert follower.count(Replaced) == 1
    assert sum(follower.reflector.status.failures.values()) >= 2
    follower.reflector.stop()


def test_list_interrupted_between_pages_is_not_delivered(server: ApiServer) -> None:
    for i in range(600):
        server.store.put("services", objects.service(f"s-{i}", "10.96.0.1"))
    server.streaming_list = False
    follower = Follower(server)
    server.fail("500", times=2, param="continue")
    follower.reflector.start()
    follower.until(lambda: len(follower.known) == 602)
    assert follower.count(Replaced) == 1
    follower.reflector.stop()


def test_slow_response_does_not_time_out(pages_or_streams: ApiServer) -> None:
    """Each wait for bytes is short, though the whole response takes longer than the timeout."""
    for i in range(30):
        pages_or_streams.store.put("services", objects.service(f"s-{i}", "10.96.0.1"))
    pages_or_streams.fail("slow", times=2, seconds=0.05)
    follower = Follower(pages_or_streams, timing=Timing(list_wait=1, idle=30))
    began = time.monotonic()
    follower.reflector.start()
    follower.until(lambda: len(follower.known) == 32)
    assert time.monotonic() - began > 1
    assert follower.reflector.status.failures == {}
    follower.reflector.stop()


def test_retry_after_of_503_is_honoured_too(server: ApiServer) -> None:
    server.fail("503", retry_after=1)
    follower = Follower(server)
    began = time.monotonic()
    follower.reflector.start()
    follower.until(lambda: follower.names == {"a", "b"})
    assert time.monotonic() - began >= 1.0
    follower.reflector.stop()


def test_an_object_without_a_name_does_not_hide_the_others(pages_or_streams: ApiServer) -> None:
    server = pages_or_streams
    bad = objects.service("bad", "10.96.0.3")
    server.store.put("services", bad)
    with server.store.changed:
        key = ("load", "bad")
        found = server.store._items["services"]
        found[key] = found[key]._replace(body=b'{"metadata":{"name":5},"spec":{}}')
    follower = Follower(server)
    follower.reflector.start()
    follower.until(lambda: follower.names == {"a", "b"})
    first = follower.events[0]
    assert isinstance(first, Replaced)
    assert first.unreadable == {ObjectKey("", "")}
    still_works(server, follower)
    follower.reflector.stop()


def test_object_that_the_reducer_fails_on_does_not_affect_others(
    pages_or_streams: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    """An error in the rules about one object must not remove all Services."""
    server = pages_or_streams

    def reduce(each: Object) -> object:
        assert isinstance(each, Service)
        if each.spec.cluster_ip == "strange":
            raise ZeroDivisionError("unforeseen")
        return each

    server.store.put("services", objects.service("odd", "strange"))
    follower = Follower(server, reduce=reduce)
    follower.reflector.start()
    follower.until(lambda: follower.names == {"a", "b"})
    first = follower.events[0]
    assert isinstance(first, Replaced)
    assert first.unreadable == {ObjectKey("load", "odd")}
    server.store.put("services", objects.service("a", "strange"))
    still_works(server, follower)
    assert "a" in follower.names, "its last known state is kept"
    follower.reflector.stop()
    assert [r.ebpfproxy_facts["object"] for r in caplog.records] == ["load/odd", "load/a"]  # type: ignore[attr-defined]


def test_failing_listener_does_not_end_the_watch(server: ApiServer) -> None:
    follower = Follower(server)
    tell, failing = follower._tell, iter([True])

    def sink(event: object) -> None:
        if next(failing, False):
            raise RuntimeError("the queue is broken")
        tell(event)  # type: ignore[arg-type]

    follower.reflector._delivery._sink = sink
    follower.reflector.start()
    follower.until(lambda: follower.failures("internal") == 1)
    still_works(server, follower)
    follower.reflector.stop()


def test_idle_watch_logs_nothing(pages_or_streams: ApiServer, caplog: pytest.LogCaptureFixture) -> None:
    pages_or_streams.bookmark_seconds = 0.05
    follower = Follower(pages_or_streams, timing=Timing(watch=1, idle=5))
    follower.reflector.start()
    follower.until(lambda: follower.names == {"a", "b"})
    caplog.set_level("DEBUG", "ebpfproxy")
    caplog.clear()
    asked = len(pages_or_streams.requests)
    follower.until(lambda: len(pages_or_streams.requests) > asked, "the watch is not renewed")
    # What an earlier test of the worker has left behind may still log, such as an exporter that tries again.
    assert [each for each in caplog.records if each.name.startswith(("ebpfproxy", "urllib3"))] == []
    assert follower.reflector.status.failures == {}
    follower.reflector.stop()


def test_stop_ends_an_idle_watch_at_once(server: ApiServer) -> None:
    follower = Follower(server, timing=QUICK)
    follower.reflector.start()
    follower.until(lambda: follower.names == {"a", "b"})
    follower.reflector.stop()
    follower.reflector.stop()
    server.store.put("services", objects.service("late", "10.96.0.9"))
    time.sleep(0.1)
    assert "late" not in follower.names
