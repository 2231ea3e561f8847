"""Metrics: kube-proxy's names, labels and buckets, as a real one printed them."""

from __future__ import annotations

import gzip
import re
from collections import Counter
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ebpfproxy.kube.status import SourceStatus, State
from ebpfproxy.metrics.agent import AgentMetrics, SourceCollector
from ebpfproxy.objects import Resource
from ebpfproxy.services.model import Family

SAMPLE = Path(__file__).parents[3] / "shared" / "kube-proxy-samples" / "metrics-nftables.txt.gz"


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
    return metrics


def series(text: str) -> set[str]:
    """Names with label names, buckets with their bounds; values left out."""
    found = set()
    for line in text.splitlines():
        if line.startswith("kubeproxy_"):
            name, labels = re.fullmatch(r"(\w+)(?:\{(.*)\})? \S+", line).groups()  # type: ignore[union-attr]
            parts = dict(re.findall(r'(\w+)="([^"]*)"', labels or ""))
            bound = float(parts.pop("le")) if "le" in parts else None
            found.add(f"{name}{sorted(parts)}{'' if bound is None else bound}")
    return found


@pytest.mark.skipif(not SAMPLE.exists(), reason=f"{SAMPLE} is not there")
def test_every_metric_of_kube_proxy_with_its_labels_and_buckets() -> None:
    theirs = series(gzip.decompress(SAMPLE.read_bytes()).decode())
    # Of conntrack there is nothing to reconcile yet.
    theirs = {name for name in theirs if "conntrack" not in name}
    missing = theirs - series(used().render().decode())
    assert not missing
    assert len(theirs) > 40


def test_the_values_are_what_happened() -> None:
    families = {f.name: f for f in text_string_to_metric_families(used().render().decode())}

    def value(family: str, **labels: str) -> float:
        return next(
            s.value
            for s in families[family].samples
            if labels.items() <= s.labels.items() and not s.name.endswith(("_bucket", "_sum"))
        )

    assert value("kubeproxy_sync_full_proxy_rules_duration_seconds", ip_family="IPv4") == 1
    assert value("kubeproxy_sync_partial_proxy_rules_duration_seconds", ip_family="IPv4") == 1
    assert value("kubeproxy_sync_proxy_rules_service_changes") == 3
    assert value("kubeproxy_sync_proxy_rules_endpoint_changes_pending") == 2
    assert value("kubeproxy_proxy_healthz", code="503") == 1
    assert value("kubeproxy_network_programming_duration_seconds", ip_family="IPv4") == 1


def test_watches_and_requests_are_read_when_asked() -> None:
    metrics = AgentMetrics()
    status = SourceStatus(
        resource=Resource.NODES, state=State.FAILING, since=1.0, failures={"410": 2}, last_event=9.0
    )
    metrics.registry.register(SourceCollector(lambda: [status], lambda: {"200": 4}, "api:6443"))
    text = metrics.render().decode()
    assert 'ebpfproxy_watch_connected{resource="nodes"} 0.0' in text
    assert 'ebpfproxy_watch_failures_total{reason="410",resource="nodes"} 2.0' in text
    assert 'rest_client_requests_total{code="200",host="api:6443",method="GET"} 4.0' in text
