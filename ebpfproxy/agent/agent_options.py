"""The options of an agent, which ``agent.from_config`` derives from a configuration."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ebpfproxy.config.datapath import Capacity, ExternalTraffic, Feature, StaleTcp, Xdp
from ebpfproxy.datapath.flows.conntrack_table import Timeouts
from ebpfproxy.node.local import LocalPods
from ebpfproxy.services.model import Algorithm, Prefix


class AgentOptions(msgspec.Struct, frozen=True, kw_only=True):
    """All that ``ebpfproxy run`` takes from configuration and flags. Times are in seconds.

    No field has a default here: ``config.own`` and ``config.kube_proxy`` declare them.
    """

    node_name: str
    bpf_root: Path
    cgroup_root: Path
    manifests: Path | None
    kubeconfig: Path | None
    master: str | None
    #: The rate limit of requests to the API server: how many a second, and how many at once.
    api_qps: float
    api_burst: int
    healthz_bind_address: str
    metrics_bind_address: str
    #: A change that waits so long to be programmed makes the agent unhealthy.
    health_timeout: float
    #: An address that cannot be bound ends the agent.
    bind_hard_fail: bool
    node_ports_on_loopback: bool
    guard_node_ports: bool
    pod_sockets: bool
    #: ``config.node_port_addresses.parse_node_port_addresses`` has checked them.
    node_port_addresses: tuple[str, ...]
    external_ips: bool
    #: Patterns of uplinks' names; if empty, addresses, routes and kinds of devices decide.
    devices: tuple[str, ...]
    local_pods: LocalPods
    cluster_cidrs: tuple[Prefix, ...]
    service_cidrs: tuple[Prefix, ...]
    masquerade_all: bool
    bypass_netfilter: bool
    xdp: Xdp
    external_traffic_mode: ExternalTraffic
    #: A Service may name another.
    algorithm: Algorithm
    maglev_size: int
    masquerade_ports: tuple[int, int]
    #: True if these overlap with ``ip_local_port_range``, as it was at the start.
    masquerade_ports_shared: bool
    timeouts: Timeouts
    #: The time between two sweeps for records of closed sockets.
    socket_sweep_seconds: float
    #: The time between two comparisons of maps and programs with what the agent has made of them; 0: none.
    drift_check_seconds: float
    stale_tcp: StaleTcp
    #: How long an endpoint that was removed may come back.
    stale_tcp_seconds: float
    capacity: Capacity
    without: frozenset[Feature]
    #: The attached programs always report decisions where a command wants them.
    trace_decisions: bool
    measure_connections: bool
    measure_traffic: bool
    #: How many service ports, and if backends, have series of their own in metrics of what is measured.
    metrics_services: int
    metrics_backends: bool
    #: Where the log and metrics are sent, too; empty for nowhere.
    otlp_endpoint: str
    otlp_interval_seconds: float
