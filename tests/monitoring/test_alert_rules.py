"""Our rules: equal in both forms, valid for promtool, and alerts fire in exactly the expected cases."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
import yaml

from ebpfproxy.cli import main
from ebpfproxy.config.datapath import Capacity
from ebpfproxy.datapath.abi import uapi
from ebpfproxy.datapath.abi.schema import map_specs
from tests.monitoring.files import FOLDER, RULES, alerts, needs_promtool, promtool

NODE = {"job": "kube-proxy", "instance": "10.0.0.1:10249"}


def series(name: str, **labels: str) -> str:
    pairs = ", ".join(f'{key}="{value}"' for key, value in (NODE | labels).items())
    return f"{name}{{{pairs}}}"


UP = series("up")
BUILD = series("ebpfproxy_build_info", version="1.0", kernel="6.1")


class Case(msgspec.Struct, frozen=True):
    """Series in promtool's notation with a value per minute, and the alert that fires at minute ``at``, if any."""

    alert: str
    what: str
    series: dict[str, str]
    at: int
    labels: dict[str, str] | None = None
    value: str = ""


def fires(alert: str, found: dict[str, str], at: int, value: str = "", **labels: str) -> Case:
    return Case(alert, "fires", found, at, NODE | labels, value)


def silent(alert: str, what: str, found: dict[str, str], at: int) -> Case:
    return Case(alert, what, found, at)


def histogram(name: str, upper: str) -> dict[str, str]:
    """Returns series of ten observations a minute, all above the bound before ``upper``."""
    bounds = ("0.01", "0.5", "1", "2.5", "+Inf")
    at = bounds.index(upper)
    return {series(f"{name}_bucket", le=b): "0+10x40" if i >= at else "0x40" for i, b in enumerate(bounds)}


def map_fill(name: str, entries: int) -> dict[str, str]:
    return {
        series("ebpfproxy_map_entries", map=name): f"{entries}x20",
        series("ebpfproxy_map_capacity", map=name): "100x20",
    }


LATE = "ebpfproxy_event_to_map_seconds"
EVICTED = series("ebpfproxy_conntrack_evicted_total")
WARNED = series("ebpfproxy_warnings_total", resource="services")
UNSEEN = series("ebpfproxy_stale_sockets_not_found_total")
ROOM = series("ebpfproxy_service_ports_without_room")
PROBLEMS = series("ebpfproxy_capacity_problems_total")
WATCH = series("ebpfproxy_watch_connected", resource="nodes")

CASES = [
    Case("EbpfproxyAbsent", "fires", {UP: "0x40"}, 20, {}),
    silent("EbpfproxyAbsent", "one agent answers", {BUILD: "1x40"}, 20),
    silent("EbpfproxyAbsent", "a gap", {BUILD: "1 _x12 1x20"}, 12),
    fires("EbpfproxyAgentDown", {UP: "1 0x20", BUILD: "1 stale _x20"}, 10),
    silent("EbpfproxyAgentDown", "it answers", {UP: "1x20", BUILD: "1x20"}, 10),
    silent("EbpfproxyAgentDown", "a kube-proxy that does not answer", {UP: "0x20"}, 10),
    silent("EbpfproxyAgentDown", "a restart", {UP: "1x5 0 0 1x20", BUILD: "1x5 stale _ 1x20"}, 10),
    fires("EbpfproxyNotHealthy", {series("ebpfproxy_healthy"): "0x20"}, 6),
    silent("EbpfproxyNotHealthy", "it is", {series("ebpfproxy_healthy"): "1x20"}, 6),
    silent("EbpfproxyNotHealthy", "for a moment", {series("ebpfproxy_healthy"): "0x3 1x20"}, 6),
    fires(
        "EbpfproxySocketHooksMissing",
        {series("ebpfproxy_socket_hooks", state="missing"): "2x20"},
        4,
        "2",
        state="missing",
    ),
    silent(
        "EbpfproxySocketHooksMissing",
        "all are attached",
        {
            series("ebpfproxy_socket_hooks", state="missing"): "0x20",
            series("ebpfproxy_socket_hooks", state="attached"): "11x20",
        },
        4,
    ),
    fires("EbpfproxyProgrammingLate", histogram(LATE, "2.5"), 30, "2.485s"),
    silent("EbpfproxyProgrammingLate", "half a second", histogram(LATE, "0.5"), 30),
    silent("EbpfproxyProgrammingLate", "nothing changes", {series(f"{LATE}_bucket", le="+Inf"): "5x40"}, 30),
    fires("EbpfproxyMapNearlyFull", map_fill("backends", 95), 10, "95%", map="backends"),
    silent("EbpfproxyMapNearlyFull", "there is room", map_fill("backends", 90), 10),
    silent("EbpfproxyMapNearlyFull", "one that may be full", map_fill("port_clashes", 100), 10),
    fires("EbpfproxyServicePortsDoNotFit", {ROOM: "3x20"}, 5, "3"),
    fires("EbpfproxyServicePortsDoNotFit", {ROOM: "0x60", PROBLEMS: "0x10 1x40"}, 20, "1"),
    silent("EbpfproxyServicePortsDoNotFit", "all fit", {ROOM: "0x60", PROBLEMS: "2x60"}, 40),
    silent("EbpfproxyServicePortsDoNotFit", "all fit again", {ROOM: "3x5 0x60"}, 10),
    fires("EbpfproxyConntrackEvictions", {EVICTED: "0+10x40"}, 20, "100"),
    silent("EbpfproxyConntrackEvictions", "long ago", {EVICTED: "0 500x40"}, 20),
    fires(
        "EbpfproxyDevicesFailed",
        {series("ebpfproxy_devices", state="failed"): "1x20"},
        6,
        "1",
        state="failed",
    ),
    silent(
        "EbpfproxyDevicesFailed",
        "all are attached",
        {
            series("ebpfproxy_devices", state="failed"): "0x20",
            series("ebpfproxy_devices", state="attached"): "9x20",
        },
        6,
    ),
    fires(
        "EbpfproxyHealthCheckPortsNotBound",
        {series("ebpfproxy_health_check_ports", state="failed"): "4x20"},
        6,
        "4",
        state="failed",
    ),
    silent(
        "EbpfproxyHealthCheckPortsNotBound",
        "all are bound",
        {
            series("ebpfproxy_health_check_ports", state="failed"): "0x20",
            series("ebpfproxy_health_check_ports", state="bound"): "4x20",
        },
        6,
    ),
    fires("EbpfproxyWatchFailing", {WATCH: "0x20"}, 6, resource="nodes"),
    silent("EbpfproxyWatchFailing", "it works", {WATCH: "1x20"}, 6),
    silent("EbpfproxyWatchFailing", "a restart of the API server", {WATCH: "1x5 0x2 1x20"}, 9),
    fires("EbpfproxyWarningsRising", {WARNED: "0x10 3x60"}, 40, "3", resource="services"),
    silent("EbpfproxyWarningsRising", "known for long", {WARNED: "3x100"}, 80),
    fires("EbpfproxyStaleSocketsNotFound", {UNSEEN: "0x20 4x40"}, 30, "4"),
    silent("EbpfproxyStaleSocketsNotFound", "long ago", {UNSEEN: "0 4x60"}, 30),
]


def rendered(text: str, case: Case) -> str:
    for name, value in (case.labels or {}).items():
        text = text.replace(f"{{{{ $labels.{name} }}}}", value)
    return re.sub(r"\{\{ \$value[^}]*\}\}", case.value, text)


def as_promtool(case: Case) -> dict[str, Any]:
    rule, expected = alerts()[case.alert], []
    if case.labels is not None:
        expected.append(
            {
                "exp_labels": case.labels | rule["labels"],
                "exp_annotations": {k: rendered(v, case) for k, v in rule["annotations"].items()},
            }
        )
    return {
        "name": f"{case.alert}: {case.what}",
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
        "alert_rule_test": [
            {"eval_time": f"{case.at}m", "alertname": case.alert, "exp_alerts": expected},
        ],
    }


def test_prometheus_rule_object_has_the_rules_of_the_plain_file() -> None:
    plain = yaml.safe_load(RULES.read_text())
    wrapped = yaml.safe_load((FOLDER / "prometheus-rules.yaml").read_text())
    assert (wrapped["apiVersion"], wrapped["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert wrapped["spec"] == plain


@needs_promtool
def test_promtool_accepts_the_rules() -> None:
    assert "SUCCESS" in promtool("check", "rules", "--lint=all", "--lint-fatal", str(RULES))


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    assert {case.alert for case in CASES if case.labels is not None} == alerts().keys()
    assert {case.alert for case in CASES if case.labels is None} == alerts().keys()


@needs_promtool
def test_every_alert_fires_in_exactly_the_expected_cases(tmp_path: Path) -> None:
    """All cases are in one run: promtool names the case that fails."""
    tests = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [*map(as_promtool, CASES)]}
    path = tmp_path / "tests.yaml"
    path.write_text(yaml.safe_dump(tests))
    assert "SUCCESS" in promtool("test", "rules", str(path))


@needs_promtool
def test_case_with_a_wrong_expectation_fails(tmp_path: Path) -> None:
    wrong = msgspec.structs.replace(CASES[1], labels={})
    path = tmp_path / "tests.yaml"
    path.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "tests": [as_promtool(wrong)]}))
    with pytest.raises(AssertionError, match="EbpfproxyAbsent"):
        promtool("test", "rules", str(path))


@pytest.mark.parametrize("name", alerts())
def test_every_alert_has_a_severity_and_names_a_command(name: str) -> None:
    rule = alerts()[name]
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert set(rule["annotations"]) == {"summary", "description"}
    assert rule["annotations"]["summary"].endswith(".")
    commands = re.findall(r"`ebpfproxy ([a-z]+)(?: ([a-z]+))?", rule["annotations"]["description"])
    assert commands, "no ebpfproxy command"
    for command, subcommand in commands:
        found = main.get_command(click.Context(main), command)
        assert found is not None, command
        if subcommand:
            assert subcommand in getattr(found, "commands", {}), f"{command} {subcommand}"


def test_alert_on_full_maps_excludes_lru_maps_only() -> None:
    (left_out,) = re.findall(r'map!~"([^"]*)"', alerts()["EbpfproxyMapNearlyFull"]["expr"])
    kinds = {spec.name: spec.kind for spec in map_specs(Capacity())}
    assert {kinds[name] for name in left_out.split("|")} == {uapi.MAP_LRU_HASH}
