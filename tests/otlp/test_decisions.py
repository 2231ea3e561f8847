"""Decisions of ``ebpfproxy trace`` as log records."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from ebpfproxy.otlp import log_sender
from ebpfproxy.trace.decision_sender import DecisionSender
from ebpfproxy.trace.rows import BackendRow, ClientRow, DecisionRow
from tests.otlp.receiver import Receiver, attributes

CHOSEN = DecisionRow(
    time=1_800_000_000.25,
    kind="chosen",
    reason="",
    place="socket",
    client=ClientRow(pod="shop/client", address="10.244.1.9", process="curl", pid=7),
    namespace="shop",
    service="web",
    port="http",
    protocol="TCP",
    frontend="10.96.0.10:80",
    backend=BackendRow("10.244.1.3:8080", "shop/web-1"),
    candidates=3,
    basis="",
    algorithm="random",
)
REFUSED = DecisionRow(
    time=1_800_000_001.0,
    kind="refused",
    reason="no-endpoint",
    place="socket",
    client=ClientRow(address="10.244.1.9"),
    namespace="shop",
    service="empty",
    port="http",
    protocol="TCP",
    frontend="10.96.0.20:80",
    backend=None,
    candidates=0,
    basis="",
    algorithm="",
)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver(socket.create_server(("127.0.0.1", 0)))
    yield made
    made.close()


def test_a_record_has_the_line_and_the_fields_of_json(receiver: Receiver) -> None:
    said: list[str] = []
    sender = DecisionSender(receiver.url, "node-a", said.append)
    sender.write([CHOSEN, REFUSED])
    sender.close()
    assert said == []
    good, bad = receiver.records()
    assert good.body.string_value == (
        "shop/client → shop/web:http 10.96.0.10:80 ⇒ 10.244.1.3:8080 web-1 (1 of 3, random; curl[7])"
    )
    assert (good.event_name, good.time_unix_nano) == ("ebpfproxy.decision", 1_800_000_000_250_000_000)
    assert attributes(good.attributes) == {
        "kind": "chosen",
        "reason": "",
        "place": "socket",
        "client.pod": "shop/client",
        "client.address": "10.244.1.9",
        "client.process": "curl",
        "client.pid": 7,
        "namespace": "shop",
        "service": "web",
        "port": "http",
        "protocol": "TCP",
        "frontend": "10.96.0.10:80",
        "backend.address": "10.244.1.3:8080",
        "backend.pod": "shop/web-1",
        "candidates": 3,
        "basis": "",
        "algorithm": "random",
    }
    assert (good.severity_text, bad.severity_text) == ("info", "warning")
    assert "backend.address" not in attributes(bad.attributes)


def test_what_no_collector_takes_is_said(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_sender, "_WAITING", 600)
    receiver.status = 400
    said: list[str] = []
    sender = DecisionSender(receiver.url, "node-a", said.append)
    sender.write([REFUSED] * 700)
    sender.close()
    assert "failed to send to --otlp-endpoint: 400 Bad Request" in said
    lost = [
        int(each.split()[1]) for each in said if each.endswith("decisions: the collector did not take them")
    ]
    assert sum(lost) == 700
