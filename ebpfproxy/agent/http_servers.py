"""kube-proxy's HTTP servers: one for load balancers and the kubelet, one for metrics and debugging."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ebpfproxy.agent.agent_options import AgentOptions
from ebpfproxy.health.http import Answer, json_answer, text_answer
from ebpfproxy.health.listeners import Listen
from ebpfproxy.health.proxy import ProxyHealth
from ebpfproxy.health.server import HttpServer
from ebpfproxy.metrics.agent_metrics import AgentMetrics


def servers(
    options: AgentOptions,
    health: ProxyHealth,
    metrics: AgentMetrics,
    configz: Mapping[str, object],
    listen: Listen,
) -> list[HttpServer]:
    """Creates both servers; the caller starts them."""

    def proxy_page(path: str, ask: Callable[[], tuple[bool, dict[str, object]]]) -> Callable[[], Answer]:
        def page() -> Answer:
            good, body = ask()
            code = 200 if good else 503
            metrics.asked(path, code)
            return json_answer(body, code)

        return page

    return [
        HttpServer(
            "healthz",
            options.healthz_bind_address,
            {
                "/healthz": proxy_page("healthz", health.healthz),
                "/livez": proxy_page("livez", health.livez),
            },
            hard_fail=options.bind_hard_fail,
            listen=listen,
        ),
        HttpServer(
            "metrics",
            options.metrics_bind_address,
            {
                "/metrics": lambda: Answer(200, "text/plain; version=0.0.4; charset=utf-8", metrics.render()),
                "/healthz": lambda: text_answer("ok"),
                "/proxyMode": lambda: text_answer("ebpf"),
                "/configz": lambda: json_answer(dict(configz)),
            },
            hard_fail=options.bind_hard_fail,
            listen=listen,
        ),
    ]
