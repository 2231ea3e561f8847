"""kube-proxy's IPVS mode: virtual servers, the device that holds their addresses, ipsets.

kubernetes/kubernetes pkg/proxy/ipvs/cleanup.go flushes all virtual servers. Here only those go whose address
is on kube-proxy's device, or that are NodePorts: keepalived's stay. The kernel drops the packets of a
connection whose virtual server is gone (net/netfilter/ipvs/ip_vs_core.c, ip_vs_in_hook), so that connections
do not outlive it as they outlive iptables rules.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import msgspec
from pyroute2 import IPVS, IPRoute, IPVSService
from pyroute2.ipset import IPSet
from pyroute2.netlink.exceptions import NetlinkError

DEVICE = "kube-ipvs0"
#: kube-apiserver's --service-node-port-range unless told otherwise.
NODE_PORTS = range(30000, 32768)

_TABLE = Path("/proc/net/ip_vs")
_PROTOCOLS = {"TCP": socket.IPPROTO_TCP, "UDP": socket.IPPROTO_UDP, "SCTP": socket.IPPROTO_SCTP}
_SERVER = re.compile(r"^(TCP|UDP|SCTP)\s+(?:([0-9A-F]{8})|\[([0-9a-fA-F:]+)\]):([0-9A-F]{4}) ")
_DESTINATION = re.compile(r"^\s+->\s+\S+:[0-9A-F]{4}\s+\S+\s+\d+\s+(\d+)\s")

#: kubernetes/kubernetes pkg/proxy/ipvs/proxier.go, ipsetInfo; IPv6's begin with KUBE-6- and are cut at 31.
_SETS = (
    "LOOP-BACK",
    "CLUSTER-IP",
    "EXTERNAL-IP",
    "EXTERNAL-IP-LOCAL",
    "LOAD-BALANCER",
    "LOAD-BALANCER-FW",
    "LOAD-BALANCER-LOCAL",
    "LOAD-BALANCER-SOURCE-IP",
    "LOAD-BALANCER-SOURCE-CIDR",
    "NODE-PORT-TCP",
    "NODE-PORT-LOCAL-TCP",
    "NODE-PORT-UDP",
    "NODE-PORT-LOCAL-UDP",
    "NODE-PORT-SCTP-HASH",
    "NODE-PORT-LOCAL-SCTP-HASH",
    "HEALTH-CHECK-NODE-PORT",
    "IPVS-IPS",
)
_LONGEST_NAME = 31
SET_NAMES = frozenset(f"{prefix}{name}"[:_LONGEST_NAME] for prefix in ("KUBE-", "KUBE-6-") for name in _SETS)


class VirtualServer(msgspec.Struct, frozen=True):
    """``active``: connections that are open now."""

    protocol: str
    address: str
    port: int
    active: int = 0


def parse(text: str) -> list[VirtualServer]:
    """What /proc/net/ip_vs says; servers by firewall mark are nobody's here."""
    found: list[VirtualServer] = []
    inside = False
    for line in text.splitlines():
        if match := _SERVER.match(line):
            protocol, v4, v6, port = match.groups()
            address = (
                socket.inet_ntop(socket.AF_INET, bytes.fromhex(v4))
                if v4
                else socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, v6))
            )
            found.append(VirtualServer(protocol, address, int(port, 16)))
            inside = True
        elif line[:1] not in ("", " "):
            inside = False
        elif inside and (match := _DESTINATION.match(line)):
            last = found[-1]
            found[-1] = msgspec.structs.replace(last, active=last.active + int(match[1]))
    return found


def of_kube_proxy(servers: Iterable[VirtualServer], on_device: Collection[str]) -> list[VirtualServer]:
    """Those of cluster IPs and other addresses that kube-proxy put on its device, and NodePorts."""
    if not on_device:
        return []
    return [each for each in servers if each.address in on_device or each.port in NODE_PORTS]


def device_addresses() -> list[str] | None:
    """Of kube-proxy's device; None where there is none."""
    with IPRoute() as routes:
        indexes = routes.link_lookup(ifname=DEVICE)
        if not indexes:
            return None
        return [str(each.get_attr("IFA_ADDRESS")) for each in routes.get_addr(index=indexes[0])]


def find_servers(on_device: Collection[str]) -> list[VirtualServer]:
    """None in a kernel without IPVS."""
    try:
        text = _TABLE.read_text()
    except FileNotFoundError:
        return []
    return of_kube_proxy(parse(text), on_device)


def remove_servers(servers: Iterable[VirtualServer]) -> None:
    """By generic netlink. Raises NetlinkError."""
    with IPVS() as ipvs:
        for each in servers:
            family = socket.AF_INET6 if ":" in each.address else socket.AF_INET
            service: Any = IPVSService(
                addr=each.address, port=each.port, protocol=_PROTOCOLS[each.protocol], af=family
            )
            ipvs.service("del", service=service)


def remove_device() -> None:
    with IPRoute() as routes:
        for index in routes.link_lookup(ifname=DEVICE):
            routes.link("del", index=index)


def find_sets() -> tuple[str, ...]:
    """Asked by name: a list would come with all entries. None in a kernel without ipsets."""
    try:
        with IPSet() as sets:
            return tuple(name for name in sorted(SET_NAMES) if _exists(sets, name))
    except OSError:
        return ()


def _exists(sets: Any, name: str) -> bool:
    try:
        return bool(list(sets.headers(name)))
    except NetlinkError:
        return False


def remove_set(name: str) -> None:
    """Raises NetlinkError while a rule uses it."""
    with IPSet() as sets:
        sets.destroy(name)
