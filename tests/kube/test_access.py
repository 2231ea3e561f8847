"""Several kubeconfigs are merged, proxies are chosen, and requests are sent again."""

from __future__ import annotations

import base64
import socket
import ssl
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import urllib3
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from ebpfproxy.kube import access, kubeconfig
from ebpfproxy.kube.access import Access
from ebpfproxy.kube.client import ApiConnection
from ebpfproxy.kube.decode import Status
from ebpfproxy.kube.errors import ConfigError
from ebpfproxy.kube.failures import Failure, of_status
from tests.apiserver import ApiServer
from tests.apiserver.certificates import Authority
from tests.kube.files import kubeconfig as write_kubeconfig


def write(path: Path, **content: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump({name.replace("_", "-"): value for name, value in content.items()}))
    return path


def cluster(server: str) -> list[dict[str, Any]]:
    return [{"name": "c", "cluster": {"server": server}}]


def context(name: str, user: str = "u") -> dict[str, Any]:
    return {"name": name, "context": {"cluster": "c", "user": user}}


def test_first_of_several_kubeconfigs_wins_and_paths_are_relative_to_their_file(tmp_path: Path) -> None:
    one = write(tmp_path / "one" / "config", current_context="x", clusters=cluster("http://one"))
    two = write(
        tmp_path / "two" / "config",
        current_context="y",
        clusters=cluster("http://two"),
        users=[{"name": "u", "user": {"tokenFile": "token"}}, {"name": "v", "user": {"token": "of-v"}}],
        contexts=[context("x"), context("y", "v")],
    )
    (tmp_path / "two" / "token").write_text("of-u\n")
    found = kubeconfig.load([one, two])
    assert (found.server, found.authorization()) == ("http://one", "Bearer of-u")
    assert kubeconfig.load([two]).authorization() == "Bearer of-v"
    assert kubeconfig.load([one, two], context="y").authorization() == "Bearer of-v"
    with pytest.raises(ConfigError, match=r"config: current-context: contexts has no 'z'"):
        kubeconfig.load([one, two], context="z")


def test_token_takes_precedence_over_exec_plugin_and_password(tmp_path: Path) -> None:
    plugin = {"apiVersion": "client.authentication.k8s.io/v1", "command": "false"}
    user = {"token": "t", "exec": plugin, "username": "a", "password": "b"}
    users = [{"name": "u", "user": user}]
    path = tmp_path / "config"
    write(path, current_context="x", clusters=cluster("http://a"), users=users, contexts=[context("x")])
    assert kubeconfig.load([path]).authorization() == "Bearer t"
    del user["token"], user["exec"]
    write(path, current_context="x", clusters=cluster("http://a"), users=users, contexts=[context("x")])
    assert kubeconfig.load([path]).authorization() == "Basic YTpi"


@pytest.mark.parametrize(
    ("server", "no_proxy", "is_used"),
    [
        ("https://10.0.0.1:6443", "", True),
        ("https://10.0.0.1:6443", "10.0.0.0/8", False),
        ("https://[fd00::1]:6443", "10.0.0.0/8, fd00::/64", False),
        ("https://10.0.0.1:6443", "10.0.0.1", False),
        ("https://cp.example:6443", "example", False),
        ("https://cp.example:6443", "10.0.0.0/8,*", True),
        ("https://127.0.0.1:6443", "", False),
        ("https://[::1]:6443", "", False),
        ("https://localhost:6443", "", False),
    ],
)
def test_proxy_and_no_proxy_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, server: str, no_proxy: str, is_used: bool
) -> None:
    for name in ("HTTPS_PROXY", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", no_proxy)
    assert isinstance(access.pool(Access(server)), urllib3.ProxyManager) is is_used


def test_a_proxy_needs_no_scheme_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", "proxy.example:3128")
    made = access.pool(Access("https://10.0.0.1:6443"))
    assert isinstance(made, urllib3.ProxyManager)
    assert str(made.proxy) == "http://proxy.example:3128"


def test_https_proxy_is_verified_with_the_ca_of_the_cluster(tmp_path: Path) -> None:
    """The proxy receives the CONNECT request, which it rejects."""
    authority = Authority(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.pair("proxy"))
    with ApiServer(tls=context) as server:
        tls = access.verifying(file=str(authority.path))
        made = access.pool(Access("https://192.0.2.1:6443", tls, proxy=server.url))
        with pytest.raises(urllib3.exceptions.HTTPError, match="Tunnel connection failed"):
            made.request("GET", "https://192.0.2.1:6443/version", timeout=5)


@pytest.mark.skipif(find_spec("socks") is not None, reason="PySocks is installed")
@pytest.mark.filterwarnings("ignore::urllib3.exceptions.DependencyWarning")
@pytest.mark.parametrize("place", ["kubeconfig", "environment"])
def test_proxy_is_told_the_user_of_its_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """As kubectl tells it, with escapes undone."""
    with ApiServer() as proxy:
        url = proxy.url.replace("://", "://user:a%40b@")
        cluster: dict[str, object] = {"proxy-url": url} if place == "kubeconfig" else {}
        if place == "environment":
            monkeypatch.setenv("http_proxy", url)
        path = write_kubeconfig(tmp_path / "config", "http://192.0.2.1:6443", {}, **cluster)
        ApiConnection.from_options(path, None).get("/api", {}, read_seconds=5)
        (headers,) = proxy.headers
    assert headers["proxy-authorization"] == f"Basic {base64.b64encode(b'user:a@b').decode()}"


@pytest.mark.parametrize(
    "url",
    [
        "user:planted@proxy.example:3128",
        "http://user:planted@proxy.example:port",
        "http://user:planted/planted@proxy.example:3128",
        "http://user:planted@proxy example:3128",
        "ftp://user:planted@proxy.example:3128",
        "socks5://user:planted@proxy.example:1080",
    ],
)
@pytest.mark.parametrize("place", ["kubeconfig", "environment"])
def test_password_of_a_proxy_is_in_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, url: str
) -> None:
    cluster: dict[str, object] = {"proxy-url": url} if place == "kubeconfig" else {}
    if place == "environment":
        monkeypatch.setenv("https_proxy", url)
    path = write_kubeconfig(tmp_path / "config", "https://192.0.2.1:6443", {}, **cluster)
    with pytest.raises((ConfigError, Failure)) as raised:
        ApiConnection.from_options(path, None).get("/api", {}, read_seconds=0.1)
    assert "planted" not in str(raised.value)
    assert "user" not in str(raised.value)


def test_server_with_a_user_is_refused_without_its_password(tmp_path: Path) -> None:
    """The log and the state of the agent have the server."""
    url = "https://somebody:planted@192.0.2.1:6443"
    named = write_kubeconfig(tmp_path / "named", url, {})
    other = write_kubeconfig(tmp_path / "other", "https://192.0.2.1", {})
    for each in ((named, None), (None, url), (other, url)):
        with pytest.raises(ConfigError, match="has a user") as raised:
            ApiConnection.from_options(*each)
        assert "planted" not in str(raised.value)
        assert "192.0.2.1:6443" in str(raised.value)


def test_socks_proxy_without_pysocks_is_a_one_line_error() -> None:
    with pytest.raises(ConfigError, match=r"^proxy socks5://127\.0\.0\.1:1080: "):
        access.pool(Access("https://10.0.0.1:6443", proxy="socks5://127.0.0.1:1080"))


@pytest.mark.parametrize("trouble", ["503", "429", "close"])
def test_transient_errors_are_retried(trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ebpfproxy.kube.client._BACKOFF_FIRST", 0.01)
    with ApiServer() as server:
        connection = ApiConnection.from_options(None, server.url)
        server.fail(trouble, times=2)
        assert connection.call("GET", "/api/v1/services", read_seconds=5, tries=3).status == 200
        server.fail(trouble, times=2)
        with pytest.raises(Failure):
            connection.call("GET", "/api/v1/services", read_seconds=5, tries=2)


def test_permanent_errors_are_not_retried() -> None:
    with ApiServer() as server:
        connection = ApiConnection.from_options(None, server.url)
        server.denied.add("services")
        with pytest.raises(Failure, match=r"^403 Forbidden: services is forbidden") as refused:
            connection.call("GET", "/api/v1/services", read_seconds=5, tries=4)
        assert refused.value.status == 403
        assert sum(connection.requests.values()) == 1
    with pytest.raises(Failure, match="Connection refused") as unreached:
        connection.call("GET", "/api/v1/services", read_seconds=5, tries=4)
    assert (unreached.value.reason, unreached.value.status) == ("refused", 0)


def test_encrypted_key_is_an_error_without_a_prompt(tmp_path: Path) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    (tmp_path / "key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    certificate, _ = Authority(tmp_path).pair("client")
    user = {"client-certificate": str(certificate), "client-key": "key"}
    path = write(
        tmp_path / "config",
        current_context="x",
        clusters=cluster("https://a"),
        users=[{"name": "u", "user": user}],
        contexts=[context("x")],
    )
    with pytest.raises(ConfigError, match=r"client-certificate \(.*\) with client-key \(.*key\): "):
        kubeconfig.load([path])


def test_connect_timeout_is_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its accept queue is full, so that SYNs get no reply; the message shows no urllib3 objects."""
    monkeypatch.setattr("ebpfproxy.kube.client._CONNECT_SECONDS", 0.2)
    with socket.socket() as listener, socket.socket() as one, socket.socket() as other:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for each in (one, other):
            each.setblocking(False)
            each.connect_ex(listener.getsockname())
        host, port = listener.getsockname()
        connection = ApiConnection.from_options(None, f"http://{host}:{port}")
        with pytest.raises(Failure, match=r"^Connection to 127\.0\.0\.1 timed out") as failure:
            connection.call("GET", "/version", read_seconds=5, tries=4)
    assert failure.value.reason == "timeout"
    assert sum(connection.requests.values()) == 1


def test_connection_reset_is_a_one_line_error() -> None:
    with ApiServer() as server:
        server.fail("close")
        connection = ApiConnection.from_options(None, server.url)
        with pytest.raises(Failure, match=r"^Connection aborted: Remote end closed connection"):
            connection.call("GET", "/api/v1/services", read_seconds=5)


@pytest.mark.parametrize(
    ("header", "seconds"), [("7", 7.0), ("9" * 400, 300.0), ("soon", None), (None, None)]
)
def test_retry_after_is_limited(header: str | None, seconds: float | None) -> None:
    assert of_status(Status(code=429), header).retry_after == seconds
