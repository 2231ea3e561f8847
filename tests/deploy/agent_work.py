"""What an agent in a container does on a node: sockets, packets, sockets of pods that start later, and commands."""

from __future__ import annotations

import json
from pathlib import Path

from tests.deploy.kubelet import until
from tests.deploy.runtime import Container
from tests.e2e.outside_client import HeldConnection
from tests.e2e.two_node_cluster import NODE_PORT, SERVICE_IPS, TwoNodeCluster
from tests.lab import clients
from tests.lab.holders import Holder
from tests.lab.waiting import AT_ONCE

_IP = SERVICE_IPS["v4"]


def check(cluster: TwoNodeCluster, agent: Container, log: Path) -> None:
    """Leaves the Service with w2 as its only endpoint."""
    outside = cluster.lab.outside
    cluster.write_web(cluster.w1, cluster.w2)
    assert set(cluster.client.call(clients.spread_tcp, _IP, 80, clients.ENOUGH)) == {"w1", "w2"}
    assert set(cluster.client.call(clients.spread_udp, _IP, 53, clients.ENOUGH)) == {"w1", "w2"}
    assert set(outside.call(clients.spread_tcp, cluster.a.address, NODE_PORT, clients.ENOUGH)) == {"w1", "w2"}

    later = cluster.a.pod(f"later{len(cluster.a.pods)}")
    holders = [Holder(pod, [("udp", "udp", _IP, 53, 20)]) for pod in (cluster.client, later)]
    for holder in holders:
        holder.wait()
    cluster.write_web(cluster.w2)
    stale = sum(n for holder in holders for name, n in holder.connected.items() if cluster.w1.address in name)
    assert stale
    until(lambda: f"UDP={stale}" in log.read_text(), AT_ONCE)
    assert f"UDP={stale}" in log.read_text()

    # A slow machine lists the flows of closed connections when they are gone.
    held = HeldConnection(outside, cluster.a.address, NODE_PORT)
    flows = json.loads(agent.execute("ebpfproxy", "conntrack", "list", "-o", "json"))
    held.process.kill()
    held.process.wait()
    assert {flow["service"] for flow in flows} == {"shop/web"}
    agent.execute("ebpfproxy", "conntrack", "flush", "--all")
    status = json.loads(agent.execute("ebpfproxy", "status", "-o", "json"))
    assert status["agent_running"]
    agent.execute("ebpfproxy", "service", "get", "shop/web")
    explained = json.loads(agent.execute("ebpfproxy", "explain", "shop/client", "web:http", "-o", "json"))
    assert explained["without_agent"] == ""
    assert {each["client"] for each in explained["explanations"]} == {"shop/client"}
    agent.execute("ebpfproxy", "backend", "drain", cluster.w2.address)
    agent.execute("ebpfproxy", "backend", "drain", cluster.w2.address, "--undo")
    assert "failed to close stale sockets" not in log.read_text()
    assert "error" not in log.read_text().replace("error='Permission denied'", "")
