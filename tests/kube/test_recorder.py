"""Events over HTTP: their content, their rate, and failures to send them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

import pytest

from ebpfproxy.kube.client import ApiConnection
from ebpfproxy.kube.events.event import RESULTS, KubeEvent, Level, Reference
from ebpfproxy.kube.events.recorder import Pace, Recorder
from tests.apiserver import ApiServer, objects
from tests.lab.waiting import until

QUICK = Pace(qps=1000, burst=100, spread=0.05, backoff_first=0.02, backoff_most=0.1)
NODE = Reference("Node", "", "node-a")
SERVICE = Reference("Service", "load", "web")
SLICE = Reference("EndpointSlice", "load", "web-x7k2p")


def output(
    about: Reference = SERVICE, note: str = "spec.x: is wrong", *, of_node: bool = False, reason: str = "Bad"
) -> KubeEvent:
    return KubeEvent(about, Level.WARNING, reason, "Read", note, of_node)


class Sender:
    def __init__(self, server: ApiServer, node: str = "node-a", pace: Pace = QUICK) -> None:
        self.counts: Counter[str] = Counter()
        self.recorder = Recorder(ApiConnection.from_options(None, server.url), node, self._count, pace)
        self.recorder.start()

    def _count(self, result: str) -> None:
        assert result in RESULTS
        self.counts[result] += 1

    def __call__(self, *occurrences: KubeEvent) -> None:
        for each in occurrences:
            self.recorder.record(each)

    def until(self, **counts: int) -> None:
        until(lambda: self.counts == Counter(counts), f"not {counts}")


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as made:
        made.store.put("services", objects.service("web", "10.96.0.1"))
        made.store.put("services", objects.service("web", "10.96.0.2", namespace="other"))
        made.store.put("endpointslices", objects.endpoint_slice("web", []))
        yield made


@pytest.fixture
def sender(server: ApiServer) -> Iterator[Sender]:
    made = Sender(server)
    yield made
    made.recorder.stop()


def posts(server: ApiServer) -> int:
    return sum(path.startswith("/apis/events.k8s.io/") for path, _ in server.requests)


# -- content


def test_event_of_a_service_has_its_uid(server: ApiServer, sender: Sender) -> None:
    """kubectl describe selects events by it."""
    sender(output())
    sender.until(created=1)
    (event,) = server.events.all
    uid = objects.service("web", "10.96.0.1")["metadata"]["uid"]
    assert event["regarding"] == {
        "kind": "Service",
        "apiVersion": "v1",
        "namespace": "load",
        "name": "web",
        "uid": uid,
    }
    assert event["metadata"]["namespace"] == "load"
    assert event["metadata"]["name"].startswith("web.")
    assert (event["type"], event["reason"], event["action"]) == ("Warning", "Bad", "Read")
    assert (event["note"], event["reportingController"]) == ("spec.x: is wrong", "ebpfproxy")
    assert event["reportingInstance"] == "ebpfproxy-node-a"
    assert "series" not in event


def test_event_of_a_node_refers_to_it_as_kube_proxy_and_kubelet_do(server: ApiServer, sender: Sender) -> None:
    sender(output(NODE, of_node=True))
    sender.until(created=1)
    (event,) = server.events.all
    assert event["regarding"] == {"kind": "Node", "apiVersion": "v1", "name": "node-a", "uid": "node-a"}
    assert event["metadata"]["namespace"] == "default"
    assert len(server.requests) == 1, "no object has to be read"


def test_event_of_an_endpoint_slice_regards_its_service(server: ApiServer, sender: Sender) -> None:
    sender(output(SLICE))
    sender.until(created=1)
    (event,) = server.events.all
    assert (event["regarding"]["kind"], event["regarding"]["name"]) == ("Service", "web")
    assert event["regarding"]["uid"] == objects.service("web", "10.96.0.1")["metadata"]["uid"]
    assert (event["related"]["kind"], event["related"]["name"]) == ("EndpointSlice", "web-x7k2p")
    assert event["related"]["apiVersion"] == "discovery.k8s.io/v1"


def test_event_of_an_endpoint_slice_without_a_service_regards_the_slice(
    server: ApiServer, sender: Sender
) -> None:
    piece = objects.endpoint_slice("free", [])
    del piece["metadata"]["labels"]["kubernetes.io/service-name"]
    server.store.put("endpointslices", piece)
    sender(output(Reference("EndpointSlice", "load", piece["metadata"]["name"])))
    sender.until(created=1)
    assert server.events.all[0]["regarding"]["kind"] == "EndpointSlice"


@pytest.mark.parametrize(
    ("node", "note"),
    [("n" * 253, "x" * 5000), ("a.b-c", "é" * 1024), ("n", "\N{GRINNING FACE}" * 300), ("n", "")],
    ids=["ASCII", "two bytes", "four bytes", "empty"],
)
def test_names_and_notes_of_any_length_are_valid(server: ApiServer, node: str, note: str) -> None:
    sender = Sender(server, node)
    sender(output(Reference("Node", "", node), note, of_node=True))
    sender.until(created=1)
    assert note.startswith(server.events.all[0]["note"].removesuffix("…"))
    sender.recorder.stop()


def test_deleted_object_gets_no_event(server: ApiServer, sender: Sender) -> None:
    sender(output(Reference("Service", "load", "gone")), output(Reference("EndpointSlice", "load", "gone")))
    sender.until(gone=2)
    assert posts(server) == 0


# -- rate


def test_equal_events_of_many_nodes_are_stored_once(server: ApiServer) -> None:
    senders = [Sender(server, f"node-{i}") for i in range(20)]
    for each in senders:
        each(output())
    until(lambda: sum(sum(each.counts.values()) for each in senders) == 20)
    assert sum((each.counts for each in senders), Counter()) == Counter(created=1, exists=19)
    assert len(server.events.all) == 1
    for each in senders:
        each.recorder.stop()


def test_events_of_nodes_about_themselves_are_distinct(server: ApiServer) -> None:
    senders = [Sender(server, f"node-{i}") for i in range(3)]
    for each in senders:
        each(output(of_node=True))
        each.until(created=1)
        each.recorder.stop()


def test_restart_does_not_repeat_an_event(server: ApiServer, sender: Sender) -> None:
    sender(output(of_node=True))
    sender.until(created=1)
    again = Sender(server)
    again(output(of_node=True))
    again.until(exists=1)
    again.recorder.stop()


def test_each_start_is_an_event(server: ApiServer) -> None:
    for _ in range(3):
        sender = Sender(server)
        sender(KubeEvent(NODE, Level.NORMAL, "Starting", "Start", "v1"))
        sender.until(created=1)
        sender.recorder.stop()
    assert len(server.events.all) == 3


def test_repeated_events_are_counted_and_sent_after_ten_minutes(
    server: ApiServer, sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender(*[output(NODE, of_node=True)] * 5)
    sender.until(created=1, repeated=4)
    later = time.monotonic() + 601
    monkeypatch.setattr("ebpfproxy.kube.events.recorder.time.monotonic", lambda: later)
    sender(output(NODE, of_node=True))
    sender.until(created=2, repeated=4)
    first, second = server.events.all
    assert "series" not in first
    assert second["series"]["count"] == 5, "four events that were not sent and this one"
    assert first["eventTime"] < second["eventTime"] < second["series"]["lastObservedTime"]


def test_events_of_one_object_are_rate_limited(server: ApiServer, sender: Sender) -> None:
    """The limits are client-go's: 25 events, then one every five minutes."""
    sender(*(output(note=f"{i}") for i in range(100)))
    sender(output(Reference("Service", "other", "web")))
    sender.until(created=26, limited=75)


def test_queue_and_rate_are_bounded(server: ApiServer) -> None:
    sender = Sender(server, pace=Pace(qps=20, burst=1, queue=10, spread=0))
    began = time.monotonic()
    sender(*(output(Reference("Node", "", f"n{i}"), of_node=True) for i in range(200)))
    took = time.monotonic() - began
    assert took < 5, "recording does not block: sending all events would take ten seconds"
    until(lambda: sum(sender.counts.values()) == 200)
    assert sender.counts["created"] <= 10 + 2 + took * 20, "events in the queue, in flight and sent"
    assert sender.counts["created"] == 200 - sender.counts["dropped"]
    assert time.monotonic() - began >= (sender.counts["created"] - 2) / 20
    sender.recorder.stop()


# -- failures


def test_events_are_retried_while_the_server_is_unreachable(server: ApiServer, sender: Sender) -> None:
    server.fail("close", times=3)
    server.fail("503", times=2)
    server.fail("429", retry_after=0)
    sender(output(NODE, of_node=True))
    sender.until(created=1)
    assert posts(server) == 7


def test_retries_are_limited(server: ApiServer, sender: Sender, caplog: pytest.LogCaptureFixture) -> None:
    server.fail("503", times=1000)
    sender(output(NODE, of_node=True), output(NODE, "more", of_node=True))
    sender.until(failed=2)
    assert posts(server) == 24
    assert len(_warnings(caplog)) == 1
    assert "503" in _warnings(caplog)[0]


def test_403_is_logged_once_and_ends_retries(
    server: ApiServer, sender: Sender, caplog: pytest.LogCaptureFixture
) -> None:
    server.denied.add("events")
    sender(*(output(NODE, f"{i}", of_node=True) for i in range(20)))
    sender.until(forbidden=20)
    assert posts(server) == 1
    assert len(_warnings(caplog)) == 1
    assert 'cannot create resource "events"' in _warnings(caplog)[0]


def test_terminating_namespace_does_not_block_events_of_others(server: ApiServer, sender: Sender) -> None:
    server.events.terminating.add("load")
    sender(output(of_node=True))
    sender.until(forbidden=1)
    sender(output(Reference("Service", "other", "web"), of_node=True), output(NODE, of_node=True))
    sender.until(forbidden=1, created=2)


def test_rejected_event_does_not_block_others(
    server: ApiServer, sender: Sender, caplog: pytest.LogCaptureFixture
) -> None:
    sender(
        output(NODE, reason="R" * 200, of_node=True),
        output(NODE, reason="S" * 200, of_node=True),
        output(NODE),
    )
    sender.until(rejected=2, created=1)
    assert len(_warnings(caplog)) == 1
    assert "422" in _warnings(caplog)[0]


@pytest.mark.parametrize("kind", ["html", "garbage body"])
def test_html_response_of_a_proxy_is_an_error(server: ApiServer, sender: Sender, kind: str) -> None:
    if kind == "html":
        server.fail("html")
        sender(output(NODE, of_node=True))
    else:
        server.public["/api/v1/namespaces/load/services"] = b"<html>"
        sender(output())
        sender.until(failed=1)
        del server.public["/api/v1/namespaces/load/services"]
        sender(output(note="again"))
    until(lambda: sender.counts["created"] == 1)


def test_stop_does_not_wait_for_the_server(server: ApiServer) -> None:
    sender = Sender(server, pace=Pace(spread=0))
    server.fail("hang", times=10)
    sender(output(NODE, of_node=True))
    until(lambda: posts(server) == 1)
    began = time.monotonic()
    sender.recorder.stop()
    assert time.monotonic() - began < 5, "the server hangs for longer than that"


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        str(vars(record)["ebpfproxy_facts"]["error"])
        for record in caplog.records
        if "failed to send event" in record.getMessage()
    ]
