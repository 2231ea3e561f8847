"""What other tools, and the kernel in their place, say of a running kube-proxy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from pyroute2.netlink.nfnetlink.ipset import ipset_msg

from ebpfproxy.netlink import codec
from ebpfproxy.operator.migrate.cluster import fleet
from ebpfproxy.operator.migrate.cluster.jobs import Done, JobError
from ebpfproxy.operator.migrate.node import (
    ipsets,
    iptables,
    ipvs,
    kube_proxy_frontends,
    nftables,
    running_kube_proxy,
)
from ebpfproxy.operator.migrate.node.tools import ToolError
from tests.fuzz.target import Target, printable, samples, shortened


def _tool(parse: Callable[[str], object], data: bytes) -> None:
    """Tools print in the locale's encoding, which is UTF-8 here; see :func:`ebpfproxy.operator.migrate.node.tools.run`."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return
    try:
        parse(text)
    except ToolError as error:
        printable(str(error))


def nft_tables(data: bytes) -> None:
    """What ``nft -j list tables`` prints."""
    _tool(nftables.plan, data)


def iptables_save(data: bytes) -> None:
    """What ``iptables-save`` prints, up to the script that removes kube-proxy's rules."""

    def use(text: str) -> None:
        for each in iptables.plan(text):
            each.script()
        iptables.built_in(text)

    _tool(use, data)


def iptables_frontends(data: bytes) -> None:
    """What ``iptables-save`` prints, up to the comparison of its frontends with the maps."""
    _tool(lambda text: _compare(kube_proxy_frontends.of_iptables(text)), data)


def nft_frontends(data: bytes) -> None:
    """What ``nft -j list table`` prints, up to the comparison of its frontends with the maps."""
    _tool(lambda text: _compare(kube_proxy_frontends.of_nftables(text)), data)


def _compare(found: kube_proxy_frontends.Frontends) -> None:
    ours: kube_proxy_frontends.Frontends = {"10.96.0.1:443/TCP": frozenset({"172.18.0.2:6443"})}
    kube_proxy_frontends.missing(found, ours)
    kube_proxy_frontends.unserved(ours, found)


def ip_vs(data: bytes) -> None:
    """/proc/net/ip_vs, up to the comparison of its frontends with the maps."""
    _tool(lambda text: _compare(kube_proxy_frontends.of_ipvs(ipvs.parse(text))), data)


# It tells of each attribute that it cannot decode.
logging.getLogger("pyroute2.netlink").setLevel(logging.CRITICAL)


class _Sets:
    """Answers with one message."""

    def __init__(self, message: Any) -> None:
        self._message = message

    def list(self, name: str) -> list[Any]:
        return [self._message]


def ipset(data: bytes) -> None:
    """The kernel's list of a set, as pyroute2 reads it: what that refuses never comes to us."""
    message = ipset_msg(data)
    try:
        message.decode()
    except Exception:
        return
    try:
        ipsets._entries(_Sets(message), "KUBE-LOAD-BALANCER")
    except ToolError as error:
        printable(str(error))


def _ipset_seeds() -> Iterator[bytes]:
    for version, address in ((1, bytes([203, 0, 113, 10])), (2, bytes(15) + b"\1")):
        ends = codec.nested(1, codec.attribute(version | 1 << 14, address))
        entry = ends + codec.attribute(4 | 1 << 14, b"\0\x50") + codec.attribute(7, b"\6")
        sets = codec.attribute(1, b"\6") + codec.attribute(2, b"KUBE-LOAD-BALANCER\0")
        found = sets + codec.nested(8, codec.nested(7, entry) + codec.nested(7, ends))
        yield codec.pack(6 << 8 | 7, 0, b"\2\0\0\0" + found)


def node_plan(data: bytes) -> None:
    """What a node's `migrate plan` has printed, among warnings."""
    text = data.decode(errors="replace")
    try:
        fleet.brief_of(Done(0, text))
    except JobError as error:
        str(error)


def cgroup(data: bytes) -> None:
    """/proc/PID/cgroup of a running kube-proxy."""
    _tool(running_kube_proxy.started_by, data)


def kube_proxy_config(data: bytes) -> None:
    """That of a running kube-proxy."""
    _tool(lambda text: running_kube_proxy.check_config(text, "f"), data)


_NFT = b"""{"nftables": [{"metainfo": {"version": "1.0.6", "json_schema_version": 1}},
  {"table": {"family": "ip", "name": "kube-proxy", "handle": 1}}, {"table": {"family": "ip6", "name": "kube-proxy"}},
  {"chain": {"family": "ip", "table": "kube-proxy", "name": "services", "handle": 2}}]}"""
_CGROUP = b"""0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod12345678_1234_1234_1234_123456789012.slice/x
"""
_IP_VS = b"""IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
TCP  0A600001:01BB rr
  -> AC120002:192B      Masq    1      3          1
TCP  [fd00:0010:0096:0000:0000:0000:0000:0001]:01BB rr
  -> [fd00:0010:0244:0000:0000:0000:0000:0002]:192B      Masq    0      0          0
UDP  0A60000A:0035 rr persistent 10800
FWM  00000001 wlc
"""


_NFT_FRONTENDS = b"""{"nftables": [{"map": {"family": "ip", "name": "service-ips", "table": "kube-proxy",
  "type": ["ipv4_addr", "inet_proto", "inet_service"], "elem": [
  [{"concat": ["10.96.0.1", "tcp", 443]}, {"goto": {"target": "service-1"}}],
  [{"elem": {"val": {"concat": ["10.96.0.2", "tcp", 80]}, "comment": "x"}}, {"goto": {"target": "external-2"}}]]}},
  {"map": {"family": "ip", "name": "no-endpoint-nodeports", "table": "kube-proxy",
  "elem": [[{"concat": ["tcp", 30080]}, "drop"]]}},
  {"rule": {"family": "ip", "table": "kube-proxy", "chain": "service-1", "expr": [{"vmap": {"key": {"numgen": {}},
  "data": {"set": [[0, {"goto": {"target": "endpoint-1"}}]]}}}]}},
  {"rule": {"family": "ip", "table": "kube-proxy", "chain": "endpoint-1",
  "expr": [{"dnat": {"addr": "172.18.0.2", "port": 6443}}]}},
  {"rule": {"family": "ip", "table": "kube-proxy", "chain": "external-2", "expr": [{"dnat": {"addr": {"map": {"key": 1,
  "data": {"set": [[0, {"concat": ["10.244.0.2", 8080]}]]}}}}}]}}]}"""
_SAVED = b"""*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m comment --comment "a:b cluster IP" -m tcp --dport 443 -j KUBE-SVC-A
-A KUBE-SERVICES -d 10.96.0.2/32 -p tcp -m tcp --dport 80 -j REJECT --reject-with icmp-port-unreachable
-A KUBE-NODEPORTS ! -d 127.0.0.0/8 -p udp -m udp --dport 30053 -j KUBE-EXT-A
-A KUBE-EXT-A -j KUBE-SVC-A
-A KUBE-SVC-A -m statistic --mode random -j KUBE-SEP-A
-A KUBE-SEP-A -p tcp -m tcp -j DNAT --to-destination 172.18.0.2:6443
COMMIT
"""
_PLAN = b"""warning: x
{
  "mode": "nftables", "pids": [7], "blockers": []
}
"""

TARGETS = (
    Target(nft_tables, lambda: [_NFT]),
    Target(nft_frontends, lambda: [_NFT_FRONTENDS, *samples("nft-list-ruleset.json.gz")()]),
    Target(iptables_save, shortened(samples("iptables-legacy-save.txt", "ip6tables-legacy-save.txt"), 40)),
    Target(iptables_frontends, lambda: [_SAVED]),
    Target(ip_vs, lambda: [_IP_VS]),
    Target(ipset, _ipset_seeds),
    Target(cgroup, lambda: [_CGROUP]),
    Target(kube_proxy_config, samples("defaults.yaml")),
    Target(node_plan, lambda: [_PLAN]),
)
