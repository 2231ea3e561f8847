"""The options of an agent."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ebpfproxy.config.datapath import MAGLEV_DEFAULT_SIZE, Capacity, Feature, StaleTcp
from ebpfproxy.datapath.flows import conntrack_table
from ebpfproxy.node.local import LocalPods
from ebpfproxy.services.model import Algorithm, Prefix


class AgentOptions(msgspec.Struct, frozen=True, kw_only=True):
    """All that ``ebpfproxy run`` takes from configuration and flags. Times are in seconds."""

    node_name: str
    bpf_root: Path
    cgroup_root: Path
    manifests: Path | None = None
    kubeconfig: Path | None = None
    master: str | None = None
    #: The rate limit of requests to the API server: how many a second, and how many at once.
    api_qps: float = 5.0
    api_burst: int = 10
    healthz_bind_address: str = "0.0.0.0:10256"
    metrics_bind_address: str = "127.0.0.1:10249"
    #: An address that cannot be bound ends the agent.
    bind_hard_fail: bool = False
    node_ports_on_loopback: bool = True
    guard_node_ports: bool = False
    pod_sockets: bool = True
    #: ``config.node_port_addresses.parse_node_port_addresses`` has checked them.
    node_port_addresses: tuple[str, ...] = ()
    external_ips: bool = True
    #: Patterns of uplinks' names; if empty, addresses, routes and kinds of devices decide.
    devices: tuple[str, ...] = ()
    local_pods: LocalPods = LocalPods()
    cluster_cidrs: tuple[Prefix, ...] = ()
    service_cidrs: tuple[Prefix, ...] = ()
    masquerade_all: bool = False
    bypass_netfilter: bool = False
    #: A Service may name another.
    algorithm: Algorithm = Algorithm.RANDOM
    maglev_size: int = MAGLEV_DEFAULT_SIZE
    masquerade_ports: tuple[int, int]
    #: They overlap ``ip_local_port_range``, as it was at the start.
    masquerade_ports_shared: bool = False
    timeouts: conntrack_table.Timeouts = conntrack_table.Timeouts()
    sweep_seconds: float = 10.0
    #: The time between two sweeps for records of closed sockets.
    socket_sweep_seconds: float = 60.0
    stale_tcp: StaleTcp = StaleTcp.GONE
    #: For so long an endpoint that was removed may come back.
    stale_tcp_seconds: float = 5.0
    capacity: Capacity = Capacity()
    without: frozenset[Feature] = frozenset()
