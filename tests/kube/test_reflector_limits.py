"""However a server behaves, a reflector does not ask in a hot loop, log without end, die, or go deaf."""

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
#: Waits of a second would show as too few requests, none at all as thousands.
STEADY = Timing(backoff_first=0.05, backoff_most=0.2, idle=5, list_wait=5)


@pytest.fixture(params=["streaming", "pages"])
def pages_or_streams(request: pytest.FixtureRequest, server: ApiServer) -> ApiServer:
    server.streaming_list = request.param == "streaming"
    return server


def test_backoff_doubles_up_to_its_most_and_half_of_it_is_random() -> None:
    backoff = Backoff(1.0, 5.0)
    for step in (1, 2, 4, 5, 5):
        assert step / 2 <= backoff.next() <= step
    backoff.reset()
    assert backoff.next() <= 1
    assert len({Backoff(1.0, 5.0).next() for _ in range(20)}) > 1


@pytest.mark.parametrize("how", ["410", "expire"])
def test_a_server_that_always_says_410_is_not_asked_in_a_hot_loop(
    pages_or_streams: ApiServer, how: str
) -> None:
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
def test_streams_that_are_accepted_and_break_at_once_are_not_logged_each_time(
    server: ApiServer, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    caplog.set_level("INFO", "ebpfproxy")
    server.fail(kind, times=FOREVER)
    follower = Follower(server, timing=Timing(backoff_first=0.01, backoff_most=0.02))
    follower.reflector.start()
    reason = {"cut": "truncated", "garbage": "garbled"}[kind]
    follower.until(lambda: follower.failures(reason) + follower.failures("connection") >= 15)
    # The list and its failing watch, and the first watch alone: then being accepted counts for nothing.
    assert len(caplog.records) <= 4
    assert follower.reflector.status.state is State.FAILING
    server.heal()
    still_works(server, follower)
    follower.reflector.stop()


def test_a_watch_from_the_future_is_noticed_and_everything_listed_again() -> None:
    """etcd was restored: versions count from where the backup was made, and watches wait in silence."""
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


def test_a_quiet_watch_is_left_in_peace_after_a_streaming_list(server: ApiServer) -> None:
    """The short wait for initial events is not the wait for the next change."""
    follower = Follower(server, timing=Timing(list_wait=1, idle=30))
    follower.reflector.start()
    follower.until(lambda: follower.names == {"a", "b"})
    time.sleep(1.2)
    assert len(server.requests) == 1
    still_works(server, follower)
    assert follower.reflector.status.failures == {}
    follower.reflector.stop()


def test_initial_events_that_do_not_end_are_tried_as_pages_and_later_as_a_stream_again(
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


def test_a_list_that_breaks_off_is_not_delivered(pages_or_streams: ApiServer) -> None:
    for i in range(20):
        pages_or_streams.store.put("services", objects.service(f"s-{i}", "10.96.0.1"))
    follower = Follower(pages_or_streams)
    pages_or_streams.fail("half", times=3)
    follower.reflector.start()
    follower.until(lambda: len(follower.known) == 22)
    assert follower.count(Replaced) == 1
    assert sum(follower.reflector.status.failures.values()) >= 2
    follower.reflector.stop()


def test_a_list_that_breaks_off_between_pages_is_not_delivered(server: ApiServer) -> None:
    for i in range(600):
        server.store.put("services", objects.service(f"s-{i}", "10.96.0.1"))
    server.streaming_list = False
    follower = Follower(server)
    server.fail("500", times=2, param="continue")
    follower.reflector.start()
    follower.until(lambda: len(follower.known) == 602)
    assert follower.count(Replaced) == 1
    follower.reflector.stop()


def test_a_slow_server_is_waited_for(pages_or_streams: ApiServer) -> None:
    """Each wait for bytes is short, though the whole takes longer than a wait may."""
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


def test_an_object_that_breaks_the_reducer_is_lost_alone(
    pages_or_streams: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A mistake in the rules about one strange object must not take all Services away."""
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
    assert "a" in follower.names, "what was known of it stays"
    follower.reflector.stop()
    assert [r.ebpfproxy_facts["object"] for r in caplog.records] == ["load/odd", "load/a"]  # type: ignore[attr-defined]


def test_a_listener_that_fails_does_not_end_the_watch(server: ApiServer) -> None:
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


def test_nothing_is_logged_while_nothing_happens(
    pages_or_streams: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    pages_or_streams.bookmark_seconds = 0.05
    follower = Follower(pages_or_streams, timing=Timing(watch=1, idle=5))
    follower.reflector.start()
    follower.until(lambda: follower.names == {"a", "b"})
    caplog.set_level("DEBUG", "ebpfproxy")
    caplog.clear()
    asked = len(pages_or_streams.requests)
    follower.until(lambda: len(pages_or_streams.requests) > asked, "the watch is not renewed")
    assert caplog.records == []
    assert follower.reflector.status.failures == {}
    follower.reflector.stop()


def test_stop_ends_a_waiting_watch_at_once(server: ApiServer) -> None:
    follower = Follower(server, timing=QUICK)
    follower.reflector.start()
    follower.until(lambda: follower.names == {"a", "b"})
    follower.reflector.stop()
    follower.reflector.stop()
    server.store.put("services", objects.service("late", "10.96.0.9"))
    time.sleep(0.1)
    assert "late" not in follower.names
