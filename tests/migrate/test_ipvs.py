"""What /proc/net/ip_vs says: the kernel of the tests has no IPVS."""

from __future__ import annotations

from ebpfproxy.migrate import ipvs
from ebpfproxy.migrate.ipvs import VirtualServer

TABLE = """IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
TCP  0A600001:01BB rr
  -> AC120002:1A2B      Masq    1      3          0
  -> AC120003:1A2B      Masq    1      4          9
UDP  0A60000A:0035 rr persistent 10800
TCP  [fd00:0010:0096:0000:0000:0000:0000:0001]:01BB wrr
  -> [fd00:0000:0000:0000:0000:0000:0000:0002]:1A2B      Masq    1      5          0
TCP  C0A80001:7567 rr
FWM  00000001 rr
  -> 0A0A0A0A:0050      Route   1      7          0
TCP  C0A80009:0050 rr
  -> 0A0A0A0B:0050      Masq    1      8          0
"""


def test_servers_and_their_open_connections_are_read() -> None:
    assert ipvs.parse(TABLE) == [
        VirtualServer("TCP", "10.96.0.1", 443, 7),
        VirtualServer("UDP", "10.96.0.10", 53, 0),
        VirtualServer("TCP", "fd00:10:96::1", 443, 5),
        VirtualServer("TCP", "192.168.0.1", 30055, 0),
        VirtualServer("TCP", "192.168.0.9", 80, 8),
    ]
    assert ipvs.parse("") == []


def test_others_virtual_servers_are_not_kube_proxys() -> None:
    found = ipvs.of_kube_proxy(ipvs.parse(TABLE), {"10.96.0.1", "10.96.0.10", "fd00:10:96::1"})
    assert [(each.address, each.port) for each in found] == [
        ("10.96.0.1", 443),
        ("10.96.0.10", 53),
        ("fd00:10:96::1", 443),
        ("192.168.0.1", 30055),
    ]
    assert ipvs.of_kube_proxy(ipvs.parse(TABLE), ()) == [], "without its device nothing is known to be its"


def test_names_of_sets_are_as_long_as_the_kernel_takes() -> None:
    assert all(len(name) <= 31 for name in ipvs.SET_NAMES)
    assert {"KUBE-LOOP-BACK", "KUBE-6-LOOP-BACK", "KUBE-6-LOAD-BALANCER-SOURCE-CID"} <= ipvs.SET_NAMES
