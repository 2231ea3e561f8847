"""The files of ``deploy/monitoring``, and the queries of kube-prometheus-stack about kube-proxy."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "deploy" / "monitoring"
RULES = FOLDER / "rules.yaml"
#: The dashboards: of agents, and of a Service.
NODES, SERVICE = "grafana-dashboard.json", "grafana-service-dashboard.json"

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None or shutil.which("prometheus") is None,
    reason="no promtool or prometheus here: apt-get install --no-install-recommends prometheus",
)


def promtool(*arguments: str, stdin: str = "") -> str:
    """Returns promtool's output. Raises AssertionError with it where promtool finds errors."""
    done = subprocess.run(
        ["promtool", *arguments], input=stdin, capture_output=True, check=False, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rules() -> list[dict[str, Any]]:
    """Returns all our rules, recording rules first."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def dashboard(name: str = NODES) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / name).read_text())
    return found


def panels(name: str = NODES) -> Iterator[dict[str, Any]]:
    """Returns the panels of a dashboard without its rows."""
    for panel in dashboard(name)["panels"]:
        if panel["type"] != "row":
            yield panel


def as_grafana(expression: str, *, instance: str = ".*", interval: str = "1m") -> str:
    """Replaces Grafana's variables, for all agents by default."""
    values = {"$__rate_interval": interval, "$cluster": ".*", "$instance": instance}
    values |= {"$namespace": ".*", "$service": ".*"}
    for name, value in values.items():
        expression = expression.replace(name, value)
    return expression


def dashboard_expressions() -> dict[str, str]:
    """Returns the queries of all dashboards by panel and number."""
    found = {
        f"{prefix}{panel['title']} {target['refId']}": as_grafana(target["expr"])
        for prefix, name in (("", NODES), ("Service: ", SERVICE))
        for panel in panels(name)
        for target in panel["targets"]
    }
    for note in dashboard()["annotations"]["list"]:
        found[f"annotation {note['name']}"] = as_grafana(note["expr"])
    return found


# kube-prometheus-stack's dashboard "Kubernetes / Proxy" and its rules name these metrics with these labels.
_KUBE_PROXY = 'cluster="", job="kube-proxy"'
_ONE = f'{_KUBE_PROXY}, instance=~".+"'


def _rate(name: str, *more: str) -> str:
    return f"rate({name}{{{', '.join((_ONE, *more))}}}[1m])"


def _p99(name: str, by: str, *more: str) -> str:
    return f"histogram_quantile(0.99, sum({_rate(f'{name}_bucket', *more)}) by ({by}, le))"


STACK_DASHBOARD = {
    "Up": f"sum(up{{{_KUBE_PROXY}}})",
    "Rules Sync Rate": f"sum({_rate('kubeproxy_sync_proxy_rules_duration_seconds_count')})",
    "Rules Sync Latency": (
        f"histogram_quantile(0.99,{_rate('kubeproxy_sync_proxy_rules_duration_seconds_bucket')})"
    ),
    "Network Programming Rate": f"sum({_rate('kubeproxy_network_programming_duration_seconds_count')})",
    "Network Programming Latency": _p99("kubeproxy_network_programming_duration_seconds", "instance"),
    "Kube API Request Rate 2xx": "sum(" + _rate("rest_client_requests_total", 'code=~"2.."') + ")",
    "Get Request Latency": _p99("rest_client_request_duration_seconds", "verb", 'verb="GET"'),
    "Memory": f"process_resident_memory_bytes{{{_ONE}}}",
    "CPU usage": _rate("process_cpu_seconds_total"),
    "Goroutines": f"go_goroutines{{{_ONE}}}",
}
#: These panels are empty without such events, as with kube-proxy. The agent sends no POST request there.
STACK_DASHBOARD_EMPTY = {
    "Kube API Request Rate 3xx": "sum(" + _rate("rest_client_requests_total", 'code=~"3.."') + ")",
    "Kube API Request Rate 4xx": "sum(" + _rate("rest_client_requests_total", 'code=~"4.."') + ")",
    "Kube API Request Rate 5xx": "sum(" + _rate("rest_client_requests_total", 'code=~"5.."') + ")",
}
#: These requests are rare: the value is NaN without any.
STACK_DASHBOARD_SELDOM = {
    "Post Request Latency": _p99("rest_client_request_duration_seconds", "verb", 'verb="POST"'),
}
#: Its alerts that a kube-proxy can fire.
STACK_ALERTS = {
    "KubeProxyDown": 'absent(up{job="kube-proxy"})',
    "TargetDown": (
        "100 * (count(up == 0) by (cluster, job, namespace, service)"
        " / count(up) by (cluster, job, namespace, service)) > 10"
    ),
    "KubeClientErrors": (
        'sum(rate(rest_client_requests_total{job="kube-proxy", code=~"5.."}[5m])) by (cluster, instance, job)'
        ' / sum(rate(rest_client_requests_total{job="kube-proxy"}[5m])) by (cluster, instance, job) > 0.01'
    ),
    # This counts Kubernetes versions in the cluster; ours must not count as one.
    "KubeVersionMismatch": (
        'count by (cluster) (count by (git_version, cluster) (kubernetes_build_info{job!~"kube-dns|coredns"}))'
        " > 1"
    ),
}
