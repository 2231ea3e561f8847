"""Migration from kube-proxy in IPVS mode, on a kernel with IPVS (``make test-kernels``)."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ebpfproxy.operator.migrate.node import conntrack_hold, ipsets, ipvs, leftovers
from tests.lab import Lab, LabNode, Outside, Pod, clients, manifests, servers
from tests.operator.migrate import ipvs_rules
from tests.operator.migrate.commands import Migration
from tests.operator.migrate.ipvs_rules import VirtualService
from tests.operator.migrate.kube_proxy_cluster import broken
from tests.operator.migrate.traffic import LongConnection, RequestLoad, no_request_fails

TOOLS = ("ipvsadm", "ipset", "iptables-legacy", "iptables-nft", "nft")


def _missing() -> str:
    if not Path("/proc/net/ip_vs").exists():
        return "this kernel has no IPVS (or has not loaded ip_vs): make test-kernels"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"{', '.join(missing)} not installed: make test-kernels" if missing else ""


pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(bool(_missing()), reason=_missing()),
    pytest.mark.timeout(600),
]

WEB = {False: "10.96.0.10", True: "fd00:10:96::10"}
STICKY = {False: "10.96.0.20", True: "fd00:10:96::20"}
EMPTY = {False: "10.96.0.30", True: "fd00:10:96::30"}
EXTERNAL, BALANCER = "192.0.2.80", "203.0.113.10"
#: This port is on the node's address, which is not assigned to kube-ipvs0.
OWN_PORT = 8181
NODE_PORT, UDP_NODE_PORT = 30080, 30053
PODS = {False: "10.244.0.0/16", True: "fd00:10:244::/48"}
SLICE_PORTS = [
    {"name": "http", "port": 8080, "protocol": "TCP"},
    {"name": "udp", "port": 8053, "protocol": "UDP"},
]

#: Services, sets and chains of other programs: a virtual service on a foreign device, one on the node's address with
#: a port of the NodePort range, and one by firewall mark; a set that a rule matches.
FOREIGN_SERVERS = """-A -t 198.51.100.7:443 -s rr
-a -t 198.51.100.7:443 -r 10.9.9.9:443 -m -w 1
-A -t 172.18.0.1:31999 -s wrr
-a -t 172.18.0.1:31999 -r 10.9.9.9:80 -g -w 3
-A -f 7 -s rr
"""
FOREIGN_SETS = """create mine hash:ip,port family inet hashsize 1024 maxelem 65536
add mine 10.9.9.9,tcp:443
create KUBE-MINE hash:ip family inet hashsize 1024 maxelem 65536
add KUBE-MINE 10.9.9.8
"""
FOREIGN_RULES = """*nat
:MINE - [0:0]
-A POSTROUTING -j MINE
-A MINE -m set --match-set mine dst,dst -j MASQUERADE
COMMIT
*filter
:KUBE-FIREWALL - [0:0]
-A INPUT -j KUBE-FIREWALL
-A KUBE-FIREWALL -m set --match-set KUBE-MINE src -j DROP
COMMIT
"""


class IpvsCluster(Migration):
    """Node ``a`` has kube-proxy's rules; pod ``w1`` on it and ``w2`` on ``b`` are endpoints of dual-stack Services."""

    def __init__(self, lab: Lab, backend: str) -> None:
        self.backend = backend
        self.a: LabNode = lab.node("node-a")
        b = lab.node("node-b")
        self.client: Pod = self.a.pod("client")
        self.workers = (self.a.pod("w1"), b.pod("w2"))
        for pod in self.workers:
            servers.start(pod, pod.name, 8080, 8053)
        self.outside: Outside = lab.outside
        self.manifests: Path = lab.folder / "manifests"
        self.write("web", "sticky", "empty")

    def write(self, *names: str) -> None:
        ports = [
            {"name": "http", "port": 80, "protocol": "TCP"},
            {"name": "udp", "port": 53, "protocol": "UDP"},
        ]
        node_ports = [{**p, "nodePort": n} for p, n in zip(ports, (NODE_PORT, UDP_NODE_PORT), strict=True)]
        own = [{"name": "http", "port": OWN_PORT, "protocol": "TCP"}]
        web: dict[str, Any] = {
            "type": "LoadBalancer",
            "clusterIPs": list(WEB.values()),
            "externalIPs": [EXTERNAL],
            "ports": node_ports,
        }
        affinity: dict[str, Any] = {
            "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 10800}},
        }
        balanced = manifests.service("web", **web)
        balanced["status"] = {"loadBalancer": {"ingress": [{"ip": BALANCER, "ipMode": "VIP"}]}}
        services = {
            "web": balanced,
            "sticky": manifests.service(
                "sticky",
                clusterIPs=list(STICKY.values()),
                externalIPs=[self.a.address],
                ports=own,
                **affinity,
            ),
            "empty": manifests.service("empty", clusterIPs=list(EMPTY.values()), ports=ports),
        }
        documents = [services[name] for name in names]
        for name in ("web", "sticky"):
            for is_v6 in (False, True):
                endpoints = [
                    manifests.endpoint(p.address6 if is_v6 else p.address, p.node.name) for p in self.workers
                ]
                documents.append(manifests.slice_of(name, endpoints, ports=SLICE_PORTS))
        manifests.write(self.manifests / "cluster.yaml", *documents)

    def virtual_services(self) -> list[VirtualService]:
        found = []
        for is_v6 in (False, True):
            tcp, udp = (
                tuple((p.address6 if is_v6 else p.address, port) for p in self.workers)
                for port in (8080, 8053)
            )
            node = self.a.address6 if is_v6 else self.a.address
            found += [
                VirtualService("CLUSTER-IP", WEB[is_v6], 80, "tcp", tcp),
                VirtualService("CLUSTER-IP", WEB[is_v6], 53, "udp", udp),
                VirtualService("NODE-PORT-TCP", node, NODE_PORT, "tcp", tcp, bound=False),
                VirtualService("NODE-PORT-UDP", node, UDP_NODE_PORT, "udp", udp, bound=False),
                VirtualService("CLUSTER-IP", STICKY[is_v6], OWN_PORT, "tcp", tcp, persistent=True),
                VirtualService("CLUSTER-IP", EMPTY[is_v6], 80, "tcp", ()),
                VirtualService("CLUSTER-IP", EMPTY[is_v6], 53, "udp", ()),
            ]
            if not is_v6:
                for name, address in (("EXTERNAL-IP", EXTERNAL), ("LOAD-BALANCER", BALANCER)):
                    found.append(VirtualService(name, address, 80, "tcp", tcp))
                    found.append(VirtualService(name, address, 53, "udp", udp))
                found.append(
                    VirtualService("EXTERNAL-IP", node, OWN_PORT, "tcp", tcp, bound=False, persistent=True)
                )
        return found

    def kube_proxy(self) -> None:
        self.a.call(ipvs_rules.load, self.virtual_services(), PODS, self.backend)

    def targets(self) -> list[tuple[Any, str, str, int]]:
        found: list[tuple[Any, str, str, int]] = []
        for is_v6 in (False, True):
            node = self.a.address6 if is_v6 else self.a.address
            found += [
                (self.client, "tcp", WEB[is_v6], 80),
                (self.client, "udp", WEB[is_v6], 53),
                (self.client, "tcp", STICKY[is_v6], OWN_PORT),
                (self.a, "tcp", WEB[is_v6], 80),
                (self.outside, "tcp", node, NODE_PORT),
                (self.outside, "udp", node, UDP_NODE_PORT),
            ]
        return [*found, (self.outside, "tcp", self.a.address, OWN_PORT)]

    def loads(self) -> list[RequestLoad]:
        """The loads send fewer requests, because an emulator is slow.

        The host's connected datagram sockets are among them, so that netfilter does not forget them: IPVS goes on to
        send their packets to the endpoint, but what masqueraded them has gone with kube-proxy's rules.
        """
        targets = [
            (self.client, "tcp", WEB[False], 80),
            (self.client, "udp", WEB[True], 53),
            (self.a, "udp", WEB[False], 53),
            (self.a, "udp", WEB[True], 53),
            (self.outside, "tcp", self.a.address6, NODE_PORT),
            (self.outside, "udp", self.a.address, UDP_NODE_PORT),
        ]
        return [RequestLoad(*target, pause=0.1) for target in targets]


@pytest.fixture(params=["nft", "legacy"])
def cluster(request: pytest.FixtureRequest) -> Iterator[IpvsCluster]:
    with Lab() as lab:
        yield IpvsCluster(lab, request.param)


def _run(*command: str, stdin: str | None = None) -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def _load_foreign(backend: str) -> dict[str, list[str]]:
    _run("ip", "link", "add", "dummy9", "type", "dummy")
    _run("ip", "address", "add", "198.51.100.7/32", "dev", "dummy9")
    _run("ipvsadm", "--restore", stdin=FOREIGN_SERVERS)
    _run("ipset", "restore", stdin=FOREIGN_SETS)
    _run(f"iptables-{backend}-restore", "--noflush", stdin=FOREIGN_RULES)
    return _node_state(backend)


def _node_state(backend: str) -> dict[str, list[str]]:
    """Returns services, sets, addresses and rules of the node, without counters and without the conntrack hold."""
    found = {
        "servers": sorted(_run("ipvsadm", "--save", "--numeric").splitlines()),
        "sets": sorted(line for line in _run("ipset", "save").splitlines()),
        "devices": sorted(line.split()[1] for line in _run("ip", "-o", "address").splitlines()),
    }
    for family in ("iptables", "ip6tables"):
        saved = _run(f"{family}-{backend}-save").splitlines()
        # The first rule of a table creates its built-in chains, which cannot be removed.
        found[family] = [each.partition(" [")[0] for each in saved if each[:2] == "-A" or " - [" in each]
    return found


def _leftovers() -> tuple[leftovers.Leftovers, list[str], ipvs.Device | None]:
    return leftovers.find(), conntrack_hold.find(), ipvs.device()


def test_migration_and_rollback_keep_connections_of_ipvs(cluster: IpvsCluster) -> None:
    foreign = cluster.a.call(_load_foreign, cluster.backend)
    cluster.kube_proxy()
    cluster.a.run(["ipvsadm", "--set", "0", "5", "60"])
    connections = [LongConnection(*target) for target in cluster.targets()]
    assert broken(connections) == {}
    assert {each.server for each in connections} == {"w1", "w2"}

    agent = cluster.a.agent(manifests=cluster.manifests).start()
    time.sleep(1)
    assert broken(connections) == {}, "kube-proxy and the agent run side by side"
    # Requests before this may fail: see test_ipvs_translates_replies_to_a_recently_used_port.
    with no_request_fails(*cluster.loads(), least=10):
        planned = json.loads(cluster.migrate("plan", "-o", "json"))
        assert (planned["modes"], planned["blockers"], planned["differences"]) == (["ipvs"], [], {})
        assert len(planned["leftovers"]["ipvs"]) == len(cluster.virtual_services())
        # A NodePort is one frontend for both families.
        assert (
            planned["kube_proxy_frontends"]
            == planned["agent_frontends"]
            == len(cluster.virtual_services()) - 2
        )
        assert planned["flows"] >= sum(each.kind == "tcp" for each in connections)

        output = cluster.migrate("run")
        time.sleep(1)
        assert broken(connections) == {}, output
    assert "the agent's maps serve all " in output
    found, kept, device = cluster.a.call(_leftovers)
    assert not found
    assert device is not None and device.is_kept
    assert set(device.addresses) == {WEB[False], WEB[True], STICKY[False], STICKY[True]}
    assert kept[-1].startswith("device kube-ipvs0 with ")

    # The rest belongs to other programs and is unchanged.
    left = cluster.a.call(_node_state, cluster.backend)
    assert _foreign_lines(left["servers"], cluster) == _foreign_lines(foreign["servers"], cluster)
    assert len(left["servers"]) > len(foreign["servers"])
    assert {line.split()[1] for line in left["sets"]} - ipsets.NAMING == {"mine", "KUBE-MINE"}
    assert (left["iptables"], left["ip6tables"]) == (foreign["iptables"], foreign["ip6tables"])
    assert set(left["devices"]) == {*foreign["devices"], ipvs.DEVICE}
    for target in cluster.targets():
        assert LongConnection(*target).check() == "alive", target

    # The device is kept until the last connection has ended.
    assert "translated flows are still established" in cluster.migrate("run")
    assert broken(connections) == {}
    if cluster.backend == "legacy":
        _roll_back(cluster, connections)
        return
    for each in connections:
        each.socket.close()
    deadline = time.monotonic() + 240
    while "removed device kube-ipvs0" not in (output := cluster.migrate("run")):
        assert time.monotonic() < deadline, output
        time.sleep(5)
    assert cluster.a.call(_node_state, cluster.backend) == foreign
    assert agent.stop() == 0
    cluster.a.cli("cleanup")


def _foreign_lines(saved: list[str], cluster: IpvsCluster) -> list[str]:
    """Returns lines of virtual services that do not belong to kube-proxy."""
    own = {
        f"-{each.protocol[0]} {ipvs_rules.join_host_port(each.address, each.port)}"
        for each in cluster.virtual_services()
    }
    return [line for line in saved if " ".join(line.split()[1:3]) not in own]


def _roll_back(cluster: IpvsCluster, connections: list[LongConnection]) -> None:
    """kube-proxy starts again and reuses the device and the sets."""
    cluster.a.lab.agents[0].stop()
    cluster.kube_proxy()
    output = cluster.migrate("rollback")
    assert (
        f"kube-proxy's rules serve all {len(cluster.virtual_services()) - 2} frontends of the maps" in output
    )
    assert broken(connections) == {}, output
    found, kept, device = cluster.a.call(_leftovers)
    assert found.modes == ("ipvs",)
    assert len(found.ipvs) == len(cluster.virtual_services())
    assert kept == []
    assert device is not None and not device.marked
    assert set(cluster.client.call(clients.spread_tcp, WEB[False], 80, clients.ENOUGH)) == {"w1", "w2"}
    assert set(cluster.outside.call(clients.spread_tcp, cluster.a.address6, NODE_PORT, clients.ENOUGH)) == {
        "w1",
        "w2",
    }


@pytest.mark.parametrize("cluster", ["nft"], indirect=True)
def test_frontend_missing_from_maps_blocks_the_migration(cluster: IpvsCluster) -> None:
    cluster.kube_proxy()
    cluster.write("web", "sticky")
    cluster.a.agent(manifests=cluster.manifests).start()
    planned = json.loads(cluster.migrate("plan", "-o", "json", check=False))
    names = {
        f"{address}:{port}" for address in (EMPTY[False], f"[{EMPTY[True]}]") for port in ("80/TCP", "53/UDP")
    }
    assert planned["differences"] == dict.fromkeys(sorted(names), "is not in the maps")
    assert "4 of 17 frontends differ" in cluster.fails("run", "--timeout", "1s")
    assert cluster.client.call(clients.ask_tcp, WEB[False], 80)


def _connect_twice_from_one_port(service: tuple[str, int], endpoint: tuple[str, int]) -> list[str]:
    results = []
    for to in (service, endpoint):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.settimeout(10)
            sock.bind(("", 20000))
            try:
                sock.connect(to)
                results.append("response" if sock.recv(4096) else "closed")
            except OSError as error:
                results.append(type(error).__name__)
    return results


@pytest.mark.parametrize("cluster", ["nft"], indirect=True)
def test_ipvs_translates_replies_to_a_recently_used_port(cluster: IpvsCluster) -> None:
    """The kernel behaves so without an agent; ``migrate plan`` warns of it.

    A client connects directly to an endpoint from a port of a connection to the same endpoint through IPVS that is in
    TIME_WAIT for two minutes. IPVS translates the source of the reply to the Service's address.
    """
    cluster.kube_proxy()
    endpoint = (cluster.workers[1].address, 8080)
    cluster.a.run(["ipvsadm", "-d", "-t", f"{WEB[False]}:80", "-r", f"{cluster.workers[0].address}:8080"])
    results = cluster.client.call(_connect_twice_from_one_port, (WEB[False], 80), endpoint)
    assert results == ["response", "TimeoutError"]


def test_cleanup_without_an_agent_removes_only_objects_of_kube_proxy(cluster: IpvsCluster) -> None:
    foreign = cluster.a.call(_load_foreign, cluster.backend)
    cluster.kube_proxy()
    command = [sys.executable, "-c", "from ebpfproxy.cli.migrate import cleanup_kube_proxy as c; c()"]
    output = cluster.a.run(command)
    assert (
        f"removed {len(cluster.virtual_services())} virtual servers from IPVS\nremoved device kube-ipvs0\n"
        in output
    )
    assert cluster.a.call(_node_state, cluster.backend) == foreign
    assert cluster.a.run(command) == "nothing of kube-proxy is left\n"
