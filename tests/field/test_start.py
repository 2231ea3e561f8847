"""Start with invalid options, the time of the last programming in status, and unverified API servers."""

from __future__ import annotations

import json
import logging
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import urllib3
import yaml

from ebpfproxy.kube.client import ApiConnection
from tests.apiserver import ApiServer
from tests.apiserver.certificates import Authority
from tests.lab import Lab, manifests
from tests.lab.lab import LabNode
from tests.lab.waiting import until


@pytest.fixture(scope="module")
def node() -> Iterator[LabNode]:
    with Lab() as lab:
        yield lab.node("node-a")


@pytest.mark.root
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--manifests", "/nonexistent"], "--manifests /nonexistent: not a folder"),
        (["--kubeconfig", "/nonexistent"], "/nonexistent"),
        (["--master", "10.0.0.1"], "--master"),
        (["--manifests", "/", "--cgroup-root", "/nonexistent"], "/nonexistent"),
    ],
)
def test_invalid_option_fails_before_pins_and_sysctls_are_written(
    node: LabNode, options: list[str], message: str
) -> None:
    """The agent exits before it creates the pin directory."""
    agent = node.agent(*options, "--conntrack-min", "777777").start(wait=False)
    assert agent.process is not None
    assert agent.process.wait(20) != 0
    assert message in agent.text
    assert not node.bpf_root.exists()


@pytest.mark.root
def test_last_programmed_in_status_is_not_older_than_a_visible_change(node: LabNode) -> None:
    """This holds for fast changes, and for changes by a command instead of the API."""
    folder = node.lab.folder / "manifests"
    piece = manifests.slice_of("web", [manifests.endpoint("10.244.1.2", "node-a")])
    manifests.write(folder / "all.yaml", piece)
    node.agent(manifests=folder).start()

    def last_programmed() -> float:
        return float(json.loads(node.cli("status", "-o", "json"))["agent"]["last_programmed"])

    for number in range(3):
        address = f"10.96.0.{10 + number}"
        began = time.time()
        manifests.write(folder / "all.yaml", piece, manifests.service("web", clusterIPs=[address]))
        until(lambda a=address: a in node.cli("service", "list"), "the Service is not programmed")  # type: ignore[misc]
        assert last_programmed() >= began
    began = time.time()
    node.cli("backend", "drain", "10.244.1.2:8080")
    until(lambda: "drained" in node.cli("backend", "list"), "the backend is not drained")
    assert last_programmed() >= began


def test_insecure_skip_tls_verify_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    """The client logs one line, in place of a warning of urllib3 for each of the first requests."""
    Authority(tmp_path).pair("server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    with ApiServer(tls=context) as server:
        cluster = {"server": server.url, "insecure-skip-tls-verify": True}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": cluster}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
        caplog.set_level(logging.INFO)
        connection = ApiConnection.from_options(tmp_path / "kubeconfig", None)
        for _ in range(3):
            connection.get("/api/v1/services", {}, read_seconds=5).read()
        connection.reload()
    logged = [r.getMessage() for r in caplog.records if "not verified" in r.getMessage()]
    assert len(logged) == 1
    assert not [w for w in recwarn if issubclass(w.category, urllib3.exceptions.InsecureRequestWarning)]
