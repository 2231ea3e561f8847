"""The files of the dashboard and of the Prometheus operator's objects."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.monitoring.files import (
    FOLDER,
    NODES,
    SERVICE,
    dashboard,
    dashboard_expressions,
    needs_promtool,
    panels,
    promtool,
)

of_each = pytest.mark.parametrize("name", [NODES, SERVICE])


@of_each
def test_panels_have_unique_ids_and_do_not_overlap(name: str) -> None:
    found = dashboard(name)["panels"]
    assert len({panel["id"] for panel in found}) == len(found)
    taken: set[tuple[int, int]] = set()
    for panel in found:
        at = panel["gridPos"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells


@of_each
def test_every_panel_has_a_title_a_description_and_the_data_source_variable(name: str) -> None:
    for panel in panels(name):
        assert panel["title"]
        assert panel["description"].rstrip(".`"), panel["title"]
        for target in panel["targets"]:
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    titles = [panel["title"] for panel in panels(name)]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize(("name", "more"), [(NODES, []), (SERVICE, ["namespace", "service"])])
def test_every_query_uses_the_variables_of_cluster_and_agent(name: str, more: list[str]) -> None:
    for panel in panels(name):
        for target in panel["targets"]:
            metrics = re.findall(
                r"(?<![\w:])((?:eb|kube)proxy_\w+|process_\w+|go_\w+|rest_\w+)", target["expr"]
            )
            selected = target["expr"].count('cluster=~"$cluster", instance=~"$instance"')
            assert selected >= 1 or metrics == [] or panel["title"] == "Alerts", panel["title"]
            # This one has no labels of a Service: which backends those are says ebpfproxy_service_backend_info.
            of_any = target["expr"].count("ebpfproxy_backend_connections_total{") if more else 0
            assert selected > of_any or not more, panel["title"]
            for variable in more:
                assert target["expr"].count(f'{variable}=~"${variable}"') == selected - of_any, panel["title"]
    variables = [each["name"] for each in dashboard(name)["templating"]["list"]]
    assert variables == ["datasource", "cluster", "instance", *more]


def test_every_alert_has_its_metric_on_the_dashboard() -> None:
    text = "\n".join(dashboard_expressions().values())
    rules = (FOLDER / "rules.yaml").read_text()
    ours = {name.removesuffix("_bucket") for name in re.findall(r"\bebpfproxy_\w+", rules)}
    # This counts failures over capacity; the dashboard has the current number of them.
    ours -= {"ebpfproxy_capacity_problems_total"}
    assert {name for name in ours if name not in text} == set()


@needs_promtool
def test_promtool_parses_every_expression(tmp_path: Path) -> None:
    expressions = dashboard_expressions().values()
    rules = [{"record": f"dashboard:{i}", "expr": e} for i, e in enumerate(expressions)]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", "--lint=none", str(path))


def test_pod_monitor_selects_the_agents_as_job_kube_proxy() -> None:
    monitor = yaml.safe_load((FOLDER / "podmonitor.yaml").read_text())
    assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == "metrics"
    assert {"targetLabel": "job", "replacement": "kube-proxy"} in endpoint["relabelings"]
    assert endpoint["honorLabels"] is True, "otherwise the agent's namespace replaces that of Services"
    selector = monitor["spec"]["selector"]["matchLabels"]
    objects = [
        each
        for path in FOLDER.parent.rglob("*daemonset.yaml")
        if "templates" not in path.parts
        for each in yaml.safe_load_all(path.read_text())
    ]
    sets = [each for each in objects if each["kind"] == "DaemonSet"]
    assert sets
    for each in sets:
        assert selector.items() <= each["spec"]["template"]["metadata"]["labels"].items()


def test_monitor_of_kube_prometheus_stack_is_disabled_where_ours_is_enabled() -> None:
    values = yaml.safe_load((FOLDER / "kube-prometheus-stack-values.yaml").read_text())["kubeProxy"]
    assert values["enabled"] is True, "this enables its rules and its dashboard"
    assert values["serviceMonitor"] == values["service"] == {"enabled": False}
