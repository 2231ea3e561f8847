"""A collector that is not ours takes what is sent, and passes it on unchanged: Rotel, which PyPI has."""

from __future__ import annotations

import logging
import socket
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from ebpfproxy.logs import get_logger
from ebpfproxy.metrics.agent_metrics import AgentMetrics
from ebpfproxy.otlp.exporter import Exporter
from tests.lab.waiting import until
from tests.otlp.receiver import Receiver, attributes, metrics_of, samples
from tests.otlp.test_convert import scraped


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


def test_a_collector_passes_everything_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("ebpfproxy"), "level", logging.INFO)
    module = find_spec("rotel")
    assert module is not None
    assert module.origin is not None
    behind = Receiver(socket.create_server(("127.0.0.1", 0)))
    port = _free_port()
    http = f"127.0.0.1:{port}"
    command = [str(Path(module.origin).with_name("rotel-agent")), "start"]
    command += ["--otlp-http-endpoint", http, "--otlp-grpc-endpoint", f"127.0.0.1:{_free_port()}"]
    command += ["--exporter", "otlp", "--otlp-exporter-endpoint", behind.url]
    command += ["--otlp-exporter-protocol", "http", "--batch-timeout", "20ms"]
    command += ["--pid-file", str(tmp_path / "pid"), "--log-file", str(tmp_path / "log")]
    registry = AgentMetrics().registry
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as collector:
        try:
            until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
            exporter = Exporter(f"http://{http}", 3600, registry, "node-a")
            exporter.start()
            get_logger("ebpfproxy.test").warning("odd", names=["a", 1], share=0.5, right=True)
            until(lambda: behind.metrics and behind.logs)
            exporter.stop()
            exporter.close()
        finally:
            collector.terminate()
    behind.close()
    assert samples(behind.metrics).keys() == scraped(registry).keys()
    assert metrics_of(behind.metrics)["ebpfproxy_event_to_map_seconds"].unit == "s"
    (record,) = behind.records()
    assert record.body.string_value == "odd"
    assert attributes(record.attributes) == {"names": ["a", 1], "share": 0.5, "right": True}
    resource = attributes(behind.logs[0].resource_logs[0].resource.attributes)
    assert (resource["service.name"], resource["k8s.node.name"]) == ("ebpfproxy", "node-a")
