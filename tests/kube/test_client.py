"""Credentials and TLS: what kubeconfigs say, and what happens when tokens change."""

from __future__ import annotations

import datetime
import ipaddress
import json
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ebpfproxy.kube.client import ApiConnection, ConfigError
from ebpfproxy.kube.reflector import Reflector, Timing
from ebpfproxy.objects import Event, Replaced, Resource
from tests.apiserver import ApiServer, objects


def kubeconfig(path: Path, server: str, user: dict[str, object], **cluster: object) -> Path:
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "c", "cluster": {"server": server, **cluster}}],
                "users": [{"name": "u", "user": user}],
                "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
                "current-context": "x",
            }
        )
    )
    return path


def status_of(connection: ApiConnection) -> int:
    response = connection.get("/api/v1/services", {}, read_seconds=3)
    response.read()
    response.release_conn()
    return response.status


class Authority:
    """A certificate authority, and certificates for 127.0.0.1 and for a client."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test-ca")])
        self.path = folder / "ca.crt"
        self.path.write_bytes(self._sign(self._name, self._key, ca=True))

    def _sign(self, name: x509.Name, key: ec.EllipticCurvePrivateKey, *, ca: bool = False) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        return made.public_bytes(serialization.Encoding.PEM)

    def pair(self, name: str) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate, private = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate.write_bytes(self._sign(subject, key))
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return certificate, private


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


def test_a_server_with_another_authority_is_not_trusted(tmp_path: Path) -> None:
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


def test_an_exec_plugin_is_asked_again_when_its_token_expires(tmp_path: Path) -> None:
    """It prints the content of a file as a token that is good for a moment."""
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


def test_after_a_401_the_whole_kubeconfig_is_read_again(tmp_path: Path) -> None:
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


def test_403_names_what_is_not_granted(tmp_path: Path) -> None:
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
    """The stand-in takes a proxy's absolute URLs as they are; it answers 404 for them."""
    with ApiServer() as server:
        path = kubeconfig(tmp_path / "config", "http://192.0.2.1:6443", {}, **{"proxy-url": server.url})
        assert status_of(ApiConnection.from_options(path, None)) == 200
        assert server.requests[-1][0] == "/api/v1/services"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not YAML"),
        ("apiVersion: v1\nkind: Config\n", "current-context"),
        (json.dumps({"current-context": "x", "contexts": []}), "contexts"),
    ],
)
def test_a_bad_kubeconfig_is_one_clear_error(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "config"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        ApiConnection.from_options(path, None)
    assert str(path) in str(error.value)
    assert said in str(error.value)


def test_without_any_option_and_outside_a_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match="no --kubeconfig, --master or --manifests"):
        ApiConnection.from_options(None, None)


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 8
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
