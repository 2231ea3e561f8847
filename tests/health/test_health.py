"""/healthz and /livez, compared with the output of a real kube-proxy (tests/data/kube-proxy)."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from ebpfproxy.config.bind_address import BindAddressError, parse_bind_address
from ebpfproxy.health.http import json_answer, text_answer
from ebpfproxy.health.proxy import ProxyHealth, eligible
from ebpfproxy.health.server import HttpServer
from ebpfproxy.kube.objects import Node
from tests.data import SAMPLES

TIMEOUT = 60.0


class Clock:
    def __init__(self) -> None:
        self.now = 1_795_000_000.0

    def __call__(self) -> float:
        return self.now


def node(**parts: Any) -> Node:
    meta = {"name": "n", **parts.pop("metadata", {})}
    return msgspec.convert({"metadata": meta, **parts}, Node)


def attached(clock: Clock | None = None) -> ProxyHealth:
    health = ProxyHealth(TIMEOUT, clock=clock or Clock(), monotonic=clock or Clock())
    health.attached()
    return health


def test_unhealthy_until_the_first_sync() -> None:
    health = attached()
    assert not health.healthy
    health.programmed()
    assert health.healthy


def test_unhealthy_until_programs_are_attached() -> None:
    health = ProxyHealth(TIMEOUT, clock=Clock())
    health.set_eligible(True)
    health.programmed()
    assert (health.healthy, health.healthz()[0], health.livez()[0]) == (False, False, False)
    health.attached()
    assert (health.healthy, health.healthz()[0], health.livez()[0]) == (True, True, True)


def test_change_pending_for_more_than_two_sync_periods_is_unhealthy() -> None:
    clock = Clock()
    health = attached(clock)
    health.programmed()
    health.queued()
    clock.now += 59
    health.queued()
    assert health.healthy, "the first change counts and has been pending for 59 s"
    clock.now += 2
    assert not health.healthy
    health.programmed()
    assert health.healthy


def test_clock_that_is_set_makes_no_change_wait_longer_or_shorter() -> None:
    clock, passed = Clock(), Clock()
    health = ProxyHealth(TIMEOUT, clock=clock, monotonic=passed)
    health.attached()
    health.programmed()
    health.queued()
    clock.now += 86400
    assert health.healthy
    clock.now -= 2 * 86400
    passed.now += 61
    assert not health.healthy


def test_idle_cluster_stays_healthy() -> None:
    clock = Clock()
    health = attached(clock)
    health.programmed()
    clock.now += 86400
    healthy, body = health.livez()
    assert healthy
    assert body["lastUpdated"] == body["currentTime"], "lastUpdated is the current time while healthy"
    assert body["status"]["IPv4"]["lastUpdated"] < body["currentTime"]


def test_node_eligibility_affects_healthz_but_not_livez() -> None:
    clock = Clock()
    health = attached(clock)
    health.programmed()
    updated = health.livez()[1]["lastUpdated"]
    clock.now += 5
    assert (health.healthz()[0], health.livez()[0]) == (False, True)
    assert health.healthz()[1]["lastUpdated"] == updated, "it is the current time in an answer of 200 alone"
    health.set_eligible(True)
    assert health.healthz()[0]
    assert health.healthz()[1]["lastUpdated"] == health.livez()[1]["currentTime"]


@pytest.mark.parametrize(
    ("known", "may"),
    [
        (None, False),
        (node(), True),
        (node(spec={"taints": None}), True),
        (node(spec={"taints": [{"key": "other", "effect": "NoSchedule"}]}), True),
        (node(spec={"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]}), False),
        (node(metadata={"deletionTimestamp": "2026-11-20T10:00:00Z"}), False),
    ],
)
def test_eligible(known: Node | None, may: bool) -> None:
    assert eligible(known) is may


@pytest.mark.parametrize("path", ["healthz", "livez"])
def test_body_has_the_fields_of_kube_proxy_in_its_order(path: str) -> None:
    sample = json.loads((SAMPLES / f"{path}.txt").read_text().partition("\n\n")[2])
    health = attached()
    health.programmed()
    _, body = getattr(health, path)()
    assert list(body) == list(sample)
    assert list(body["status"]["IPv4"]) == list(sample["status"]["IPv4"])


def serve(address: str) -> HttpServer:
    server = HttpServer(
        "test",
        address,
        {"/healthz": lambda: json_answer({"a": 1}, 503), "/mode": lambda: text_answer("ebpf")},
    )
    server.start()
    return server


@pytest.fixture
def server() -> Iterator[HttpServer]:
    made = serve("127.0.0.1:0")
    yield made
    made.stop()


def ask(server: HttpServer, path: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    assert server.port is not None
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    connection.request(method, path)
    response = connection.getresponse()
    return response.status, dict(response.getheaders()), response.read()


def test_status_headers_and_body(server: HttpServer) -> None:
    status, headers, body = ask(server, "/healthz?verbose")
    assert (status, body) == (503, b'{"a":1}')
    assert headers["Content-Type"] == "application/json"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert ask(server, "/mode")[2] == b"ebpf"
    assert ask(server, "/nothing")[0] == 404
    assert ask(server, "/mode", "HEAD")[2] == b""


@pytest.mark.parametrize(
    ("target", "status"),
    [("http://node:10249/mode?a=/b", 200), ("HTTP://node/mode", 200), ("http://node", 404), ("*", 404)],
)
def test_target_may_be_a_url(server: HttpServer, target: str, status: int) -> None:
    """RFC 9112, 3.2.2: every server accepts it, not only proxies."""
    assert ask(server, target)[0] == status


def test_silent_client_does_not_delay_others(server: HttpServer) -> None:
    assert server.port is not None
    with socket.create_connection(("127.0.0.1", server.port)):
        assert ask(server, "/mode")[0] == 200


def test_address_in_use_is_served_once_it_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ebpfproxy.health.http.RETRY_SECONDS", 0.05)
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        server = serve(f"127.0.0.1:{port}")
        assert server.port is None
    deadline = time.monotonic() + 60
    while server.port is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert ask(server, "/mode")[0] == 200
    server.stop()


def test_an_empty_address_serves_nothing() -> None:
    server = serve("")
    assert server.port is None
    server.stop()


@pytest.mark.parametrize("text", [":0", "0.0.0.0:0", "[::]:0"])
def test_address_without_a_host_is_served_in_all_families(text: str) -> None:
    """The kubelet probes the node's first address, which may be an IPv6 one."""
    server = serve(text)
    assert ask(server, "/mode")[0] == 200
    for host in ("127.0.0.1", "::1"):
        socket.create_connection((host, server.port or 0), 2).close()
    server.stop()


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("0.0.0.0:10256", ("::", 10256)),
        ("127.0.0.1:10256", ("127.0.0.1", 10256)),
        ("[::]:10256", ("::", 10256)),
        (":1", ("::", 1)),
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("[fd00::1]:1", ("fd00::1", 1)),
    ],
)
def test_bind_addresses(text: str, parsed: tuple[str, int]) -> None:
    assert parse_bind_address(text) == parsed


@pytest.mark.parametrize(
    "text",
    [
        "10256",
        "host",
        "1.2.3.4:",
        "1.2.3.4:99999",
        "::1:80",
        "1.2.3.4:x",
        # int() refuses the first, and digits that others write.
        f"1.2.3.4:{'9' * 5000}",
        "1.2.3.4:²",
        "1.2.3.4:٣",
    ],
)
def test_invalid_bind_addresses_are_rejected(text: str) -> None:
    with pytest.raises(BindAddressError, match="is not IP:port"):
        parse_bind_address(text)
