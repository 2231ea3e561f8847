"""The reflector with the failures of API servers and networks."""

from __future__ import annotations

import time

import pytest

from ebpfproxy.kube.client import ApiConnection
from ebpfproxy.kube.objects import Changed, Deleted, Event, ObjectKey, Replaced, Resource
from ebpfproxy.kube.source_status import State
from ebpfproxy.kube.watch.reflector import Timing, reflectors
from tests.apiserver import ApiServer, objects
from tests.kube.follower import KEY, Follower, still_works


def test_initial_list_is_followed_by_watch_events(server: ApiServer, follower: Follower) -> None:
    assert follower.count(Replaced) == 1
    server.store.put("services", objects.service("c", "10.96.0.3"))
    server.store.put("services", objects.service("a", "10.96.0.4"))
    server.store.delete("services", "load", "b")
    follower.until(lambda: follower.names == {"a", "c"})
    assert [type(event) for event in follower.events] == [Replaced, Changed, Changed, Deleted]
    assert follower.known[KEY].spec.cluster_ip == "10.96.0.4"  # type: ignore[attr-defined]


def test_paged_list_is_one_event(server: ApiServer) -> None:
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


def test_expired_continue_token_restarts_the_list(server: ApiServer) -> None:
    for i in range(600):
        server.store.put("services", objects.service(f"s{i}", "10.96.0.1"))
    server.streaming_list = False
    follower = Follower(server)
    server.fail("410", param="continue")
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
def test_failed_watch_resumes_at_its_resource_version(
    server: ApiServer, follower: Follower, kind: str
) -> None:
    server.fail(kind, times=3)
    server.drop_connections()
    still_works(server, follower)
    assert follower.count(Replaced) == 1, "the reflector does not relist"


@pytest.mark.parametrize("kind", ["cut", "garbage", "silence"])
def test_broken_stream_resumes_at_its_resource_version(
    server: ApiServer, follower: Follower, kind: str
) -> None:
    fault = server.fail(kind)
    follower.until(lambda: fault.times <= 0)
    still_works(server, follower)
    assert follower.count(Replaced) == 1
    reason = {"cut": "truncated", "garbage": "garbled", "silence": "idle"}[kind]
    follower.until(lambda: follower.failures(reason) + follower.failures("connection") >= 1)


def test_request_without_response_times_out(server: ApiServer, follower: Follower) -> None:
    server.fail("hang", times=2)
    server.drop_connections()
    still_works(server, follower)


@pytest.mark.parametrize("how", ["in the stream", "as a status"])
def test_410_relists_and_keeps_known_objects_meanwhile(
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


def test_objects_deleted_while_disconnected_are_removed_by_the_new_list(
    server: ApiServer, follower: Follower
) -> None:
    server.fail("500", times=5)
    server.drop_connections()
    server.store.delete("services", "load", "b")
    server.store.compact()
    follower.until(lambda: follower.names == {"a"})
    still_works(server, follower)


def test_retry_after_is_honoured(server: ApiServer, follower: Follower) -> None:
    """The watch retries when it has been idle; the 429 could be lost unread with dropped connections."""
    began = time.monotonic()
    server.fail("429", retry_after=2)
    follower.until(lambda: follower.failures("429") == 1)
    still_works(server, follower)
    assert time.monotonic() - began >= 2.0


def test_known_objects_are_kept_while_the_server_is_unreachable(
    server: ApiServer, follower: Follower
) -> None:
    server.fail("close", times=1_000_000)
    server.drop_connections()
    follower.until(lambda: follower.reflector.status.state is State.FAILING)
    time.sleep(0.3)
    assert follower.names == {"a", "b"}
    assert follower.reflector.status.error
    server.heal()
    still_works(server, follower)


def test_first_failure_and_recovery_are_logged_once_each(
    server: ApiServer, follower: Follower, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ebpfproxy")
    fault = server.fail("500", times=6)
    server.drop_connections()
    # One of them may be lost unread with a dropped connection.
    follower.until(lambda: fault.times == 0)
    still_works(server, follower)

    def lines() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.levelname in ("INFO", "WARNING")]

    # The reflector's thread may say it after the event has come.
    follower.until(lambda: len(lines()) > 1)
    assert lines() == ["watch is failing, keeping the last known state", "watch is connected"]


def test_object_that_cannot_be_decoded_does_not_affect_others(
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
    lines = [r for r in caplog.records if "cannot decode object" in r.getMessage()]
    assert len(lines) == 2, "one line for each reflector, not for each failure"
    facts = lines[0].ebpfproxy_facts  # type: ignore[attr-defined]
    assert facts["object"] == "load/bad"
    assert facts["error"] == "spec.ports[0].port: Expected `int`, got `str`"


def test_bookmarks_advance_the_resource_version(server: ApiServer) -> None:
    server.bookmark_seconds = 0.1
    follower = Follower(server)
    follower.reflector.start()
    follower.until(lambda: follower.names == {"a", "b"})
    # Changes of other resources advance the server's version; this watch sees it in bookmarks only.
    server.store.put("nodes", objects.node("x"))
    time.sleep(0.4)
    server.store.compact()
    server.requests.clear()
    server.drop_connections()
    still_works(server, follower)
    assert follower.count(Replaced) == 1, "the bookmark's version was recent enough"
    follower.reflector.stop()


def test_watch_that_ends_by_its_timeout_is_resumed(server: ApiServer) -> None:
    follower = Follower(server, timing=Timing(backoff_first=0.01, watch=1, idle=5))
    follower.reflector.start()
    follower.until(lambda: sum("resourceVersion" in p for _, p in server.requests) >= 1)
    still_works(server, follower)
    assert follower.reflector.status.failures == {}
    follower.reflector.stop()


def test_large_object_is_received_whole(server: ApiServer, follower: Follower) -> None:
    ports = [{"name": f"p{n}", "port": n + 1, "protocol": "TCP"} for n in range(5000)]
    server.store.put("services", objects.service("large", "10.96.0.3", ports=ports))
    follower.until(lambda: "large" in follower.names)
    large = follower.known[ObjectKey("load", "large")]
    assert len(large.spec.ports) == 5000  # type: ignore[attr-defined]


def test_watch_timeouts_are_five_to_ten_minutes(server: ApiServer) -> None:
    """As client-go's, so that connections of many nodes are spread over API servers again."""
    for _ in range(5):
        follower = Follower(server, timing=Timing())
        follower.reflector.start()
        follower.until(lambda follower=follower: follower.names == {"a", "b"})  # type: ignore[misc]
        follower.reflector.stop()
    asked = [int(p["timeoutSeconds"]) for _, p in server.requests]
    assert all(300 <= seconds <= 600 for seconds in asked)
    assert len(set(asked)) > 1


def test_object_that_no_longer_matches_the_selector_is_deleted(server: ApiServer) -> None:
    label = "service.kubernetes.io/service-proxy-name"
    follower = Follower(server, label_selector=f"!{label}")
    follower.reflector.start()
    follower.until(lambda: follower.names == {"a", "b"})
    meshed = objects.service("a", "10.96.0.1")
    meshed["metadata"]["labels"][label] = "mesh"
    server.store.put("services", meshed)
    follower.until(lambda: follower.names == {"b"})
    server.store.put("services", objects.service("a", "10.96.0.1"))
    follower.until(lambda: follower.names == {"a", "b"})
    follower.reflector.stop()


def test_watches_of_an_agent_have_the_selectors_of_kube_proxy(server: ApiServer) -> None:
    """Of slices the headless ones are left out, and no Service: those of other proxies have cluster IPs, too."""
    server.store.put(
        "servicecidrs", {"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/12"]}}
    )
    meshed = objects.service("meshed", "10.96.0.9")
    meshed["metadata"]["labels"]["service.kubernetes.io/service-proxy-name"] = "mesh"
    server.store.put("services", meshed)
    piece = objects.endpoint_slice("meshed", [])
    piece["metadata"]["labels"]["service.kubernetes.io/service-proxy-name"] = "mesh"
    server.store.put("endpointslices", piece)
    server.store.put("nodes", objects.node("node-1"))
    server.store.put("nodes", objects.node("node-2"))
    headless = objects.endpoint_slice("a", [])
    headless["metadata"]["labels"]["service.kubernetes.io/headless"] = ""
    server.store.put("endpointslices", headless)
    server.store.put("endpointslices", objects.endpoint_slice("b", []))
    events: list[Event] = []
    connection = ApiConnection.from_options(None, server.url)
    watches = reflectors(connection, "node-1", events.append, lambda each: each)
    for each in watches:
        each.start()
    deadline = time.monotonic() + 8
    while len(events) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    found = {event.resource: set(event.objects) for event in events if isinstance(event, Replaced)}
    assert found == {
        Resource.SERVICES: {KEY, ObjectKey("load", "b"), ObjectKey("load", "meshed")},
        Resource.ENDPOINTSLICES: {ObjectKey("load", "b-x7k2p"), ObjectKey("load", "meshed-x7k2p")},
        Resource.NODES: {ObjectKey("", "node-1")},
        Resource.SERVICECIDRS: {ObjectKey("", "kubernetes")},
    }
    assert all(each.status.synced for each in watches)
    for each in watches:
        each.stop()


def test_event_has_the_time_at_which_it_was_received(server: ApiServer, follower: Follower) -> None:
    before = time.monotonic()
    server.store.put("services", objects.service("c", "10.96.0.3"))
    follower.until(lambda: "c" in follower.names)
    event = follower.events[-1]
    assert isinstance(event, Changed)
    assert before <= event.received <= time.monotonic()


def test_status_of_the_reflector(server: ApiServer, follower: Follower) -> None:
    status = follower.reflector.status
    assert (status.resource, status.state, status.synced) == (Resource.SERVICES, State.CONNECTED, True)
    assert status.resource_version == "102"
    assert status.lists == 1
    assert status.error is None
    assert status.last_event is not None
    assert status.since <= status.last_event <= time.time()
