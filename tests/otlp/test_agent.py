"""What a real agent, and ``ebpfproxy trace``, send to a collector."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.outside_client import OutsideClientCluster
from tests.e2e.two_node_cluster import SERVICE_IPS
from tests.lab import Agent, Lab, clients
from tests.lab.waiting import until
from tests.otlp.receiver import Key, Receiver, attributes, key, metrics_of, samples

pytestmark = pytest.mark.root

WEB = SERVICE_IPS["v4"]
FAILED = "failed to send to otlpEndpoint; further errors suppressed signal=metrics"


@pytest.fixture(scope="module")
def cluster() -> Iterator[OutsideClientCluster]:
    with Lab() as lab:
        yield OutsideClientCluster(lab)


def _listener() -> tuple[socket.socket, None]:
    return socket.create_server(("127.0.0.1", 0)), None


@pytest.fixture(scope="module")
def receiver(cluster: OutsideClientCluster) -> Iterator[Receiver]:
    made = Receiver(cluster.a.open(_listener)[0])
    yield made
    made.close()


@pytest.fixture(scope="module")
def agent(cluster: OutsideClientCluster, receiver: Receiver) -> Agent:
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
        "OTEL_EXPORTER_OTLP_HEADERS": "Authorization=Bearer%20s3cret-token",
    }
    options = ["--otlp-interval-seconds", "1", "--measure-connections", "--measure-traffic"]
    return cluster.agent(*options).start(env={**os.environ, **variables})


def scraped(agent: Agent) -> dict[Key, float]:
    families = text_string_to_metric_families(agent.http("/metrics", 10249)[1])
    found = {}
    for sample in (sample for family in families for sample in family.samples):
        labels = dict(sample.labels)
        if "le" in labels:
            labels["le"] = str(float(labels["le"]))
        found[key(sample.name, labels)] = sample.value
    return found


def test_metrics_are_what_a_scrape_says(
    cluster: OutsideClientCluster, receiver: Receiver, agent: Agent
) -> None:
    cluster.client.call(clients.spread_tcp, WEB, 80, 12)
    labels = {"ip_family": "IPv4", "namespace": "shop", "port": "http", "protocol": "TCP", "service": "web"}
    count = key("ebpfproxy_service_connect_seconds_count", labels)

    def same() -> bool:
        told, sent = scraped(agent), samples(receiver.metrics[-1:])
        ours = {name for name in told if name[0].startswith(("ebpfproxy_service_", "ebpfproxy_backend_"))}
        return (
            told.keys() == sent.keys()
            and told[count] >= 12
            and all(told[name] == pytest.approx(sent[name]) for name in ours)
        )

    until(same, "what is sent is not what /metrics says")
    units = {name: each.unit for name, each in metrics_of(receiver.metrics[-1:]).items()}
    assert units["ebpfproxy_service_connect_seconds"] == "s"
    assert units["ebpfproxy_service_bytes_total"] == "By"
    resource = attributes(receiver.metrics[-1].resource_metrics[0].resource.attributes)
    assert (resource["service.name"], resource["k8s.node.name"]) == ("ebpfproxy", "node-a")
    assert {each["authorization"] for each in receiver.headers} == {"Bearer s3cret-token"}


def test_the_log_is_sent_from_its_first_lines_on(receiver: Receiver, agent: Agent) -> None:
    until(lambda: "programmed all Services" in receiver.bodies(), "the line is not sent")
    bodies = receiver.bodies()
    assert bodies.index("created maps") < bodies.index("started") < bodies.index("programmed all Services")
    record = receiver.records()[bodies.index("programmed all Services")]
    ports = attributes(record.attributes)["service_ports"]
    assert isinstance(ports, int)
    assert ports > 0


def test_decisions_are_sent_by_trace(cluster: OutsideClientCluster, receiver: Receiver, agent: Agent) -> None:
    command = ["trace", "--bpf-root", str(cluster.a.bpf_root), "--otlp-endpoint", receiver.url]
    trace = cluster.a.start_command(command, stdout=-1, stderr=-1)
    assert trace.stderr is not None
    assert trace.stderr.readline() == b"tracing\n"
    before = len(receiver.records())
    cluster.client.call(clients.spread_tcp, WEB, 80, 3)
    trace.send_signal(signal.SIGTERM)
    assert trace.communicate(timeout=30) == (b"", b"")
    found = [each for each in receiver.records()[before:] if each.event_name == "ebpfproxy.decision"]
    assert len(found) == 3
    for record in found:
        details = attributes(record.attributes)
        assert (details["kind"], details["namespace"], details["service"]) == ("chosen", "shop", "web")
        assert details["backend.address"] in record.body.string_value
        assert details["client.address"]
        assert "time" not in details
        assert record.severity_text == "info"
    resource = attributes(receiver.logs[-1].resource_logs[0].resource.attributes)
    assert resource["k8s.node.name"] == "node-a"


def test_a_token_is_in_no_page_and_no_line(cluster: OutsideClientCluster, agent: Agent) -> None:
    configuration = json.loads(agent.http("/configz", 10249)[1])
    assert configuration["ebpfproxy.io"]["otlpIntervalSeconds"] == 1
    for text in (json.dumps(configuration), cluster.a.cli("status", "-o", "json"), agent.text):
        assert "s3cret" not in text


def test_a_collector_that_refuses_is_said_once(receiver: Receiver, agent: Agent) -> None:
    receiver.status = 400
    until(lambda: FAILED in agent.text)
    before = len(receiver.metrics)
    receiver.status = 200
    until(lambda: "sent to otlpEndpoint again signal=metrics" in agent.text)
    assert len(receiver.metrics) > before
    assert agent.text.count(FAILED) == 1
    assert "opentelemetry" not in agent.text


def test_status_says_what_has_become_of_the_log_and_of_metrics(
    cluster: OutsideClientCluster, receiver: Receiver, agent: Agent
) -> None:
    def telemetry() -> Any:
        return json.loads(cluster.a.cli("status", "-o", "json"))["agent"]["telemetry"]

    receiver.status = 403
    until(lambda: telemetry()["metrics"]["error"] == "403 Forbidden")
    failed = telemetry()
    assert failed["endpoint"] == receiver.url
    assert failed["metrics"]["last_failed"] > failed["metrics"]["last_sent"]
    assert failed["metrics"]["lost"] >= 1
    text = cluster.a.cli("status")
    assert f"otlp endpoint:    {receiver.url}\n" in text
    assert re.search(
        r"otlp metrics: +FAILED \d+s ago: 403 Forbidden; last sent \d+s ago; times missed: \d+\n", text
    )
    assert re.search(r"otlp log: .*; lines lost: \d+\n", text)
    assert "health:           healthy\n" in text
    receiver.status = 200
    until(lambda: telemetry()["metrics"]["last_sent"] > failed["metrics"]["last_failed"])


def test_the_last_lines_are_sent_at_the_end(receiver: Receiver, agent: Agent) -> None:
    agent.stop()
    bodies = receiver.bodies()
    assert bodies[-1] == "stopped, traffic goes on"
    assert bodies.count("started") == 1
