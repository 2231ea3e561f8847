"""A server that accepts connections and answers nothing, or not to the end: commands end with their --timeout."""

from __future__ import annotations

import json
import re
import socket
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner

from ebpfproxy.cli import main
from ebpfproxy.operator.api import Api, ApiError
from ebpfproxy.operator.install import rollout
from ebpfproxy.operator.install.rollout import RolloutError
from ebpfproxy.operator.migrate.daemonsets import Daemon
from ebpfproxy.operator.migrate.switches import KUBE_PROXY
from ebpfproxy.operator.waiting import WaitError
from tests.apiserver import ApiServer, objects
from tests.apiserver.certificates import Authority
from tests.kube.files import kubeconfig

NO_ANSWER = r"no answer for [\d.]+ s"
HANGING = 99


def seconds_of_silence(text: str) -> float:
    found = re.fullmatch(r"no answer for ([\d.]+) s", text)
    assert found, text
    return float(found[1])


class Silent:
    """Every try to send a request is a connection of its own: the one before was closed."""

    def __init__(self, folder: Path) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.kubeconfig = kubeconfig(folder / "admin.conf", self.url, {"token": "x"})

    def tries(self) -> int:
        self._socket.settimeout(0.1)
        count = 0
        try:
            while True:
                self._socket.accept()[0].close()
                count += 1
        except TimeoutError:
            return count

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[Silent]:
    made = Silent(tmp_path)
    yield made
    made.close()


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as made:
        made.store.put("nodes", objects.node("node-a"))
        yield made


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("install --image x", 1),
        ("install --image x --dry-run", 1),
        ("uninstall --cleanup --image x", 1),
        ("migrate plan --all-nodes", 1),
        ("migrate run --all-nodes", 1),
        ("migrate rollback --all-nodes", 1),
        ("test", 2),
    ],
)
def test_command_keeps_within_its_timeout(silent: Silent, command: str, code: int) -> None:
    """Its error names the server, and for how long it was silent. A request without the limit is tried four
    times, for 30 seconds each."""
    arguments = [*command.split(), "--timeout", "500ms", "--kubeconfig", str(silent.kubeconfig)]
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == code
    assert re.fullmatch(f"Error: {silent.url}: {NO_ANSWER}\n", done.stderr), done.stderr
    assert silent.tries() == 1


@pytest.mark.parametrize("resource", ["configmaps", "nodes"])
def test_silence_is_no_warning_of_an_installation(server: ApiServer, tmp_path: Path, resource: str) -> None:
    """What could not be read would be missing in the agent's configuration."""
    server.fail("hang", resource=resource, times=HANGING)
    path = kubeconfig(tmp_path / "admin.conf", server.url, {"token": "x"})
    arguments = ["install", "--image", "x", "--dry-run", "--timeout", "500ms", "--kubeconfig", str(path)]
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert (done.exit_code, done.stdout) == (1, "")
    assert re.fullmatch(f"Error: {server.url}: {NO_ANSWER}", done.stderr.splitlines()[-1]), done.stderr
    assert "warning" not in done.stderr


@pytest.fixture
def one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """The most that a request takes beyond its wait."""
    monkeypatch.setattr("ebpfproxy.operator.api._LATE_SECONDS", 1.0)


@pytest.mark.usefixtures("one_second")
def test_waiting_for_a_rollout_ends_when_its_time_is_over(server: ApiServer) -> None:
    """A request that is sent shortly before may take a little longer, of which the last one takes no more."""
    server.fail("hang", times=HANGING)
    with pytest.raises(RolloutError) as raised:
        rollout.wait(Api.from_options(None, server.url), "kube-system", "ebpfproxy", 0.5, print)
    first, second = str(raised.value).splitlines()
    assert first == "DaemonSet kube-system/ebpfproxy: nothing more became ready in 0.5 s"
    assert seconds_of_silence(second.removeprefix(f"{server.url}: ")) < 20
    assert len(server.requests) <= 2, "one, and a last one when the time was over"


@pytest.mark.usefixtures("one_second")
def test_waiting_for_a_pod_ends_when_its_time_is_over(server: ApiServer) -> None:
    server.fail("hang", times=HANGING)
    daemon = Daemon(Api.from_options(None, server.url), KUBE_PROXY, "node-a")
    with pytest.raises(ApiError, match=f"^{server.url}: {NO_ANSWER}$") as raised:
        daemon.wait_ready(0.5, "its pod is not ready")
    assert seconds_of_silence(str(raised.value).removeprefix(f"{server.url}: ")) < 20
    assert len(server.requests) == 1


def test_slow_server_is_waited_for_to_the_end_of_a_short_wait(server: ApiServer) -> None:
    """An answer that takes longer than what is left of the wait says what was waited for in vain."""
    server.fail("late", seconds=1.2, times=HANGING)
    daemon = Daemon(Api.from_options(None, server.url), KUBE_PROXY, "node-a")
    with pytest.raises(WaitError, match=r"^node-a: its pod is not ready after 0\.3 s$"):
        daemon.wait_ready(0.3, "its pod is not ready")


def test_requests_after_silence_are_not_waited_for_again(server: ApiServer) -> None:
    """A command that goes on after an error, to clean up, asks once more; what is answered counts."""
    api = Api.from_options(None, server.url, seconds=0.5)
    server.fail("hang", times=2)
    for _ in range(2):
        with pytest.raises(ApiError, match=NO_ANSWER):
            api.get("Node", "", "node-a")
    assert len(server.requests) == 2
    assert api.get("Node", "", "node-a") is not None


def test_each_of_parallel_requests_has_the_whole_time(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is sent while another waits for its answer."""
    monkeypatch.setattr("ebpfproxy.operator.api._LEAST_SECONDS", 0.01)
    server.fail("late", seconds=0.9, times=HANGING)
    api = Api.from_options(None, server.url, seconds=1.5)
    with ThreadPoolExecutor() as threads:
        first = threads.submit(api.list, "Node", "")
        time.sleep(0.8)
        assert len(api.list("Node", "")) == len(first.result()) == 1


def test_time_of_a_credential_plugin_is_no_silence(server: ApiServer, tmp_path: Path) -> None:
    """The plugin may wait for its user. It runs for each request, as its token has expired."""
    status = {"token": "x", "expirationTimestamp": "2020-01-01T00:00:00Z"}
    kind = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential"}
    script = f"sleep 1.2; echo '{json.dumps({**kind, 'status': status})}'"
    plugin = {"apiVersion": kind["apiVersion"], "command": "sh", "args": ["-c", script]}
    path = kubeconfig(tmp_path / "admin.conf", server.url, {"exec": {**plugin, "interactiveMode": "Never"}})
    server.fail("late", seconds=0.2)
    assert len(Api.from_options(path, None, seconds=1).list("Node", "")) == 1


def test_answer_that_does_not_end_is_silence(server: ApiServer) -> None:
    for number in range(20):
        server.store.put("nodes", objects.node(f"node-{number}"))
    server.fail("slow", resource="nodes", seconds=0.3, times=HANGING)
    api = Api.from_options(None, server.url, seconds=1)
    with pytest.raises(ApiError, match=f"^{server.url}: {NO_ANSWER}$"):
        api.list("Node", "")
    server.heal()
    assert len(api.list("Node", "")) == 21


def drip(listener: socket.socket, tls: ssl.SSLContext | None) -> bool:
    """Sends an answer's header by single bytes, in three seconds; returns whether the client took it all."""
    with suppress(OSError), listener, listener.accept()[0] as plain:
        connection = tls.wrap_socket(plain, server_side=True) if tls else plain
        with connection:
            connection.recv(1 << 16)
            for byte in b"HTTP/1.1 200 OK\r\nX: xxxxxxxx\r\n":
                connection.sendall(bytes([byte]))
                time.sleep(0.1)
            connection.sendall(b'Content-Length: 26\r\n\r\n{"metadata":{},"items":[]}')
            return True
    return False


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_header_that_does_not_end_is_silence(tmp_path: Path, scheme: str) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
    authority = Authority(tmp_path)
    tls = None
    if scheme == "https":
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(*authority.pair("server"))
    trusted = {"certificate-authority": str(authority.path)}
    api = Api.from_options(
        kubeconfig(tmp_path / "admin.conf", url, {"token": "x"}, **trusted), None, seconds=1
    )
    with ThreadPoolExecutor() as threads:
        dripping = threads.submit(drip, listener, tls)
        with pytest.raises(ApiError, match=f"^{url}: {NO_ANSWER}$"):
            api.list("Node", "")
        assert not dripping.result(), "the connection is closed when the time is over"
