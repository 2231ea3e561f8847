"""Credentials and TLS of kubeconfigs and pods, and tokens that change."""

from __future__ import annotations

import json
import socket
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import ebpfproxy
from ebpfproxy.kube.client import ApiConnection
from ebpfproxy.kube.errors import ConfigError
from ebpfproxy.kube.objects import Event, Replaced, Resource
from ebpfproxy.kube.watch.reflector import Reflector, Timing
from tests.apiserver import ApiServer, objects
from tests.apiserver.certificates import Authority
from tests.kube.files import kubeconfig
from tests.kube.follower import Follower, still_works


def status_of(connection: ApiConnection) -> int:
    response = connection.get("/api/v1/services", {}, read_seconds=3)
    response.read()
    response.release_conn()
    return response.status


def test_client_certificates_over_https(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.pair("server"))
    context.load_verify_locations(authority.path)
    context.verify_mode = ssl.CERT_REQUIRED
    certificate, key = authority.pair("client")
    user: dict[str, object] = {"client-certificate": str(certificate), "client-key": str(key)}
    with ApiServer(tls=context) as server:
        server.store.put("services", objects.service("a", "10.96.0.1"))
        path = kubeconfig(
            tmp_path / "config", server.url, user, **{"certificate-authority": str(authority.path)}
        )
        events: list[Event] = []
        reflector = Reflector(ApiConnection.from_options(path, None), Resource.SERVICES, events.append)
        reflector.start()
        _until(lambda: bool(events))
        assert isinstance(events[0], Replaced)
        reflector.stop()


def test_server_with_a_certificate_of_another_ca_is_rejected(tmp_path: Path) -> None:
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
    authority, other = Authority(tmp_path / "one"), Authority(tmp_path / "other")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.pair("server"))
    with ApiServer(tls=context) as server:
        path = kubeconfig(tmp_path / "config", server.url, {}, **{"certificate-authority": str(other.path)})
        reflector = Reflector(
            ApiConnection.from_options(path, None),
            Resource.SERVICES,
            lambda _: None,
            timing=Timing(backoff_first=0.01),
        )
        reflector.start()
        _until(lambda: reflector.status.failures.get("tls", 0) > 0)
        reflector.stop()


def test_rotated_ca_is_read_again(tmp_path: Path) -> None:
    """The server gets a certificate of another CA, which the kubeconfig's file has later."""
    for folder in ("old", "new"):
        (tmp_path / folder).mkdir()
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*new.pair("server"))
    file = tmp_path / "ca.crt"
    file.write_bytes(old.path.read_bytes())
    with ApiServer(tls=context) as server:
        server.store.put("services", objects.service("a", "10.96.0.1"))
        path = kubeconfig(tmp_path / "config", server.url, {}, **{"certificate-authority": str(file)})
        events: list[Event] = []
        reflector = Reflector(
            ApiConnection.from_options(path, None),
            Resource.SERVICES,
            events.append,
            timing=Timing(backoff_first=0.02, backoff_most=0.05),
        )
        reflector.start()
        _until(lambda: reflector.status.failures.get("tls", 0) >= 2)
        file.write_bytes(new.path.read_bytes())
        _until(lambda: bool(events))
        reflector.stop()


def test_a_token_file_is_read_again_for_every_request(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("first\n")
    with ApiServer(tokens={"first"}) as server:
        path = kubeconfig(tmp_path / "config", server.url, {"tokenFile": "token"})
        connection = ApiConnection.from_options(path, None)
        assert status_of(connection) == 200
        server.tokens = {"second"}
        assert status_of(connection) == 401
        (tmp_path / "token").write_text("second\n")
        assert status_of(connection) == 200


def test_exec_plugin_runs_again_when_its_token_expires(tmp_path: Path) -> None:
    """It prints the content of a file as a token of short validity."""
    plugin = tmp_path / "plugin.py"
    plugin.write_text(
        "import datetime, json, pathlib\n"
        f"token = pathlib.Path({str(tmp_path / 'token')!r}).read_text()\n"
        "now = datetime.datetime.now(datetime.timezone.utc)\n"
        "end = now.strftime('%Y-%m-%dT%H:%M:%SZ')\n"
        "print(json.dumps({'apiVersion': 'client.authentication.k8s.io/v1', 'kind': 'ExecCredential',"
        " 'status': {'token': token, 'expirationTimestamp': end}}))\n"
    )
    (tmp_path / "token").write_text("first")
    user: dict[str, object] = {
        "exec": {
            "apiVersion": "client.authentication.k8s.io/v1",
            "command": sys.executable,
            "args": [str(plugin)],
            "interactiveMode": "Never",
        }
    }
    with ApiServer(tokens={"first"}) as server:
        connection = ApiConnection.from_options(kubeconfig(tmp_path / "config", server.url, user), None)
        assert status_of(connection) == 200
        server.tokens = {"second"}
        (tmp_path / "token").write_text("second")
        assert status_of(connection) == 200


def test_kubeconfig_is_read_again_after_a_401(tmp_path: Path) -> None:
    path = tmp_path / "config"
    with ApiServer(tokens={"good"}) as server:
        server.store.put("services", objects.service("a", "10.96.0.1"))
        kubeconfig(path, server.url, {"token": "expired"})
        events: list[Event] = []
        reflector = Reflector(
            ApiConnection.from_options(path, None),
            Resource.SERVICES,
            events.append,
            timing=Timing(backoff_first=0.02, backoff_most=0.05),
        )
        reflector.start()
        _until(lambda: reflector.status.failures.get("401", 0) >= 2)
        kubeconfig(path, server.url, {"token": "good"})
        _until(lambda: bool(events))
        reflector.stop()


def test_403_names_the_missing_permission(tmp_path: Path) -> None:
    with ApiServer() as server:
        server.denied.add("services")
        reflector = Reflector(ApiConnection.from_options(None, server.url), Resource.SERVICES, lambda _: None)
        reflector.start()
        _until(lambda: reflector.status.error is not None)
        assert "services is forbidden" in (reflector.status.error or "")
        reflector.stop()


def test_master_overrides_the_kubeconfigs_server(tmp_path: Path) -> None:
    with ApiServer(tokens={"t"}) as server:
        path = kubeconfig(tmp_path / "config", "http://127.0.0.1:1", {"token": "t"})
        assert status_of(ApiConnection.from_options(path, server.url)) == 200


def test_a_proxy_is_used(tmp_path: Path) -> None:
    """The stand-in responds with 404 to the absolute URLs that a proxy receives."""
    with ApiServer() as server:
        path = kubeconfig(tmp_path / "config", "http://192.0.2.1:6443", {}, **{"proxy-url": server.url})
        assert status_of(ApiConnection.from_options(path, None)) == 200
        assert server.requests[-1][0] == "/api/v1/services"


def test_no_option_outside_a_pod_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match="no --kubeconfig, --master or --manifests"):
        ApiConnection.from_options(None, None)


@pytest.fixture
def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Creates the files of a pod's service account, without the server's address."""
    certificate = Authority(tmp_path).path
    for name, path in (("TOKEN", tmp_path / "token"), ("CA", certificate)):
        monkeypatch.setattr(f"ebpfproxy.kube.access.{name}_FILE", path)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    return tmp_path


def test_service_account_is_used_in_a_pod(pod: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "server").mkdir()
    authority = Authority(tmp_path / "server")
    monkeypatch.setattr("ebpfproxy.kube.access.CA_FILE", authority.path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.pair("server"))
    (pod / "token").write_text("first")
    with ApiServer(tls=context, tokens={"first"}) as server:
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
        connection = ApiConnection.from_options(None, None)
        assert connection.host == server.url
        assert status_of(connection) == 200
        # The kubelet has renewed it.
        server.tokens = {"second"}
        (pod / "token").write_text("second\n")
        assert status_of(connection) == 200


def test_master_replaces_the_server_address_in_a_pod(pod: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pod / "token").write_text("t\n")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")
    with ApiServer(tokens={"t"}) as server:
        assert status_of(ApiConnection.in_pod(server.url)) == 200


def test_empty_token_in_a_pod_is_an_error(pod: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")
    (pod / "token").write_text("")
    with pytest.raises(ConfigError, match="token: the file is empty"):
        ApiConnection.from_options(None, None)


@pytest.mark.parametrize("content", [b"two\nlines", b"\xff\xfe", None], ids=["lines", "binary", "missing"])
def test_token_file_that_becomes_invalid_fails_requests_until_it_is_valid(
    tmp_path: Path, content: bytes | None
) -> None:
    token = tmp_path / "token"
    token.write_text("good")
    with ApiServer(tokens={"good"}) as server:
        path = kubeconfig(tmp_path / "config", server.url, {"tokenFile": "token"})
        follower = Follower(server, connection=ApiConnection.from_options(path, None))
        if content is None:
            token.unlink()
        else:
            token.write_bytes(content)
        follower.reflector.start()
        follower.until(lambda: follower.failures("credentials") >= 2)
        token.write_text("good")
        follower.until(lambda: follower.count(Replaced) == 1)
        follower.reflector.stop()


def test_exec_plugin_that_fails_later_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The kubernetes package logs its message for every try; here it is the error of the state."""
    plugin = tmp_path / "plugin"
    answer = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "kind": "ExecCredential",
        "status": {"token": "t", "expirationTimestamp": "2020-01-01T00:00:00Z"},
    }
    (tmp_path / "answer").write_text(json.dumps(answer))
    plugin.write_text(f"#!/bin/sh\ncat {tmp_path / 'answer'} || {{ echo no network >&2; exit 3; }}\n")
    plugin.chmod(0o755)
    user: dict[str, object] = {
        "exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": str(plugin)}
    }
    with ApiServer(tokens={"t"}) as server:
        connection = ApiConnection.from_options(kubeconfig(tmp_path / "config", server.url, user), None)
        follower = Follower(server, connection=connection)
        follower.reflector.start()
        follower.until(lambda: follower.count(Replaced) == 1)
        (tmp_path / "answer").rename(tmp_path / "gone")
        server.tokens = {"other"}
        server.drop_connections()
        follower.until(lambda: follower.failures("credentials") >= 2)
        assert "no network" in (follower.reflector.status.error or "")
        server.tokens = {"t"}
        (tmp_path / "gone").rename(tmp_path / "answer")
        still_works(server, follower)
        follower.reflector.stop()
    assert not [r for r in caplog.records if r.name == "root"]


def test_user_agent_of_requests_and_keepalive_of_their_sockets() -> None:
    with ApiServer() as server:
        connection = ApiConnection.from_options(None, server.url)
        response = connection.get("/api/v1/services", {"watch": "true"}, read_seconds=3)
        sock = response.connection.sock  # type: ignore[union-attr]
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
        response.close()
        assert server.headers[-1]["User-Agent"] == f"ebpfproxy/{ebpfproxy.__version__}"
        assert connection.requests == {("200", "GET"): 1}


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 8
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
