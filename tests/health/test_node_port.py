"""healthCheckNodePort: responses to health checks of load balancers, over real sockets."""

from __future__ import annotations

import errno
import json
import os
import resource
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ebpfproxy.health.node_port import NodePortHealth, ServiceHealth
from tests.lab import Lab


class Healthy:
    def __init__(self) -> None:
        self.proxy = True
        self.servers = NodePortHealth(lambda: self.proxy)


@pytest.fixture
def healthy() -> Iterator[Healthy]:
    made = Healthy()
    made.servers.start()
    yield made
    made.servers.stop()


@pytest.fixture
def port() -> int:
    with socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::", 0))
        found: int = sock.getsockname()[1]
        return found


def ask(
    port: int,
    request: bytes = b"GET /healthz HTTP/1.1\r\nHost: n\r\nConnection: close\r\n\r\n",
    host: str = "127.0.0.1",
) -> bytes:
    with socket.create_connection((host, port), 30) as sock:
        sock.sendall(request)
        answer = b""
        while chunk := sock.recv(4096):
            answer += chunk
        return answer


def web(port: int, local: int) -> ServiceHealth:
    return ServiceHealth("shop", "web", port, local)


def test_response_equals_that_of_kube_proxy(healthy: Healthy, port: int) -> None:
    """It is equal in all bytes but the date; see kube-proxy-samples/healthCheckNodePort.txt."""
    healthy.servers.update([ServiceHealth("shop", "frontend", port, 1)])
    head, _, body = ask(port).partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "HTTP/1.1 200 OK"
    assert lines[1:4] == [
        "Content-Type: application/json",
        "X-Content-Type-Options: nosniff",
        "X-Load-Balancing-Endpoint-Weight: 1",
    ]
    assert lines[4].startswith("Date: ")
    assert lines[4].endswith(" GMT")
    assert lines[5] == "Content-Length: 116"
    assert body == (
        b'{\n\t"service": {\n\t\t"namespace": "shop",\n\t\t"name": "frontend"\n\t},\n'
        b'\t"localEndpoints": 1,\n\t"serviceProxyHealthy": true\n}'
    )


@pytest.mark.parametrize(("local", "proxy", "status"), [(2, True, 200), (0, True, 503), (2, False, 503)])
def test_status_depends_on_local_endpoints_and_health_of_the_proxy(
    healthy: Healthy, port: int, local: int, proxy: bool, status: int
) -> None:
    healthy.proxy = proxy
    healthy.servers.update([web(port, local)])
    head, _, body = ask(port).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert json.loads(body)["localEndpoints"] == local
    assert json.loads(body)["serviceProxyHealthy"] is proxy
    assert f"X-Load-Balancing-Endpoint-Weight: {local}".encode() in head


def test_changed_count_is_served_at_once_on_the_same_socket(healthy: Healthy, port: int) -> None:
    healthy.servers.update([web(port, 1)])
    with socket.create_connection(("127.0.0.1", port), 30) as sock:
        for local, status in ((1, b"200"), (0, b"503"), (3, b"200")):
            healthy.servers.update([web(port, local)])
            sock.sendall(b"GET / HTTP/1.1\r\nHost: n\r\n\r\n")
            assert sock.recv(4096).split()[1] == status


def test_every_path_both_families_and_head(healthy: Healthy, port: int) -> None:
    healthy.servers.update([web(port, 1)])
    assert b" 200 OK" in ask(port, b"GET /anything?x=1 HTTP/1.0\r\n\r\n", "::1")
    answer = ask(port, b"HEAD / HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert answer.endswith(b"\r\n\r\n")
    assert b" 200 OK" in answer


@pytest.mark.parametrize(
    "request_",
    [
        b"OPTIONS / HTTP/1.0\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc",
        b"BREW / HTTP/1.1\r\nConnection: close\r\n\r\n",
    ],
)
@pytest.mark.parametrize(("local", "status"), [(1, b"200"), (0, b"503")])
def test_every_method_gets_the_response_of_get(
    healthy: Healthy, port: int, request_: bytes, local: int, status: bytes
) -> None:
    """kube-proxy asks for no method: HAProxy's ``option httpchk`` sends OPTIONS."""
    healthy.servers.update([web(port, local)])
    head, _, body = ask(port, request_).partition(b"\r\n\r\n")
    assert head.split()[1] == status
    assert json.loads(body)["localEndpoints"] == local


@pytest.mark.parametrize(
    "request_", [b"(BREW) / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\r\n\r\n", b"GET\r\n\r\n"]
)
def test_invalid_requests_are_rejected(healthy: Healthy, port: int, request_: bytes) -> None:
    healthy.servers.update([web(port, 1)])
    assert ask(port, request_).startswith(b"HTTP/1.1 400 ")


def test_request_without_end_is_closed(healthy: Healthy, port: int) -> None:
    healthy.servers.update([web(port, 1)])
    with socket.create_connection(("127.0.0.1", port), 30) as sock, pytest.raises(OSError):
        for _ in range(100):
            sock.sendall(b"x" * 4096)
            time.sleep(0.01)


def test_silent_client_does_not_delay_others(healthy: Healthy, port: int) -> None:
    healthy.servers.update([web(port, 1)])
    with socket.create_connection(("127.0.0.1", port), 30):
        assert b" 200 OK" in ask(port)


def test_removed_service_closes_its_port(healthy: Healthy, port: int) -> None:
    healthy.servers.update([web(port, 1)])
    assert healthy.servers.bound == 1
    healthy.servers.update([])
    assert healthy.servers.bound == 0
    with pytest.raises(ConnectionRefusedError):
        ask(port)


def test_port_in_use_is_reported_and_other_ports_are_served(
    healthy: Healthy, port: int, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket(socket.AF_INET6) as taken, socket.socket(socket.AF_INET6) as spare:
        taken.bind(("::", port))
        taken.listen()
        spare.bind(("::", 0))
        other = spare.getsockname()[1]
        spare.close()
        for _ in range(3):
            healthy.servers.update([web(port, 1), ServiceHealth("shop", "zoo", other, 1)])
        assert list(healthy.servers.failed) == [port]
        assert "in use" in healthy.servers.failed[port]
        assert b" 200 OK" in ask(other)
    assert [r.getMessage() for r in caplog.records].count("cannot bind health check port, trying again") == 1


def test_port_in_use_is_retried(healthy: Healthy, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ebpfproxy.health.http.RETRY_SECONDS", 0.1)
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::", port))
        taken.listen()
        healthy.servers.update([web(port, 1)])
        assert healthy.servers.bound == 0
    deadline = time.monotonic() + 60
    while not healthy.servers.bound:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert b" 200 OK" in ask(port)


def test_first_service_by_name_gets_a_port_of_two_services(
    healthy: Healthy, port: int, caplog: pytest.LogCaptureFixture
) -> None:
    healthy.servers.update([web(port, 1), ServiceHealth("shop", "cart", port, 0)])
    assert json.loads(ask(port).partition(b"\r\n\r\n")[2])["service"]["name"] == "cart"
    assert [r.getMessage() for r in caplog.records].count(
        "health check port is used by another Service, not serving it"
    ) == 1


def test_a_kernel_without_ipv6_is_served_over_ipv4(
    healthy: Healthy, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ipv6.disable=1 no socket of that family can be created."""

    class Socket(socket.socket):
        def __init__(self, family: int = -1, *rest: Any, **named: Any) -> None:
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
            super().__init__(family, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr("socket.socket", Socket)
        healthy.servers.update([web(port, 1)])
    assert b" 200 OK" in ask(port)


def test_keepalive_connection_is_closed_with_its_service(healthy: Healthy, port: int) -> None:
    healthy.servers.update([web(port, 1)])
    with socket.create_connection(("127.0.0.1", port), 30) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: n\r\n\r\n")
        assert b" 200 OK" in sock.recv(4096)
        healthy.servers.update([])
        assert sock.recv(4096) == b""


def test_clients_that_hold_connections_do_not_block_others(
    healthy: Healthy, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest connection is closed, the latest one is kept."""
    monkeypatch.setattr("ebpfproxy.health.http._MOST_CLIENTS", 8)
    healthy.servers.update([web(port, 1)])
    held = [socket.create_connection(("127.0.0.1", port), 30) for _ in range(12)]
    assert b" 200 OK" in ask(port)
    assert held[0].recv(4096) == b""
    held[-1].sendall(b"GET / HTTP/1.0\r\n\r\n")
    assert b" 200 OK" in held[-1].recv(4096)
    for each in held:
        each.close()


def test_slow_client_is_disconnected(healthy: Healthy, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ebpfproxy.health.http.CLIENT_SECONDS", 0.1)
    healthy.servers.update([web(port, 1)])
    with socket.create_connection(("127.0.0.1", port), 30) as sock:
        sock.sendall(b"GET / HT")
        assert sock.recv(4096) == b""


@pytest.mark.parametrize(
    "header", [b"Content-Length: 18", b"Content-Length : 18", b"transfer-encoding:chunked"]
)
def test_body_is_not_parsed_as_a_request(healthy: Healthy, port: int, header: bytes) -> None:
    healthy.servers.update([web(port, 1)])
    answer = ask(port, b"GET / HTTP/1.1\r\n" + header + b"\r\n\r\nGET / HTTP/1.1\r\n\r\n")
    assert answer.count(b"HTTP/1.1 ") == 1


def test_lines_may_end_without_a_carriage_return(healthy: Healthy, port: int) -> None:
    healthy.servers.update([web(port, 1)])
    assert b" 200 OK" in ask(port, b"GET / HTTP/1.1\nConnection: close\n\n")


def test_headers_that_are_too_large_get_a_response(healthy: Healthy, port: int) -> None:
    healthy.servers.update([web(port, 1)])
    answer = ask(port, b"GET / HTTP/1.1\r\nCookie: ".ljust(8193, b"x"))
    assert answer.startswith(b"HTTP/1.1 431 ")


def test_names_not_validated_by_an_api_server_are_escaped_in_json(healthy: Healthy, port: int) -> None:
    healthy.servers.update([ServiceHealth('a"b', "c\\", port, 1)])
    body = json.loads(ask(port).partition(b"\r\n\r\n")[2])
    assert body["service"] == {"namespace": 'a"b', "name": "c\\"}


def test_updates_before_start_do_not_block(port: int) -> None:
    servers = NodePortHealth(lambda: True)
    for count in range(2000):
        servers.update([web(port, count)])
    servers.start()
    servers.stop()


def test_ports_are_closed_when_stop_returns(port: int) -> None:
    servers = NodePortHealth(lambda: True)
    servers.start()
    servers.update([web(port, 1)])
    servers.stop()
    with pytest.raises(ConnectionRefusedError):
        ask(port)


def test_clients_that_reset_before_accept_do_not_delay_others(healthy: Healthy, port: int) -> None:
    healthy.servers.update([web(port, 1)])
    for _ in range(100):
        with socket.create_connection(("127.0.0.1", port)) as sock:
            # Closing resets the connection.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert b" 200 OK" in ask(port)


def test_a_port_can_be_closed_and_opened_again_at_once(healthy: Healthy, port: int) -> None:
    for count in range(1, 50):
        healthy.servers.update([web(port, count)])
        assert not healthy.servers.failed
        if count % 10 == 0:
            assert json.loads(ask(port).partition(b"\r\n\r\n")[2])["localEndpoints"] == count
        healthy.servers.update([])


def test_exhausted_descriptors_cause_no_busy_loop(healthy: Healthy, port: int) -> None:
    healthy.servers.update([web(port, 1)])
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as client:
        # The limit bounds descriptor numbers: none is left for accept().
        resource.setrlimit(resource.RLIMIT_NOFILE, (client.fileno() + 1, before[1]))
        try:
            client.connect(("127.0.0.1", port))
            began = time.process_time()
            time.sleep(0.3)
            spent = time.process_time() - began
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert spent < 0.15
    assert b" 200 OK" in ask(port)


def test_port_conflict_is_reported_once(port: int) -> None:
    failures: list[tuple[str, str]] = []
    servers = NodePortHealth(lambda: True, lambda service, error: failures.append((str(service), error)))
    with socket.create_server(("", port)):
        servers.start()
        servers.update([web(port, 1)])
        servers.update([web(port, 2)])
    servers.update([web(port, 2), ServiceHealth("shop", "x", port, 0)])
    servers.update([web(port, 2), ServiceHealth("shop", "x", port, 1)])
    servers.stop()
    assert [name for name, _ in failures] == ["shop/web", "shop/x"]
    assert "Address already in use" in failures[0][1]
    assert failures[1][1] == "it is shop/web's"


_OTHER = "192.0.2.9"


def _is_answered(port: int, host: str) -> bool:
    try:
        return b" 200 OK" in ask(port, host=host)
    except ConnectionError:
        return False


def _answered(port: int, address: str, address6: str) -> dict[str, list[bool]]:
    """Serves in this network namespace; says by address where checks are answered, for each set of addresses."""
    both = [
        socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
        for text in (address, address6)
    ]
    healthy = Healthy()
    healthy.servers.start()
    healthy.servers.update([web(port, 1)])
    found: dict[str, list[bool]] = {}
    for addresses in (None, frozenset(both[:1]), frozenset(both)):
        healthy.servers.set_addresses(addresses)
        for host in ("127.0.0.1", "::1", address, address6, _OTHER):
            found.setdefault(host, []).append(_is_answered(port, host))
    healthy.servers.stop()
    return found


@pytest.mark.root
def test_checks_are_answered_at_the_addresses_of_node_ports() -> None:
    """The loopback is always among them, and the set changes while the port is open. None is all addresses."""
    with Lab() as lab:
        node = lab.node("node-a")
        node.run(["ip", "address", "add", f"{_OTHER}/32", "dev", "lo"])
        assert node.call(_answered, 9380, node.address, node.address6) == {
            "127.0.0.1": [True, True, True],
            "::1": [True, True, True],
            node.address: [True, True, True],
            node.address6: [True, False, True],
            _OTHER: [True, False, False],
        }
