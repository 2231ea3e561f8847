"""A pod finds the address of the control plane before Services are programmed."""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from ebpfproxy.kube import control_plane
from ebpfproxy.kube.client import ApiConnection
from ebpfproxy.kube.control_plane import server_of
from ebpfproxy.kube.objects import Replaced
from tests.apiserver import ApiServer
from tests.apiserver.certificates import Authority
from tests.kube.files import kubeconfig
from tests.kube.follower import Follower
from tests.lab import Lab

KUBELET = """
apiVersion: v1
kind: Config
clusters:
- cluster: {certificate-authority-data: eHg=, server: "https://cp.example:6443/"}
  name: kubernetes
- cluster: {server: "https://other:1"}
  name: other
contexts:
- context: {cluster: kubernetes, user: system:node:a}
  name: system:node:a@kubernetes
current-context: system:node:a@kubernetes
users: []
"""
#: kubeadm writes it so (cmd/kubeadm/app/phases/bootstraptoken/clusterinfo).
CLUSTER_INFO = """
apiVersion: v1
clusters:
- cluster:
    certificate-authority-data: eHg=
    server: {server}
  name: ""
contexts: null
current-context: ""
kind: Config
preferences: {{}}
users: null
"""
TOKEN = "of-the-service-account"
#: A busy machine may take so many seconds more; a server that hangs takes longer.
SLACK = 5


class Cluster:
    """Servers over HTTPS, and a pod: ``own`` stands for the cluster IP."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._monkeypatch = monkeypatch
        self._tls = self.tls(Authority(folder))
        self.kubelet_conf = folder / "kubelet.conf"
        (folder / "token").write_text(TOKEN)
        for name, file in (("TOKEN", "token"), ("CA", "ca.crt")):
            monkeypatch.setattr(f"ebpfproxy.kube.access.{name}_FILE", folder / file)
        monkeypatch.setenv("EBPFPROXY_KUBELET_KUBECONFIG", str(self.kubelet_conf))
        self.own_is("https://127.0.0.1:1")

    @staticmethod
    def tls(authority: Authority) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*authority.pair("server"))
        return context

    def server(
        self, *, tls: ssl.SSLContext | None = None, port: int = 0
    ) -> AbstractContextManager[ApiServer]:
        return ApiServer(tls=tls or self._tls, tokens={TOKEN}, port=port)

    def own_is(self, url: str) -> None:
        host, _, port = url.removeprefix("https://").rpartition(":")
        for name, value in (("SERVICE_HOST", host), ("SERVICE_PORT", port), ("PORT_443_TCP_ADDR", host)):
            self._monkeypatch.setenv(f"KUBERNETES_{name}", value)

    def kubelets_is(self, url: str) -> None:
        kubeconfig(self.kubelet_conf, url, {})

    def connection(self) -> ApiConnection:
        return ApiConnection.from_options(None, None)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(tmp_path, monkeypatch)


@pytest.fixture
def closed() -> str:
    """Returns an address without a listener."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"https://127.0.0.1:{sock.getsockname()[1]}"


@pytest.fixture
def silent() -> Iterator[str]:
    """Returns an address whose connections the kernel accepts and no process serves."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield f"https://127.0.0.1:{sock.getsockname()[1]}"


def publish(server: ApiServer, url: str) -> None:
    body = {"kind": "ConfigMap", "data": {"kubeconfig": CLUSTER_INFO.format(server=url)}}
    server.public[control_plane.CLUSTER_INFO] = json.dumps(body).encode()


# -- order of preference


def test_cluster_info_is_preferred_and_read_without_the_token(cluster: Cluster) -> None:
    with cluster.server() as own, cluster.server() as better, cluster.server() as kubelets:
        cluster.own_is(own.url)
        cluster.kubelets_is(kubelets.url)
        publish(own, better.url)
        assert cluster.connection().host == better.url
        assert [path for path, _ in own.requests] == [control_plane.CLUSTER_INFO]
        assert [path for path, _ in better.requests] == ["/version"]
        for server in (own, better, kubelets):
            assert all("Authorization" not in headers for headers in server.headers)


def test_server_of_kubelets_kubeconfig_is_the_second_choice(cluster: Cluster) -> None:
    with cluster.server() as own, cluster.server() as kubelets:
        cluster.own_is(own.url)
        cluster.kubelets_is(kubelets.url)
        assert cluster.connection().host == kubelets.url


def test_service_address_from_kubelet_is_the_last_choice(cluster: Cluster) -> None:
    with cluster.server() as own:
        cluster.own_is(own.url)
        assert cluster.connection().host == own.url


def test_address_set_in_the_pod_is_used_unchanged(
    cluster: Cluster, closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cluster.server() as kubelets:
        cluster.kubelets_is(kubelets.url)
        cluster.own_is(closed)
        monkeypatch.setenv("KUBERNETES_PORT_443_TCP_ADDR", "10.96.0.1")
        assert cluster.connection().host == closed
        assert not kubelets.requests


# -- servers without a response


@pytest.mark.parametrize("kind", ["closed", "silent"])
@pytest.mark.parametrize("place", ["cluster-info", "kubelet.conf", "cluster IP"])
def test_unreachable_server_is_skipped(
    cluster: Cluster, request: pytest.FixtureRequest, place: str, kind: str
) -> None:
    dead = request.getfixturevalue(kind)
    with cluster.server() as own, cluster.server() as kubelets:
        cluster.own_is(dead if place == "cluster IP" else own.url)
        cluster.kubelets_is(dead if place == "kubelet.conf" else kubelets.url)
        if place == "cluster-info":
            publish(own, dead)
        began = time.monotonic()
        found = cluster.connection().host
        assert found == (own.url if place == "kubelet.conf" else kubelets.url)
        assert time.monotonic() - began < control_plane.SECONDS + SLACK


def test_server_with_a_certificate_of_another_ca_is_skipped(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = cluster.tls(Authority(tmp_path / "other"))
    with cluster.server() as own, cluster.server(tls=other) as stranger:
        cluster.own_is(own.url)
        cluster.kubelets_is(stranger.url)
        publish(own, stranger.url)
        assert cluster.connection().host == own.url
        assert not stranger.requests


def test_server_without_tls_is_skipped(cluster: Cluster) -> None:
    """It would receive the token."""
    with cluster.server() as own, ApiServer() as plain:
        cluster.own_is(own.url)
        cluster.kubelets_is(plain.url)
        publish(own, plain.url)
        assert cluster.connection().host == own.url
        assert not plain.requests


@pytest.mark.parametrize("status", ["401", "403", "404", "500"])
def test_cluster_info_may_be_forbidden_or_missing(cluster: Cluster, status: str) -> None:
    with cluster.server() as own, cluster.server() as better:
        cluster.own_is(own.url)
        publish(own, better.url)
        own.fail(status)
        assert cluster.connection().host == own.url


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[",
        b"\xff",
        b"[" * 20000,
        b"{}",
        b'{"data": null}',
        b'{"data": {}}',
        b'{"data": {"kubeconfig": 7}}',
        b'{"data": {"kubeconfig": "clusters: 7"}}',
        b'{"data": {"kubeconfig": "clusters: [{name: \\"\\", cluster: {server: ftp://x}}]"}}',
        json.dumps({"data": {"kubeconfig": "[" * 5000}}).encode(),
        b'{"data": {"kubeconfig": "' + b"x" * (1 << 20) + b'"}}',
    ],
    ids=lambda body: repr(body[:30]),
)
def test_cluster_info_without_a_server_is_skipped(cluster: Cluster, body: bytes) -> None:
    with cluster.server() as own:
        cluster.own_is(own.url)
        own.public[control_plane.CLUSTER_INFO] = body
        assert cluster.connection().host == own.url


def test_kubelets_server_is_kept_until_a_server_responds(cluster: Cluster, closed: str) -> None:
    """Reflectors retry; after three failures an address is chosen again."""
    cluster.kubelets_is(closed)
    connection = cluster.connection()
    assert connection.host == closed
    with cluster.server() as own:
        cluster.own_is(own.url)
        follower = Follower(own, connection=connection)
        follower.reflector.start()
        follower.until(lambda: follower.count(Replaced) == 1)
        assert connection.host == own.url
        assert follower.failures("refused") >= 3
        follower.reflector.stop()


def test_address_that_responded_is_kept_while_no_server_responds(cluster: Cluster) -> None:
    """No other address can be found where the cluster IP leads to a server that is gone."""
    with cluster.server() as own, cluster.server() as known:
        cluster.own_is(own.url)
        publish(own, known.url)
        connection = cluster.connection()
        assert connection.host == known.url
        port = int(known.url.rpartition(":")[2])
    connection.reload()
    assert connection.host == known.url
    with cluster.server(port=port):
        connection.reload()
        assert connection.host == known.url


def test_server_that_stops_is_replaced_by_another(cluster: Cluster) -> None:
    with cluster.server() as own:
        cluster.own_is(own.url)
        with cluster.server() as kubelets:
            cluster.kubelets_is(kubelets.url)
            connection = cluster.connection()
            assert connection.host == kubelets.url
            follower = Follower(own, connection=connection)
            follower.reflector.start()
            follower.until(lambda: follower.count(Replaced) == 1)
        follower.until(lambda: connection.host == own.url)
        follower.until(lambda: follower.count(Replaced) == 2 or bool(own.requests[-1][1].get("watch")))
        follower.reflector.stop()


@pytest.mark.root
def test_dropped_packets_to_the_cluster_ip_delay_a_start_by_a_second(cluster: Cluster) -> None:
    """The node has no Services yet: its default route leads to no host."""
    cluster.own_is("https://10.96.0.1:443")
    with Lab() as lab:
        node = lab.node("node-a")
        for command in (
            "ip link add hole type veth peer name bottom",
            "ip link set bottom up",
            "ip link set hole arp off up",
            "ip route add 10.96.0.0/12 dev hole",
        ):
            node.run(command.split())

        def chosen() -> tuple[str, float]:
            began = time.monotonic()
            return cluster.connection().host, time.monotonic() - began

        def chosen_with_kubelets() -> tuple[str, str, float]:
            with cluster.server() as kubelets:
                cluster.kubelets_is(kubelets.url)
                return kubelets.url, *chosen()

        host, seconds = node.call(chosen)
        assert host == "https://10.96.0.1:443"
        assert control_plane.SECONDS <= seconds < control_plane.SECONDS + SLACK
        kubelets, host, seconds = node.call(chosen_with_kubelets)
        assert host == kubelets
        assert control_plane.SECONDS / 2 <= seconds < control_plane.SECONDS / 2 + SLACK


# -- kubeconfigs


@pytest.mark.parametrize(
    ("text", "server"),
    [
        (KUBELET, "https://cp.example:6443"),
        (CLUSTER_INFO.format(server="https://192.0.2.1:6443"), "https://192.0.2.1:6443"),
        *(
            (text, None)
            for text in (
                "",
                "[",
                "a: [1",
                "clusters: 7",
                KUBELET.replace("https://cp", "ftp://cp"),
                KUBELET.replace("https://cp", "http://cp"),
                "current-context: x\n",
            )
        ),
    ],
)
def test_server_is_read_from_a_kubeconfig(tmp_path: Path, text: str, server: str | None) -> None:
    path = tmp_path / "kubelet.conf"
    path.write_text(text)
    assert server_of(path) == server


def test_missing_kubeconfig_has_no_server(tmp_path: Path) -> None:
    assert server_of(tmp_path / "none") is None
