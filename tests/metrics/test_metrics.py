"""Metrics: kube-proxy's names, help, labels and buckets, as real ones printed them."""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Mapping

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ebpfproxy.datapath.flows.sweeper import Sweep
from ebpfproxy.datapath.programs.attach import Attachment
from ebpfproxy.health.proxy import ProxyHealth
from ebpfproxy.kube.objects import Resource
from ebpfproxy.kube.source_status import SourceStatus, State
from ebpfproxy.metrics.agent_metrics import AgentMetrics
from ebpfproxy.metrics.health_metrics import HealthCollector
from ebpfproxy.metrics.source_metrics import SourceCollector
from ebpfproxy.services.model import Family
from tests.data import SAMPLES

#: Only mode iptables has these; neither mode nftables nor ebpfproxy exports them.
IPTABLES_ONLY = {
    "kubeproxy_iptables_ct_state_invalid_dropped_packets_total",
    "kubeproxy_iptables_localhost_nodeports_accepted_packets_total",
    "kubeproxy_sync_proxy_rules_iptables_last",
    "kubeproxy_sync_proxy_rules_iptables_total",
}
#: Dashboards and rules for kube-proxy use these of the API client and the process.
OTHERS = {
    "rest_client_requests_total",
    "rest_client_request_duration_seconds",
    "process_cpu_seconds_total",
    "process_max_fds",
    "process_open_fds",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
    "process_virtual_memory_bytes",
    "go_goroutines",
}


class Printed(msgspec.Struct, frozen=True):
    """A metric family as printed, with labels and bounds as text and without values."""

    type: str
    help: str
    labels: frozenset[frozenset[str]]
    bounds: tuple[str, ...]


def families(text: str) -> dict[str, Printed]:
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.M))
    helps = dict(re.findall(r"^# HELP (\S+) (.*)$", text, re.M))
    labels: dict[str, set[frozenset[str]]] = {name: set() for name in kinds}
    bounds: dict[str, dict[str, None]] = {name: {} for name in kinds}
    for name, inside in re.findall(r"^(\w+)(?:\{(.*)\})? \S+$", text, re.M):
        family = name if name in kinds else re.sub(r"_(bucket|sum|count)$", "", name)
        pairs = dict(re.findall(r'(\w+)="([^"]*)"', inside))
        if "le" in pairs:
            bounds[family][pairs.pop("le")] = None
        labels[family].add(frozenset(pairs))
    return {
        name: Printed(kind, helps[name], frozenset(labels[name]), tuple(bounds[name]))
        for name, kind in kinds.items()
    }


def used() -> AgentMetrics:
    metrics = AgentMetrics()
    metrics.programmed([Family.IPV4, Family.IPV6], 0.01, full=True, now=1.0)
    metrics.programmed([Family.IPV4], 0.01, full=False, now=2.0)
    metrics.network_programming([Family.IPV4], 0.7)
    metrics.queued(1.0)
    metrics.changes(3, 5)
    metrics.pending(1, 2)
    metrics.no_local_endpoints(Counter({(Family.IPV4, "internal"): 1}))
    metrics.asked("healthz", 503)
    metrics.asked("livez", 200)
    metrics.swept(Sweep(entries=4, expired=6, evicted=0, seconds=0.02), {Family.IPV4: 2})
    metrics.requested("api:6443", "GET", 0.003)
    metrics.registry.register(SourceCollector(list, lambda: {("200", "GET"): 4}, "api:6443"))
    return metrics


@pytest.mark.parametrize("mode", ["nftables", "iptables"])
def test_every_metric_of_kube_proxy_with_its_type_help_labels_and_buckets(mode: str) -> None:
    theirs = families(gzip.decompress((SAMPLES / f"metrics-{mode}.txt.gz").read_bytes()).decode())
    ours = families(used().render().decode())
    wanted = {name for name in theirs if name.startswith("kubeproxy_")} - IPTABLES_ONLY
    assert len(wanted) == 11
    for name in sorted(wanted):
        assert ours[name] == theirs[name], name
    for name in sorted(OTHERS):
        mine, real = ours[name], theirs[name]
        assert (mine.type, mine.labels, mine.bounds) == (real.type, real.labels, real.bounds), name
        if name.startswith("rest_"):
            assert mine.help == real.help


@pytest.mark.parametrize(
    ("name", "kind", "help_text", "labels"),
    [
        (
            "network_programming_duration_seconds",
            "histogram",
            "In Cluster Network Programming Latency in seconds",
            {"ip_family"},
        ),
        (
            "sync_partial_proxy_rules_duration_seconds",
            "histogram",
            "SyncProxyRules latency in seconds for partial resyncs",
            {"ip_family"},
        ),
        ("proxy_healthz_total", "counter", "Cumulative proxy healthz HTTP status", {"code"}),
        ("proxy_livez_total", "counter", "Cumulative proxy livez HTTP status", {"code"}),
    ],
)
def test_metrics_without_samples_equal_the_kubernetes_reference(
    name: str, kind: str, help_text: str, labels: set[str]
) -> None:
    """https://kubernetes.io/docs/reference/instrumentation/metrics/"""
    found = families(used().render().decode())[f"kubeproxy_{name}"]
    assert (found.type, found.help, found.labels) == (
        kind,
        f"[ALPHA] {help_text}",
        frozenset({frozenset(labels)}),
    )


def test_bounds_of_network_programming_are_those_of_kube_proxys_source() -> None:
    found = families(used().render().decode())["kubeproxy_network_programming_duration_seconds"].bounds
    seconds = [0, 0.25, 0.5, *range(1, 60), *range(60, 120, 5), *range(120, 301, 30)]
    assert found == (*(f"{each:g}" for each in seconds), "+Inf")


def test_no_kubernetes_version_is_exported() -> None:
    """kube-prometheus-stack warns of components with different versions."""
    assert "kubernetes_build_info" not in used().render().decode()


def values(metrics: AgentMetrics) -> Mapping[str, float]:
    """Returns samples by name and labels, as printed."""
    return {
        s.name + "".join(f" {k}={v}" for k, v in sorted(s.labels.items())): s.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for s in family.samples
    }


def test_values_match_the_events() -> None:
    found = values(used())
    assert found["kubeproxy_sync_full_proxy_rules_duration_seconds_count ip_family=IPv4"] == 1
    assert found["kubeproxy_sync_partial_proxy_rules_duration_seconds_count ip_family=IPv4"] == 1
    assert found["kubeproxy_sync_proxy_rules_service_changes_total"] == 3
    assert found["kubeproxy_sync_proxy_rules_endpoint_changes_pending"] == 2
    assert found["kubeproxy_proxy_healthz_total code=503"] == 1
    assert found["kubeproxy_network_programming_duration_seconds_count ip_family=IPv4"] == 1
    assert found["kubeproxy_conntrack_reconciler_deleted_entries_total ip_family=IPv4"] == 2
    assert found["kubeproxy_conntrack_reconciler_sync_duration_seconds_count ip_family=IPv6"] == 1
    assert found["rest_client_request_duration_seconds_bucket host=api:6443 le=0.005 verb=GET"] == 1
    assert found["go_goroutines"] >= 1


def test_counters_that_alerts_watch_exist_before_anything_happens() -> None:
    """increase() takes the first value of a new series as its start and sees no increase."""
    found = values(AgentMetrics())
    for name in (
        "ebpfproxy_warnings_total resource=services",
        "ebpfproxy_warnings_total resource=endpointslices",
        "ebpfproxy_stale_sockets_ended_total protocol=UDP",
        "ebpfproxy_stale_sockets_redirected_total",
        "ebpfproxy_stale_sockets_not_found_total",
        "ebpfproxy_socket_records_removed_total map=sock_origin",
        "ebpfproxy_conntrack_evicted_total",
        "ebpfproxy_capacity_problems_total",
        "ebpfproxy_service_ports_without_room",
        "kubeproxy_conntrack_reconciler_deleted_entries_total ip_family=IPv6",
    ):
        assert found[name] == 0, name


def test_capacity_problems_and_missing_sockets_are_shown() -> None:
    metrics = AgentMetrics()
    metrics.without_room(3)
    metrics.sockets_not_found(2)
    metrics.warned("services")
    found = values(metrics)
    assert found["ebpfproxy_service_ports_without_room"] == 3
    assert found["ebpfproxy_stale_sockets_not_found_total"] == 2
    assert found["ebpfproxy_warnings_total resource=services"] == 1


def test_health_and_hooks_are_read_at_each_scrape() -> None:
    metrics, now, hooks = AgentMetrics(), [100.0], [Attachment("connect4", None), Attachment("bind4", 7, 1)]
    health = ProxyHealth(60.0, monotonic=lambda: now[0])
    metrics.registry.register(HealthCollector(health.healthz, lambda: hooks))
    found = values(metrics)
    assert (found["ebpfproxy_healthy"], found["ebpfproxy_node_eligible"]) == (0, 0)
    assert (
        found["ebpfproxy_socket_hooks state=missing"] == found["ebpfproxy_socket_hooks state=attached"] == 1
    )
    health.programmed()
    health.attached()
    health.set_eligible(True)
    hooks[0] = Attachment("connect4", 6, 1)
    found = values(metrics)
    assert (found["ebpfproxy_healthy"], found["ebpfproxy_node_eligible"]) == (1, 1)
    assert found["ebpfproxy_socket_hooks state=missing"] == 0
    health.queued()
    now[0] += 60
    assert values(metrics)["ebpfproxy_healthy"] == 0, "a change has been pending for a minute"


def test_watches_and_requests_are_read_at_each_scrape() -> None:
    metrics = AgentMetrics()
    status = SourceStatus(
        resource=Resource.NODES, state=State.FAILING, since=1.0, failures={"410": 2}, last_event=9.0
    )
    metrics.registry.register(SourceCollector(lambda: [status], lambda: {("200", "GET"): 4}, "api:6443"))
    text = metrics.render().decode()
    assert 'ebpfproxy_watch_connected{resource="nodes"} 0.0' in text
    assert 'ebpfproxy_watch_failures_total{reason="410",resource="nodes"} 2.0' in text
    assert 'rest_client_requests_total{code="200",host="api:6443",method="GET"} 4.0' in text
