"""Secrets that are planted where an agent reads are in nothing that it or its commands say, whatever goes wrong."""

from __future__ import annotations

import os
import re
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3

from tests.apiserver import objects
from tests.apiserver.certificates import Authority
from tests.kube.files import kubeconfig
from tests.lab import Agent, Lab, LabNode, Pod, clients, servers
from tests.lab.waiting import until
from tests.ui.server import Ui

pytestmark = pytest.mark.root

#: What is planted begins with it; a key's own text is planted as well.
PLANTED = "planted"
TOKEN = f"{PLANTED}-token"
ADDRESS = "10.96.0.10"
#: The agent has it in its environment. Nobody listens where the proxy and the collector should be.
ENVIRONMENT = {
    "API_KEY": f"{PLANTED}-in-the-environment",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9/",
    "OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer {PLANTED}-of-the-collector",
    "http_proxy": f"http://user:{PLANTED}-of-the-proxy@127.0.0.1:9",
}
ANNOTATIONS = {
    "kubectl.kubernetes.io/last-applied-configuration": f'{{"password":"{PLANTED}-last-applied"}}',
    "example.com/password": f"{PLANTED}-annotation",
}


class Cluster:
    """A node whose agent's API server wants a client certificate or a token."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.node: LabNode = lab.node("node-a")
        self.client: Pod = self.node.pod("client")
        self.server: Pod = self.node.pod("server")
        servers.start(self.server, "server", 8080)
        self._authority = Authority(folder)
        self._pairs = {name: self._authority.pair(name) for name in ("server", "agent", "other")}
        certificate, key = map(str, self._pairs["server"])
        self._api = self.node.popen(
            [
                *(sys.executable, "-m", "tests.apiserver", "--services", "0", "--token", TOKEN),
                *("--tls-cert", certificate, "--tls-key", key, "--client-ca", str(self._authority.path)),
            ],
            join_cgroup=False,
            stdout=-1,
        )
        assert self._api.stdout is not None
        self.url = self._api.stdout.readline().decode().strip()

    def key(self, name: str) -> str:
        """Some of a private key's text."""
        return self._pairs[name][1].read_text().splitlines()[1]

    def user(self, kind: str, folder: Path) -> dict[str, object]:
        """The credentials of a kubeconfig: those that are good, or one of many kinds that are not."""
        certificate, key = (str(path) for path in self._pairs["agent"])
        (folder / "plugin").write_text(
            textwrap.dedent(f"""\
                #!{sys.executable}
                import json, os
                assert os.environ["PLUGIN_KEY"] == "{PLANTED}-of-the-plugin"
                status = {{"token": "{TOKEN}"}}
                version = "client.authentication.k8s.io/v1"
                print(json.dumps({{"apiVersion": version, "kind": "ExecCredential", "status": status}}))
                """)
        )
        (folder / "plugin").chmod(0o755)
        plugin = {
            "apiVersion": "client.authentication.k8s.io/v1",
            "command": str(folder / "plugin"),
            "args": [f"--key={PLANTED}-argument"],
            "env": [{"name": "PLUGIN_KEY", "value": f"{PLANTED}-of-the-plugin"}],
            "interactiveMode": "Never",
        }
        users: dict[str, dict[str, object]] = {
            "token": {"token": TOKEN},
            "certificate": {"client-certificate": certificate, "client-key": key},
            "plugin": {"exec": plugin},
            "wrong token": {"token": f"{PLANTED}-wrong"},
            "token of two lines": {"token": f"{PLANTED}-two\n{PLANTED}-lines"},
            "wrong key": {"client-certificate": certificate, "client-key": str(self._pairs["other"][1])},
            "no key": {"client-certificate": certificate, "client-key-data": f"{PLANTED}!"},
            "wrong password": {"username": "agent", "password": f"{PLANTED}-password"},
            "wrong plugin": {"exec": {**plugin, "env": [], "command": "/nowhere/plugin"}},
            "not a string": {"token": [f"{PLANTED}-list"]},
            "no YAML": {},
        }
        return users[kind]

    def kubeconfig(self, kind: str, folder: Path) -> Path:
        authority = {"certificate-authority": str(self._authority.path)}
        return kubeconfig(folder / "config", self.url, self.user(kind, folder), **authority)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Lab() as lab:
        yield Cluster(lab, tmp_path_factory.mktemp("authority"))


def put(cluster: Cluster, **metadata: Any) -> None:
    """A Service with a planted annotation and an algorithm that there is not, and its endpoint."""
    service = objects.service("web", ADDRESS, namespace="shop")
    service["metadata"]["annotations"] = {**ANNOTATIONS, **metadata}
    found = objects.endpoint_slice(
        "web", [objects.endpoint(cluster.server.address, cluster.node.name)], namespace="shop"
    )
    found["metadata"]["annotations"] = ANNOTATIONS
    node = objects.node(cluster.node.name, address=cluster.node.address)
    node["metadata"]["annotations"] = ANNOTATIONS
    for resource, each in (("nodes", node), ("services", service), ("endpointslices", found)):
        cluster.node.call(_put, cluster.url, resource, each)


def _put(url: str, resource: str, body: object) -> None:
    with urllib3.PoolManager(cert_reqs="CERT_NONE") as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer = pool.request("POST", f"{url}/control/put?resource={resource}", json=body)
    assert answer.status == 200, answer.data


def said(cluster: Cluster, agent: Agent) -> dict[str, str]:
    """Everything that says something of the agent, by name."""
    node = cluster.node
    roots = ["--bpf-root", str(node.bpf_root)]
    commands = (
        ["status"],
        ["status", "-v"],
        ["status", "-o", "json"],
        ["check"],
        ["service", "list", "-o", "json"],
        ["service", "get", "shop/web"],
        ["backend", "list", "-o", "json"],
        ["explain", cluster.client.address, "shop/web:http", "-o", "json"],
        ["top", "--once", "-i", "0.2s"],
    )
    found = {}
    for words in commands:
        done = node.run_command([*words, *roots])
        found[" ".join(words)] = done.output + done.errors
    for path, port in (("/metrics", 10249), ("/configz", 10249), ("/healthz", 10256), ("/livez", 10256)):
        found[path] = node.call(clients.get, port, path)[1]
    ui = Ui(node)
    for path in (
        "status",
        "services",
        "services/shop/web",
        "clients",
        "check",
        f"explain?from={cluster.client.address}&to=shop/web:http",
    ):
        found[f"page: {path}"] = ui.get(f"/api/{path}")[1].decode()
    _, found["errors of the page"] = ui.end()
    found["log"] = agent.text
    return found


def start(cluster: Cluster, path: Path, form: str) -> Agent:
    options = ("-v", "10", "--logging-format", form, "--otlp-interval-seconds", "1")
    return cluster.node.agent("--kubeconfig", str(path), *options)


@pytest.mark.parametrize(("kind", "form"), [("token", "text"), ("plugin", "json")])
def test_secrets_are_in_nothing_that_an_agent_says(
    cluster: Cluster, tmp_path: Path, kind: str, form: str
) -> None:
    put(cluster, **{"ebpfproxy.io/lb-algorithm": "none-such"})
    agent = start(cluster, cluster.kubeconfig(kind, tmp_path), form)
    agent.start(env={**os.environ, **ENVIRONMENT})
    until(lambda: "none-such" in agent.text, "the annotation is not warned of")
    assert cluster.client.call(clients.ask_tcp, ADDRESS, 80)["name"] == "server"
    texts = said(cluster, agent)
    assert agent.stop() == 0
    texts["log to the end"] = agent.text
    wrong = {name: text for name, text in texts.items() if PLANTED in text or cluster.key("agent") in text}
    assert not wrong
    # They say what they should.
    for name, text in texts.items():
        if name.startswith(("service ", "explain ", "page: services/", "page: explain")):
            assert ADDRESS in text, name
    assert "ebpfproxy_" in texts["/metrics"]


@pytest.mark.parametrize(
    "kind",
    [
        "wrong token",
        "token of two lines",
        "wrong key",
        "no key",
        "wrong password",
        "wrong plugin",
        "not a string",
        "no YAML",
    ],
)
def test_secrets_are_in_no_error(cluster: Cluster, tmp_path: Path, kind: str) -> None:
    """The agent ends, or asks again and again."""
    path = cluster.kubeconfig(kind, tmp_path)
    if kind == "no YAML":
        path.write_text(f"users: [{{name: u, user: {{token: '{PLANTED}-and-no-end\n")
    agent = start(cluster, path, "text")
    agent.start(wait=False, env={**os.environ, **ENVIRONMENT})
    process = agent.process
    assert process is not None
    failed = re.compile(r"401|credentials|Error: ")
    until(lambda: bool(failed.search(agent.text)), "the agent does not complain")
    if process.poll() is None:
        agent.stop()
    assert PLANTED not in agent.text
    assert cluster.key("other") not in agent.text
    assert cluster.key("agent") not in agent.text
