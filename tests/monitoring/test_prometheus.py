"""A real Prometheus scrapes a lab's agent: every rule and every panel has data."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from ebpfproxy.datapath.kernel import bpf
from tests.field.records import key_of, maps_of
from tests.lab import Agent, Lab, LabNode, Pod, clients, servers
from tests.lab.browser import Browser, needs_chromium
from tests.monitoring import pictures
from tests.monitoring.files import (
    NODES,
    RULES,
    SERVICE,
    STACK_ALERTS,
    STACK_DASHBOARD,
    STACK_DASHBOARD_EMPTY,
    STACK_DASHBOARD_SELDOM,
    alerts,
    dashboard_expressions,
    needs_promtool,
    promtool,
    rules,
)
from tests.monitoring.prometheus import Prometheus

pytestmark = [pytest.mark.root, needs_promtool]

IP = "10.96.250.10"
PORT = 7777
#: Its backend does not listen there.
REFUSING_PORT = 5201
#: These have no samples: no watch failed and no agent was restarted.
EMPTY = {"Watches that failed A", "annotation Agent starts"}
#: promtool rejects _total on a gauge, but this name is kube-proxy's.
KUBE_PROXYS_NAME = 'non-counter metrics should not have "_total" suffix'


class Monitored:
    """A node with an agent at the stand-in, traffic, and a Prometheus that scraped meanwhile."""

    def __init__(self, lab: Lab) -> None:
        self._began = time.monotonic()
        self.node: LabNode = lab.node("node-a")
        self.client: Pod = self.node.pod("client")
        self.web: Pod = self.node.pod("web")
        servers.start(self.web, "web", PORT)
        command = [sys.executable, "-m", "tests.apiserver", "--services", "20"]
        command += ["--bench-service", f"{IP}={self.web.address}"]
        api = self.node.popen(command, join_cgroup=False, stdout=subprocess.PIPE)
        assert api.stdout is not None
        url = api.stdout.readline().decode().strip()
        self.url = url
        self.agent: Agent = self.node.agent(
            *["--master", url, "--measure-connections", "--measure-traffic", "--metrics-backends"],
            *["--drift-check-seconds", "1"],
        ).start()
        self.prometheus = Prometheus(self.node, RULES, self._stack_rules(lab.folder))
        self._scrapes(2)
        self.client.call(clients.spread_tcp, IP, PORT, 20)
        self.client.call(clients.connect_error, IP, REFUSING_PORT)
        self.client.popen(
            ["socat", "-", f"TCP:{IP}:{PORT}"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        self.agent.http("/healthz")
        self.agent.http("/livez")
        self.node.call(_churn, url)
        # A rate begins with the second sample of a series, which a Service has from its first connection on.
        self._scrapes(1)
        self.client.call(clients.spread_tcp, IP, PORT, 20)
        self.client.call(clients.connect_error, IP, REFUSING_PORT)
        with maps_of(self.node) as maps:
            bpf.map_delete(maps["services4"].fd, key_of(IP, PORT))
        self._scrapes(5)

    @property
    def age(self) -> float:
        """Seconds, in which all was that is to be seen."""
        return time.monotonic() - self._began

    def _stack_rules(self, folder: Path) -> Path:
        path = folder / "kube-prometheus-stack.yaml"
        found = [{"alert": name, "expr": expression} for name, expression in STACK_ALERTS.items()]
        path.write_text(yaml.safe_dump({"groups": [{"name": "kube-prometheus-stack", "rules": found}]}))
        return path

    def _scrapes(self, number: int) -> None:
        """Waits for this number of further samples."""
        expression = 'count_over_time(up{job="kube-proxy"}[10m])'

        def scraped() -> int:
            found = self.prometheus.query(expression)
            return int(found[0]["value"][1]) if found else 0

        self.prometheus.until(self.prometheus.rules, "it does not start")
        before = scraped()
        self.prometheus.until(lambda: scraped() >= before + number, "it does not scrape the agent")


def _churn(url: str) -> None:
    connection = http.client.HTTPConnection(url.partition("://")[2], timeout=20)
    connection.request("POST", "/control/churn?rate=50&seconds=3")
    assert connection.getresponse().read()


@pytest.fixture(scope="module")
def monitored() -> Iterator[Monitored]:
    with Lab() as lab:
        found = Monitored(lab)
        yield found
        found.prometheus.stop()


def test_promtool_accepts_the_metrics_of_an_agent(monitored: Monitored) -> None:
    status, text = monitored.agent.http("/metrics", 10249)
    assert status == 200
    with pytest.raises(AssertionError) as found:
        promtool("check", "metrics", stdin=text)
    output = [
        line for line in str(found.value).splitlines() if line.startswith(("ebpf", "kube", "rest", "error"))
    ]
    assert output == [f"kubeproxy_sync_proxy_rules_no_local_endpoints_total {KUBE_PROXYS_NAME}"]


def test_rules_are_evaluated_without_errors_and_no_alert_fires_for_a_healthy_agent(
    monitored: Monitored,
) -> None:
    prometheus = monitored.prometheus
    prometheus.until(
        lambda: all(rule["health"] != "unknown" for rule in prometheus.rules().values()), "not evaluated"
    )
    found = prometheus.rules()
    wanted = {rule.get("alert") or rule["record"] for rule in rules()} | STACK_ALERTS.keys()
    assert found.keys() == wanted
    for name, rule in found.items():
        assert (rule["health"], rule.get("lastError", "")) == ("ok", ""), name
        assert rule.get("state", "inactive") == "inactive", f"{name}: {rule['alerts']}"


def test_every_recording_rule_has_data(monitored: Monitored) -> None:
    for rule in rules():
        if "record" in rule:
            monitored.prometheus.wait_samples(rule["record"])


@pytest.mark.parametrize("name", dashboard_expressions())
def test_every_panel_of_our_dashboard_has_data(monitored: Monitored, name: str) -> None:
    if name in EMPTY:
        assert monitored.prometheus.query(dashboard_expressions()[name]) == []
    else:
        monitored.prometheus.wait_samples(dashboard_expressions()[name])


@pytest.mark.parametrize("name", [NODES, SERVICE])
def test_every_line_of_a_panel_has_a_name_of_its_own(monitored: Monitored, name: str) -> None:
    """A label that the series have not would leave a gap, and one that is missing two lines with one name."""
    for title, found in pictures.read(monitored.prometheus, name, monitored.age, "1m").items():
        names = [each.name for each in found]
        assert len(set(names)) == len(names), title
        assert all(each == " ".join(each.split()) for each in names), title
        assert all(names) or names == [""], title


@needs_chromium
def test_dashboards_can_be_seen(monitored: Monitored, tmp_path: Path) -> None:
    """EBPFPROXY_PICTURES names a folder that keeps the pictures, to be looked at."""
    folder = Path(os.environ.get("EBPFPROXY_PICTURES") or tmp_path)
    browser = Browser(monitored.node, tmp_path / "profile")
    for name in (NODES, SERVICE):
        data = pictures.read(monitored.prometheus, name, monitored.age, "10s")
        assert pictures.take(browser, name, data, folder).stat().st_size > 50_000
        assert browser.evaluate("[...document.querySelectorAll('.panel')].length") == len(data)
        cut = "[...document.querySelectorAll('h2')].filter(each => each.scrollWidth > each.clientWidth)"
        assert browser.evaluate(f"{cut}.map(each => each.innerText)") == []
        empty = "[...document.querySelectorAll('.panel')].filter(each => each.querySelector('.nothing'))"
        assert {f"{title} A" for title in browser.evaluate(f"{empty}.map(each => each.title)")} <= EMPTY
        seen = browser.text
        for each in data.values():
            assert all(series.name in seen for series in each[:2])
    assert browser.complaints == []
    browser.close()


@pytest.mark.parametrize("name", STACK_DASHBOARD)
def test_kube_prometheus_stacks_panels_for_kube_proxy_have_data(monitored: Monitored, name: str) -> None:
    # kube-proxy has one line per address family here as well.
    monitored.prometheus.wait_samples(STACK_DASHBOARD[name], 2 if "Sync Latency" in name else 1)


@pytest.mark.parametrize("name", STACK_DASHBOARD_EMPTY)
def test_kube_prometheus_stacks_panels_of_missing_events_are_empty_without_errors(
    monitored: Monitored, name: str
) -> None:
    assert monitored.prometheus.query(STACK_DASHBOARD_EMPTY[name]) == []


@pytest.mark.parametrize("name", STACK_DASHBOARD_SELDOM)
def test_kube_prometheus_stacks_panels_of_rare_requests_have_at_most_one_line(
    monitored: Monitored, name: str
) -> None:
    assert len(monitored.prometheus.query(STACK_DASHBOARD_SELDOM[name])) <= 1


def test_counters_match_the_events(monitored: Monitored) -> None:
    def one(expression: str) -> float:
        (found,) = monitored.prometheus.query(expression)
        return float(found["value"][1])

    assert one('sum(ebpfproxy_service_connections_total{service="bench",result="chosen"})') >= 21
    assert one("sum(ebpfproxy_backend_open_connections)") == 1
    assert one("ebpfproxy:event_to_map_seconds:p99_5m") < 30
    assert one("sum(up)") == one("ebpfproxy_healthy") == one("ebpfproxy_node_eligible") == 1
    assert one('ebpfproxy_socket_hooks{state="missing"}') == 0
    assert one('rest_client_requests_total{code="200"}') >= 3
    # The stand-in changes nothing any more.
    assert one(dashboard_expressions()["Waiting A"]) == 0
    # It was queued before it was programmed, and no change is pending.
    assert (
        one(
            "max(kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds"
            " - kubeproxy_sync_proxy_rules_last_timestamp_seconds)"
        )
        < 0
    )


def test_alerts_fire_for_detached_hooks(monitored: Monitored) -> None:
    """Without the agent's own comparison, which attaches them again within seconds."""
    monitored.agent.stop()
    monitored.agent = monitored.node.agent("--master", monitored.url, "--drift-check-seconds", "0").start()
    (link,) = monitored.node.bpf_root.rglob("links/connect4")
    link.unlink()
    _until_pending(monitored, "EbpfproxySocketHooksMissing")


def test_alerts_fire_for_a_stopped_agent(monitored: Monitored) -> None:
    monitored.agent.stop()
    _until_pending(monitored, "EbpfproxyAgentDown")
    _until_pending(monitored, "EbpfproxyAbsent")


def _until_pending(monitored: Monitored, name: str) -> None:
    assert alerts()[name]["for"]
    monitored.prometheus.until(
        lambda: monitored.prometheus.rules()[name]["state"] == "pending", f"{name} is not pending"
    )
