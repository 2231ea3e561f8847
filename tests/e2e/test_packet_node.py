"""Devices, addresses and ports of the node; programs and netfilter rules of others; options of the agent."""

from __future__ import annotations

import errno
import json
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import IPRoute

from ebpfproxy.datapath.abi import uapi
from ebpfproxy.datapath.kernel import bpf
from tests.e2e.outside_client import VARIANTS, HeldConnection, OutsideClientCluster, ask_by_socat
from tests.e2e.two_node_cluster import EXTERNAL, NODE_PORT
from tests.lab import Agent, Lab, clients, manifests
from tests.lab.lab import routes_of
from tests.lab.waiting import until

pytestmark = pytest.mark.root

#: Netlink events take well below a second on an idle machine, and less than the sweep (10 s) on a busy one.
AT_ONCE = 5.0


# -- devices and addresses


def test_node_port_is_served_on_a_hot_plugged_device(cluster: OutsideClientCluster) -> None:
    """The device is added, becomes an uplink by its route, and is renamed and removed."""
    switch = f"{cluster.lab.id}-switch"
    with routes_of(switch) as outside, routes_of(cluster.a.netns) as inside:
        outside.link("add", ifname="hot", kind="veth", peer={"ifname": "eth7", "net_ns_fd": cluster.a.netns})
        outside.link(
            "set",
            index=outside.link_lookup(ifname="hot")[0],
            master=outside.link_lookup(ifname="br0")[0],
            state="up",
        )
        index = inside.link_lookup(ifname="eth7")[0]
        inside.addr("add", index=index, address="172.18.7.1", prefixlen=24)
        inside.link("set", index=index, state="up")
        inside.route("add", dst="default", gateway="172.18.7.254", oif=index, priority=500)
    cluster.outside.run(["ip", "addr", "add", "172.18.7.254/24", "dev", "eth0"])
    began = time.monotonic()
    until(
        lambda: cluster.outside.call(clients.connect_error, "172.18.7.1", NODE_PORT, 0.2) == "connected",
        "no NodePort on eth7",
    )
    assert time.monotonic() - began < AT_ONCE
    cluster.a.run(["ip", "link", "set", "eth7", "name", "wan7"])
    until(lambda: "wan7" in cluster.a.cli("status"), "status does not show the new name")
    assert cluster.outside.call(clients.connect_error, "172.18.7.1", NODE_PORT) == "connected"
    cluster.a.run(["ip", "link", "del", "wan7"])
    until(lambda: "wan7" not in cluster.a.cli("status"), "status still shows the removed device")
    cluster.outside.run(["ip", "addr", "del", "172.18.7.254/24", "dev", "eth0"])


def test_node_port_is_served_at_an_added_address(cluster: OutsideClientCluster) -> None:
    cluster.a.run(["ip", "addr", "add", "172.18.0.77/24", "dev", "eth0"])
    began = time.monotonic()
    until(
        lambda: cluster.outside.call(clients.connect_error, "172.18.0.77", NODE_PORT, 0.2) == "connected",
        "no NodePort at .77",
    )
    assert time.monotonic() - began < AT_ONCE
    cluster.a.run(["ip", "addr", "del", "172.18.0.77/24", "dev", "eth0"])


def test_bridge_as_uplink_and_device_patterns() -> None:
    """The node's address is on a bridge, and the physical device is a port of it, as on hypervisors."""
    with Lab() as lab:
        cluster = OutsideClientCluster(lab)
        cluster.a.run(["ip", "link", "add", "br-ex", "type", "bridge"])
        cluster.a.run(["ip", "addr", "flush", "dev", "eth0"])
        cluster.a.run(["ip", "link", "set", "eth0", "master", "br-ex"])
        cluster.a.run(["ip", "addr", "add", f"{cluster.a.address}/24", "dev", "br-ex"])
        cluster.a.run(["ip", "link", "set", "br-ex", "up"])
        cluster.a.run(["ip", "route", "add", "default", "via", cluster.outside.address])
        cluster.a.run(["ip", "route", "add", "10.244.2.0/24", "via", cluster.b.address])
        agent = cluster.agent().start()
        assert set(
            cluster.outside.call(clients.spread_tcp, cluster.a.address, NODE_PORT, clients.ENOUGH)
        ) == {
            "w1",
            "w2",
        }
        agent.stop()
        agent = cluster.agent("--devices", "nothing*").start()
        # An unnamed device that leads outside still has that role, and NodePorts are served at all addresses.
        status = json.loads(cluster.a.cli("status", "-o", "json"))
        assert [each["role"] for each in status["devices"] if each["device"] == "br-ex"] == ["outside"]
        assert set(cluster.outside.call(clients.spread_tcp, cluster.a.address, NODE_PORT, 20)) == {"w1", "w2"}
        agent.stop()
        cluster.agent("--devices", "br-*,wan*").start()
        assert set(
            cluster.outside.call(clients.spread_tcp, cluster.a.address, NODE_PORT, clients.ENOUGH)
        ) == {
            "w1",
            "w2",
        }


def test_programs_are_attached_once_a_device_has_less_than_bpf_mprog_max() -> None:
    with Lab() as lab:
        cluster = OutsideClientCluster(lab)
        folder = cluster.a.bpf_root / "others"
        cluster.a.call(_attach_most_programs, str(folder))
        cluster.agent().start()
        status = json.loads(cluster.a.cli("status", "-o", "json"))
        assert [each.partition(":")[0] for each in status["agent"]["problems"]] == ["eth0"]
        assert cluster.outside.call(clients.connect_error, cluster.a.address, NODE_PORT) == "ECONNREFUSED"
        shutil.rmtree(folder)
        until(lambda: "problem" not in cluster.a.cli("status"), "the programs are not attached yet")
        assert cluster.outside.call(clients.connect_error, cluster.a.address, NODE_PORT) == "connected"


# -- health check ports


def _bind(address: str, port: int, kind: int) -> str:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind) as sock:
        try:
            sock.bind((address, port))
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error))
    return "bound"


def _http(host: str, port: int) -> tuple[int, str]:
    """The status and the body, which is empty where the Service has gone since the connection was accepted."""
    with socket.create_connection((host, port), 2) as sock:
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        data = b""
        while chunk := sock.recv(4096):
            data += chunk
    if not data:
        raise ConnectionResetError("closed without a response")
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


def test_health_check_node_port_follows_local_endpoints(cluster: OutsideClientCluster) -> None:
    def serve(*endpoints: manifests.Document) -> None:
        cluster.add_load_balancer(
            "healthy",
            "10.96.1.14",
            "203.0.113.34",
            list(endpoints),
            externalTrafficPolicy="Local",
            healthCheckNodePort=32222,
        )

    def status() -> int:
        try:
            return cluster.outside.call(_http, cluster.a.address, 32222)[0]
        except (ConnectionRefusedError, ConnectionResetError, TimeoutError):
            return 0

    serve(cluster.endpoint_on_a(), cluster.endpoint_on_b())
    until(lambda: status() == 200, "the health check does not succeed")
    _, body = cluster.outside.call(_http, cluster.a.address6, 32222)
    assert json.loads(body) == {
        "service": {"namespace": "shop", "name": "healthy"},
        "localEndpoints": 1,
        "serviceProxyHealthy": True,
    }
    serve(cluster.endpoint_on_b())
    until(lambda: status() == 503, "the health check does not fail")
    serve(cluster.endpoint_on_a(ready=False, terminating=True), cluster.endpoint_on_b())
    until(lambda: status() == 503, "the health check counts a terminating endpoint")
    cluster.remove("healthy")
    until(lambda: status() == 0, "the health check port is still open")


def test_health_check_node_port_in_use_is_logged_counted_and_shown(cluster: OutsideClientCluster) -> None:
    server = cluster.a.popen(["socat", "TCP6-LISTEN:32223,fork", "/dev/null"], join_cgroup=False)
    until(
        lambda: cluster.a.call(_bind, "::", 32223, socket.SOCK_STREAM) == "EADDRINUSE",
        "socat does not listen",
    )
    cluster.add_load_balancer(
        "blocked",
        "10.96.1.16",
        "203.0.113.36",
        [cluster.endpoint_on_a()],
        externalTrafficPolicy="Local",
        healthCheckNodePort=32223,
    )
    agent = cluster.lab.agents[-1]
    agent.wait_log("cannot bind health check port, trying again port=32223 service=shop/blocked")
    until(
        lambda: 'ebpfproxy_health_check_ports{state="failed"} 1.0' in agent.http("/metrics", 10249)[1],
        "the metric does not show the failed port",
    )
    assert "healthCheckNodePort 32223" in cluster.a.cli("status")
    assert cluster.outside.call(clients.connect_error, "203.0.113.36", 80) == "connected"
    server.terminate()
    cluster.remove("blocked")


def test_metrics_of_the_packet_path(cluster: OutsideClientCluster) -> None:
    _, text = cluster.lab.agents[-1].http("/metrics", 10249)
    for name in (
        'ebpfproxy_packets_total{action="rejected",reason="no-endpoint"}',
        'ebpfproxy_packets_total{action="dropped",reason="source-range"}',
        'ebpfproxy_packets_total{action="passed",reason="martian"}',
        'ebpfproxy_devices{state="attached"}',
        "ebpfproxy_conntrack_entries",
        "ebpfproxy_conntrack_expired_total",
        "ebpfproxy_conntrack_evicted_total",
        "ebpfproxy_conntrack_early_dropped_total",
        "ebpfproxy_conntrack_sweep_seconds_count",
        'ebpfproxy_map_capacity{map="conntrack"}',
    ):
        assert f"\n{name} " in text, name


# -- rules and programs of others


def test_netfilter_rules_of_a_cni_see_client_and_backend_addresses(cluster: OutsideClientCluster) -> None:
    """The firewall drops invalid packets, and forwards to pods and established connections only."""
    rules = """
    table inet cni {
        chain forward {
            type filter hook forward priority 0; policy drop;
            ct state invalid drop
            ct state established,related accept
            ip saddr 172.18.0.254 ip daddr 10.244.0.0/16 tcp dport 8080 counter accept
            ip saddr 10.244.0.0/16 accept
        }
        chain input { type filter hook input priority 0; policy accept; ct state invalid drop; }
    }
    """
    path = cluster.lab.folder / "rules.nft"
    path.write_text(rules)
    cluster.a.run(["nft", "-f", str(path)])
    try:
        found = cluster.outside.call(clients.spread_tcp, cluster.a.address, NODE_PORT, clients.ENOUGH)
        assert set(found) == {"w1", "w2"}
        assert ask_by_socat(cluster.a, "10.96.0.10:80") != {}
        assert f"counter packets {clients.ENOUGH} " in cluster.a.run(["nft", "list", "table", "inet", "cni"])
        assert cluster.outside.call(clients.connect_error, "203.0.113.10", 53, 0.5) == "TimeoutError"
    finally:
        cluster.a.run(["nft", "delete", "table", "inet", "cni"])


def test_conntrack_list_get_and_flush(cluster: OutsideClientCluster) -> None:
    held = HeldConnection(cluster.outside, cluster.a.address, NODE_PORT)

    def listed(*arguments: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(cluster.a.cli("conntrack", "list", "-o", "json", *arguments))
        return found

    flows = listed("--service", "shop/web", "--state", "ESTABLISHED", "--client", cluster.outside.address)
    assert len(flows) == 1
    flow = flows[0]
    assert flow["frontend"] == f"{cluster.a.address}:{NODE_PORT}"
    assert flow["backend"] in (f"{cluster.w1.address}:8080", f"{cluster.w2.address}:8080")
    assert flow["masquerade"].rpartition(":")[0] in ("10.244.1.1", cluster.a.address)
    assert 86000 < flow["expires"] <= 86400
    assert listed("--protocol", "sctp", "--client", "192.0.2.1") == []
    got = json.loads(cluster.a.cli("conntrack", "get", flow["client"], "-o", "json"))
    assert got[0]["backend"] == flow["backend"]
    assert "ESTABLISHED" in cluster.a.cli("conntrack", "list", "--frontend", flow["frontend"])
    assert "flushed 1 flows (4 entries)" in cluster.a.cli("conntrack", "flush", "--client", flow["client"])
    assert listed("--client", flow["client"]) == []
    assert held.ask() != "alive", "replies of a flushed flow are not translated"
    assert "flushed" in cluster.a.cli("conntrack", "flush", "--all")


def _attach_foreign_link(path: str) -> int:
    """Attaches a foreign program to eth0, which passes all packets, and pins its link."""
    program = bpf.prog_load(
        uapi.PROG_SCHED_CLS, 0, "test", bytes.fromhex("b7000000ffffffff 9500000000000000")
    )
    link = bpf.link_create(program, socket.if_nametoindex("eth0"), 46)
    bpf.pin(link, Path(path))
    return 0


def _attach_most_programs(folder: str) -> None:
    """Attaches as many programs to eth0 as the kernel allows (BPF_MPROG_MAX - 1), and pins them."""
    Path(folder).mkdir(parents=True)
    for number in range(63):
        program = bpf.prog_load(
            uapi.PROG_SCHED_CLS, 0, "test", bytes.fromhex("b7000000ffffffff 9500000000000000")
        )
        link = bpf.link_create(program, socket.if_nametoindex("eth0"), 46)
        bpf.pin(link, Path(folder) / str(number))


def _link_is_attached(path: str) -> bool:
    return bool(bpf.tcx_link_info(bpf.get_pinned(Path(path))).ifindex)


def _attach_foreign_filter() -> None:
    program = bpf.prog_load(
        uapi.PROG_SCHED_CLS, 0, "test", bytes.fromhex("b7000000ffffffff 9500000000000000")
    )
    with IPRoute() as netlink:
        index = socket.if_nametoindex("eth0")
        netlink.tc("add", "clsact", index)
        netlink.tc(
            "add-filter",
            "bpf",
            index,
            parent=0xFFFFFFF2,
            protocol=3,
            prio=1,
            fd=program,
            name="cni",
            classid=1,
            direct_action=True,
        )


def _filters() -> list[str]:
    with IPRoute() as netlink:
        found = netlink.get_filters(socket.if_nametoindex("eth0"), parent=0xFFFFFFF2)
        options = [each.get_attr("TCA_OPTIONS") for each in found]
        return [o.get_attr("TCA_BPF_NAME") for o in options if o is not None and o.get_attr("TCA_BPF_NAME")]


@pytest.mark.parametrize("variant", ["default", "clsact"])
def test_programs_of_others_stay_attached_and_have_their_turn_after_ours(variant: str) -> None:
    """They may end with TC_ACT_OK, after which none has a turn: tests/cnis shows it with Cilium's verdicts."""
    with Lab() as lab:
        cluster = OutsideClientCluster(lab)
        pin = str(cluster.a.bpf_root.parent / "foreign")
        cluster.a.bpf_root.parent.mkdir(parents=True, exist_ok=True)
        cluster.a.call(_attach_foreign_link, pin)
        cluster.a.call(_attach_foreign_filter)
        agent = cluster.agent(*VARIANTS[variant]).start()
        assert set(
            cluster.outside.call(clients.spread_tcp, cluster.a.address, NODE_PORT, clients.ENOUGH)
        ) == {
            "w1",
            "w2",
        }
        names = [name.partition(":")[0] for name in cluster.a.call(_filters)]
        assert names == (["ebpfproxy", "cni"] if variant == "clsact" else ["cni"])
        agent.stop()
        output = cluster.a.cli("cleanup")
        assert "detached" in output
        assert cluster.a.call(_filters) == ["cni"]
        assert cluster.a.call(_link_is_attached, pin)
        assert cluster.outside.call(clients.connect_error, cluster.a.address, NODE_PORT) == "ECONNREFUSED"
        Path(pin).unlink()


# -- options


def _with(*arguments: str) -> Callable[[Lab], tuple[OutsideClientCluster, Agent]]:
    def make(lab: Lab) -> tuple[OutsideClientCluster, Agent]:
        made = OutsideClientCluster(lab)
        return made, made.agent(*arguments).start()

    return make


def test_no_external_ips_and_node_port_addresses() -> None:
    with Lab() as lab:
        cluster, _ = _with("--no-external-ips", "--nodeport-addresses", "172.18.0.99/32")(lab)
        cluster.a.run(["ip", "addr", "add", "172.18.0.99/24", "dev", "eth0"])
        until(
            lambda: cluster.outside.call(clients.connect_error, "172.18.0.99", NODE_PORT, 0.2) == "connected",
            "no NodePort at the configured address",
        )
        assert cluster.outside.call(clients.connect_error, cluster.a.address, NODE_PORT) == "ECONNREFUSED"
        assert cluster.outside.call(clients.connect_error, EXTERNAL, 80, 0.3) == "TimeoutError"
        assert cluster.client.call(clients.connect_error, EXTERNAL, 80, 0.3) != "connected"
        assert cluster.a.call(_bind, "0.0.0.0", NODE_PORT, socket.SOCK_STREAM) == "bound"


def test_masquerade_all_and_detect_local_mode() -> None:
    with Lab() as lab:
        cluster, agent = _with("--detect-local-mode", "ClusterCIDR", "--cluster-cidr", "10.244.1.3/32")(lab)
        # The client pod is not in the CIDR, so that it is masqueraded.
        assert ask_by_socat(cluster.client, "10.96.0.40:80")["peer"] == "10.244.1.1"
        agent.stop()
        agent = cluster.agent("--masquerade-all").start()
        assert ask_by_socat(cluster.client, "10.96.0.40:80")["peer"] == "10.244.1.1"
        agent.stop()
        agent = cluster.agent().start()
        assert ask_by_socat(cluster.client, "10.96.0.40:80")["peer"] == cluster.client.address
        agent.stop()
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-a"}}
        manifests.write(cluster.manifests / "node.yaml", {**node, "spec": {"podCIDRs": ["10.244.9.0/24"]}})
        agent = cluster.agent("--detect-local-mode", "NodeCIDR").start()
        assert ask_by_socat(cluster.client, "10.96.0.40:80")["peer"] == "10.244.1.1"
        manifests.write(cluster.manifests / "node.yaml", {**node, "spec": {"podCIDRs": ["10.244.1.0/24"]}})
        until(
            lambda: ask_by_socat(cluster.client, "10.96.0.40:80")["peer"] == cluster.client.address,
            "podCIDRs of the Node are not used",
        )
