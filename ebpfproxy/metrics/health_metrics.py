"""Metrics of the proxy's health: the state of ``/healthz``, and the attached programs, at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ebpfproxy.datapath.programs.attach import Attachment


class HealthCollector(Collector):
    """``ask`` is ProxyHealth.healthz; ``hooks`` asks the kernel for every hook of the socket programs."""

    def __init__(
        self,
        ask: Callable[[], tuple[bool, Mapping[str, object]]],
        hooks: Callable[[], Iterable[Attachment]],
    ) -> None:
        self._ask = ask
        self._hooks = hooks

    def collect(self) -> Iterator[Metric]:
        _, said = self._ask()
        yield GaugeMetricFamily(
            "ebpfproxy_healthy",
            "1 while no change has waited too long, as in /livez",
            value=bool(said["healthy"]),
        )
        yield GaugeMetricFamily(
            "ebpfproxy_node_eligible",
            "1 while load balancers may use this node, as in /healthz",
            value=bool(said["nodeEligible"]),
        )
        states = [each.alive for each in self._hooks()]
        hooks = GaugeMetricFamily(
            "ebpfproxy_socket_hooks",
            "Hooks of the cgroup, by whether our program is attached",
            labels=["state"],
        )
        hooks.add_metric(["attached"], states.count(True))
        hooks.add_metric(["missing"], states.count(False))
        yield hooks
