"""A DNS cache of the node with the cluster IP of the DNS Service as a local address (NodeLocal DNSCache)."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from tests.e2e.outside_client import OutsideClientCluster
from tests.e2e.two_node_cluster import SERVICE_IPS
from tests.lab import clients, servers
from tests.lab.spaces import Space
from tests.lab.waiting import until

pytestmark = pytest.mark.root

IP, IP6 = SERVICE_IPS["v4"], SERVICE_IPS["v6"]


def own(cluster: OutsideClientCluster) -> dict[str, bool]:
    rows: list[dict[str, Any]] = json.loads(cluster.a.cli("service", "get", "shop/web", "-o", "json"))
    return {row["frontend"]: row["own"] for row in rows if row["type"] == "ClusterIP"}


def test_dns_queries_go_to_the_node_local_cache_while_the_node_has_its_address(
    cluster: OutsideClientCluster,
) -> None:
    assert not any(own(cluster).values())
    cluster.a.run(["ip", "link", "add", "nodelocaldns", "type", "bridge"])
    for address in (f"{IP}/32", f"{IP6}/128"):
        cluster.a.run(["ip", "addr", "add", address, "dev", "nodelocaldns", "nodad"])
    cluster.a.run(["ip", "link", "set", "nodelocaldns", "up"])
    servers.start(cluster.a, "cache", 53, address=f"::ffff:{IP}")
    servers.start(cluster.a, "cache6", 53, address=IP6)
    until(lambda: own(cluster)[f"{IP}:53/UDP"], "the agent has not found the local address")
    assert {frontend for frontend, is_own in own(cluster).items() if is_own} == {
        f"{IP}:53/UDP",
        f"[{IP6}]:53/UDP",
    }
    assert "not translated: the node's own address" in cluster.a.cli("service", "get", "shop/web")

    for client in (cluster.client, cluster.a):
        assert client.call(clients.spread_udp, IP, 53, 10) == {"cache": 10}
        assert client.call(clients.ask_udp_connected, IP, 53)["getpeername"] == (IP, 53)
        assert client.call(clients.spread_udp, IP6, 53, clients.ENOUGH) == {"cache6": clients.ENOUGH}
        assert set(client.call(clients.spread_tcp, IP, 80, clients.ENOUGH)) == {"w1", "w2"}, (
            "other ports are not served by the Service"
        )
        assert client.call(clients.connect_error, IP, 81) == "ECONNREFUSED"
    assert _without_hook(cluster.client, f"UDP:{IP}:53")["name"] == "cache"
    assert _without_hook(cluster.a, f"UDP:{IP}:53")["name"] == "cache"

    cluster.lab.agents[-1].stop()
    cluster.agent().start()
    assert own(cluster)[f"{IP}:53/UDP"], "a restarted agent does not know the local address"
    assert cluster.client.call(clients.spread_udp, IP, 53, 10) == {"cache": 10}

    cluster.a.run(["ip", "link", "del", "nodelocaldns"])
    until(lambda: not any(own(cluster).values()), "the removed address still counts as local")
    assert set(cluster.client.call(clients.spread_udp, IP, 53, clients.ENOUGH)) == {"w1", "w2"}
    assert _without_hook(cluster.client, f"UDP:{IP}:53")["name"] in ("w1", "w2")


def _without_hook(space: Space, what: str) -> dict[str, Any]:
    """Sends by a process outside the agent's cgroup, which passes no socket hook."""
    pipe = subprocess.PIPE
    process = space.popen(["socat", "-T1", "-t1", "-", what], join_cgroup=False, stdin=pipe, stdout=pipe)
    found: dict[str, Any] = json.loads(process.communicate(b"?")[0])
    return found
