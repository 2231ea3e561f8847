"""Starts that are refused, what status says of the last change, and what the log says of an unverified server."""

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
    ("options", "says"),
    [
        (["--manifests", "/nonexistent"], "--manifests /nonexistent: not a folder"),
        (["--kubeconfig", "/nonexistent"], "/nonexistent"),
        (["--master", "10.0.0.1"], "--master"),
        (["--manifests", "/", "--cgroup-root", "/nonexistent"], "/nonexistent"),
    ],
)
def test_a_wrong_option_is_found_before_anything_is_made(
    node: LabNode, options: list[str], says: str
) -> None:
    """Neither a folder of pins nor a sysctl is there of a start that was refused for what it was told."""
    agent = node.agent(*options, "--conntrack-min", "777777").start(wait=False)
    assert agent.process is not None
    assert agent.process.wait(20) != 0
    assert says in agent.text
    assert not node.bpf_root.exists()


@pytest.mark.root
def test_status_never_shows_a_change_that_is_newer_than_the_last_programming(node: LabNode) -> None:
    """Many changes a second, and ones that come from a command and not from the API."""
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
        until(lambda a=address: a in node.cli("service", "list"), "not programmed")  # type: ignore[misc]
        assert last_programmed() >= began
    began = time.time()
    node.cli("backend", "drain", "10.244.1.2:8080")
    until(lambda: "drained" in node.cli("backend", "list"), "not drained")
    assert last_programmed() >= began


def test_a_server_that_is_not_verified_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    """insecure-skip-tls-verify: one line, where urllib3 has one for each of the first requests."""
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
    said = [r.getMessage() for r in caplog.records if "not verified" in r.getMessage()]
    assert len(said) == 1
    assert not [w for w in recwarn if issubclass(w.category, urllib3.exceptions.InsecureRequestWarning)]
