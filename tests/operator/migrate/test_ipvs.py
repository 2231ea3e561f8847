"""Parsing of /proc/net/ip_vs; test_ipvs_kernel.py needs a kernel with IPVS."""

from __future__ import annotations

import socket

from ebpfproxy.operator.migrate.node import ipsets, ipvs, kube_proxy_frontends
from ebpfproxy.operator.migrate.node.ipvs import VirtualServer

TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP

TABLE = """IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
TCP  0A600001:01BB rr
  -> AC120002:1A2B      Masq    1      3          0
  -> AC120003:1A2B      Masq    1      4          9
  -> AC120004:1A2B      Masq    0      1          0
UDP  0A60000A:0035 rr persistent 10800
TCP  [fd00:0010:0096:0000:0000:0000:0000:0001]:01BB wrr
  -> [fd00:0000:0000:0000:0000:0000:0000:0002]:1A2B      Masq    1      5          0
TCP  C0A80001:7567 rr
FWM  00000001 rr
  -> 0A0A0A0A:0050      Route   1      7          0
TCP  C0A80009:0050 rr
  -> 0A0A0A0B:0050      Masq    1      8          0
"""


def test_virtual_servers_are_parsed_with_destinations_and_connections() -> None:
    assert ipvs.parse(TABLE) == [
        VirtualServer("TCP", "10.96.0.1", 443, 8, 9, ("172.18.0.2:6699", "172.18.0.3:6699")),
        VirtualServer("UDP", "10.96.0.10", 53),
        VirtualServer("TCP", "fd00:10:96::1", 443, 5, 0, ("[fd00::2]:6699",)),
        VirtualServer("TCP", "192.168.0.1", 30055),
        VirtualServer("TCP", "192.168.0.9", 80, 8, 0, ("10.10.10.11:80",)),
    ]
    assert ipvs.parse("") == []


def _of_kube_proxy(on_device: set[str], named: ipsets.Frontends) -> list[tuple[str, int, bool]]:
    found = ipvs.of_kube_proxy(ipvs.parse(TABLE), on_device, named)
    return [(each.address, each.port, each.is_node_port) for each in found]


def test_virtual_servers_of_others_are_not_kube_proxys() -> None:
    on_device = {"10.96.0.1", "10.96.0.10", "fd00:10:96::1"}
    cluster_ips = [("10.96.0.1", 443, False), ("10.96.0.10", 53, False), ("fd00:10:96::1", 443, False)]
    node_port, external = ("192.168.0.1", 30055, True), ("192.168.0.9", 80, False)
    nothing = ipsets.Frontends()
    assert _of_kube_proxy(on_device, nothing) == [*cluster_ips, node_port], "a NodePort of the default range"
    assert _of_kube_proxy(on_device, ipsets.Frontends(ports=frozenset())) == cluster_ips
    assert _of_kube_proxy(on_device, ipsets.Frontends(ports=frozenset({(30055, UDP)}))) == cluster_ips
    named = ipsets.Frontends(frozenset({("192.168.0.9", 80, TCP)}), frozenset({(30055, TCP)}))
    assert _of_kube_proxy(on_device, named) == [*cluster_ips, node_port, external]
    assert _of_kube_proxy(set(), nothing) == [], (
        "without its device and sets no virtual server is attributed to kube-proxy"
    )


def test_virtual_server_with_connections_is_kept_with_all_others_at_its_address() -> None:
    on_device = ipvs.Device(1, ("10.96.0.1", "10.96.0.10"), marked=False)
    found = [
        VirtualServer("TCP", "10.96.0.1", 443, active=1),
        VirtualServer("UDP", "10.96.0.1", 53),
        VirtualServer("UDP", "10.96.0.10", 53),
        VirtualServer("TCP", "192.168.0.1", 30055, inactive=1, is_node_port=True),
        VirtualServer("TCP", "192.168.0.1", 30056, is_node_port=True),
    ]
    assert ipvs.carrying(found, on_device) == [found[0], found[1], found[3]]


def test_frontends_of_virtual_servers_have_destinations_with_weight() -> None:
    found = ipvs.of_kube_proxy(ipvs.parse(TABLE), {"10.96.0.1", "fd00:10:96::1"}, ipsets.Frontends())
    assert kube_proxy_frontends.of_ipvs(found) == {
        "10.96.0.1:443/TCP": {"172.18.0.2:6699", "172.18.0.3:6699"},
        "[fd00:10:96::1]:443/TCP": {"[fd00::2]:6699"},
        "0.0.0.0:30055/TCP": set(),
    }


def test_names_of_ipsets_fit_the_limit_of_the_kernel() -> None:
    assert all(len(name) <= 31 for name in ipsets.NAMES)
    assert {"KUBE-LOOP-BACK", "KUBE-6-LOOP-BACK", "KUBE-6-LOAD-BALANCER-SOURCE-CID"} <= ipsets.NAMES
