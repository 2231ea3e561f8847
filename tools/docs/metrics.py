"""Tables of docs/metrics.md: the metrics of the agent's registry, and the alerts of deploy/monitoring."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import yaml
from prometheus_client.metrics import MetricWrapperBase

from ebpfproxy.config.datapath import BPFFS, Capacity
from ebpfproxy.datapath.kernel.maps import open_or_create
from ebpfproxy.datapath.kernel.roots import ensure_bpffs
from ebpfproxy.health.proxy import ProxyHealth
from ebpfproxy.metrics.agent_metrics import AgentMetrics
from ebpfproxy.metrics.health_metrics import HealthCollector
from ebpfproxy.metrics.map_metrics import MapCollector
from ebpfproxy.metrics.measure_metrics import MeasureCollector
from ebpfproxy.metrics.source_metrics import SourceCollector
from tools.docs.tables import table

RULES = Path(__file__).parents[2] / "deploy" / "monitoring" / "rules.yaml"
_SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}


class Family(NamedTuple):
    name: str
    kind: str
    labels: tuple[str, ...]
    help: str

    @property
    def series(self) -> tuple[str, ...]:
        """The names that queries use."""
        return tuple(self.name + suffix for suffix in _SUFFIXES.get(self.kind, ("",)))


@functools.cache
def families() -> tuple[Family, ...]:
    """All metrics of /metrics, sorted. The maps of one collector are real and temporary."""
    metrics = AgentMetrics()
    health = ProxyHealth(timeout=60.0)
    metrics.registry.register(SourceCollector(list, dict, ""))
    metrics.registry.register(HealthCollector(health.healthz, list))
    ensure_bpffs(BPFFS)
    pins = BPFFS / f"docs-{os.getpid()}"
    pins.mkdir()
    try:
        maps = open_or_create(pins, Capacity(services=64, backends=512))
        metrics.registry.register(MapCollector(maps, 0, backends=True))
        metrics.registry.register(MeasureCollector(maps, 0, backends=True))
        found: dict[str, Family] = {}
        for collector in list(metrics.registry._collector_to_names):
            if isinstance(collector, MetricWrapperBase):
                names = tuple(str(name) for name in collector._labelnames)
                made = Family(collector._name, collector._type or "", names, collector._documentation)
                found[made.name] = made
                continue
            for family in collector.collect():
                names = tuple(getattr(family, "_labelnames", ()))
                found[family.name] = Family(family.name, family.type, names, family.documentation)
    finally:
        shutil.rmtree(pins)
    return tuple(found[name] for name in sorted(found))


def series() -> set[str]:
    return {name for family in families() for name in family.series}


def _rows(*prefixes: str) -> str:
    return table(
        ("metric", "type", "labels", "description"),
        (
            (
                f"`{family.series[0].removesuffix('_bucket')}`",
                family.kind,
                ", ".join(f"`{label}`" for label in family.labels),
                family.help,
            )
            for family in families()
            if family.name.startswith(prefixes)
        ),
    )


def kube_proxys() -> str:
    return _rows("kubeproxy_", "rest_client_")


def ours() -> str:
    return _rows("ebpfproxy_")


def process() -> str:
    names = [f"`{name}`" for family in families() for name in family.series]
    return ", ".join(n for n in names if not n.startswith(("`kubeproxy_", "`rest_", "`ebpfproxy_"))) + ".\n"


def alerts() -> str:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return table(
        ("alert", "severity", "after", "what"),
        (
            (
                f"`{rule['alert']}`",
                rule["labels"]["severity"],
                str(rule.get("for", "at once")),
                _summary(rule),
            )
            for group in groups
            for rule in group["rules"]
            if "alert" in rule
        ),
    )


def _summary(rule: dict[str, dict[str, str]]) -> str:
    text = rule["annotations"]["summary"]
    for template, words in (("instance", "a node"), ("map", "NAME"), ("resource", "a resource")):
        text = text.replace(f"{{{{ $labels.{template} }}}}", words)
    return text
