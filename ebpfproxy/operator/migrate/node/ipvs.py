"""kube-proxy's IPVS mode: virtual servers, and the device that holds their addresses.

kubernetes/kubernetes pkg/proxy/ipvs/cleanup.go flushes all virtual servers. Here only those go that are
kube-proxy's: keepalived's stay. The kernel drops the packets of a connection whose virtual server is gone
(net/netfilter/ipvs/ip_vs_core.c, ip_vs_in_hook): they do not outlive it as they outlive iptables' rules. So a
virtual server that carries some stays until they have ended, with all others at its address, the address on
kube-proxy's device, whose alias says so, and the ipsets that name such servers. The agent translates whatever
begins meanwhile, before IPVS sees it.

Two limits. IPVS gives an endpoint's answer the Service's address wherever it remembers the client's port,
also in TIME_WAIT (ip_vs_out_hook): a connection to the endpoint itself from such a port gets none. And a
connected UDP socket of the host has an address of the device as its own, which netfilter masquerades for as
long as it remembers the flow (nf_conntrack_udp_timeout, nf_conntrack_udp_timeout_stream): after a longer
pause its datagrams get no answer.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import msgspec
from pyroute2 import IPVS, IPRoute, IPVSService

from ebpfproxy.operator.migrate.node import ipsets
from ebpfproxy.operator.migrate.node.tools import ToolError

DEVICE = "kube-ipvs0"
#: The device has this alias while it is kept for connections.
ALIAS = "ebpfproxy: kept for connections that kube-proxy began"
#: kube-apiserver's --service-node-port-range unless told otherwise.
NODE_PORTS = range(30000, 32768)

_TABLE = Path("/proc/net/ip_vs")
_PROTOCOLS = {"TCP": socket.IPPROTO_TCP, "UDP": socket.IPPROTO_UDP, "SCTP": socket.IPPROTO_SCTP}
_END = r"(?:([0-9A-F]{8})|\[([0-9a-fA-F:]+)\]):([0-9A-F]{4})"
_SERVER = re.compile(rf"^(TCP|UDP|SCTP)\s+{_END} ")
_DESTINATION = re.compile(rf"^\s+->\s+{_END}\s+\S+\s+(\d+)\s+(\d+)\s+(\d+)\b")


class VirtualServer(msgspec.Struct, frozen=True):
    """``active``: connections that are open now; ``inactive``: that begin or end, and UDP's.

    ``endpoints`` are those that may get new connections: kube-proxy lets others go by weight 0.
    """

    protocol: str
    address: str
    port: int
    active: int = 0
    inactive: int = 0
    endpoints: tuple[str, ...] = ()
    #: It answers at the node's own addresses.
    is_node_port: bool = False

    @property
    def connections(self) -> int:
        return self.active + self.inactive


class Device(msgspec.Struct, frozen=True):
    """kube-proxy's device. ``marked``: with our alias."""

    index: int
    addresses: tuple[str, ...]
    marked: bool

    @property
    def is_kept(self) -> bool:
        """True if kube-proxy is gone and connections remain. It creates all its sets when it comes back."""
        return self.marked and not (set(ipsets.find()) - ipsets.NAMING)


def _end(v4: str, v6: str, port: str) -> tuple[str, int]:
    if v4:
        return socket.inet_ntop(socket.AF_INET, bytes.fromhex(v4)), int(port, 16)
    try:
        return socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, v6)), int(port, 16)
    except OSError as error:
        raise ToolError(f"{_TABLE}: {v6!r} is no address") from error


def parse(text: str) -> list[VirtualServer]:
    """Reads the text of /proc/net/ip_vs; servers by firewall mark are ignored. Raises ToolError."""
    found: list[VirtualServer] = []
    inside = False
    for line in text.split("\n"):
        if match := _SERVER.match(line):
            found.append(VirtualServer(match[1], *_end(match[2], match[3], match[4])))
            inside = True
        elif line[:1] not in ("", " "):
            inside = False
        elif inside and (match := _DESTINATION.match(line)):
            last, (host, port) = found[-1], _end(match[1], match[2], match[3])
            endpoint = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            found[-1] = msgspec.structs.replace(
                last,
                active=last.active + int(match[5]),
                inactive=last.inactive + int(match[6]),
                endpoints=(*last.endpoints, endpoint) if int(match[4]) else last.endpoints,
            )
    return found


def of_kube_proxy(
    servers: Iterable[VirtualServer], on_device: Collection[str], named: ipsets.Frontends
) -> list[VirtualServer]:
    """Returns the servers at addresses of kube-proxy's device, and those that its ipsets name.

    A load balancer's address or an external IP that is the node's own is not on the device. Without sets of
    node ports those of the usual range are its.
    """
    if not on_device and named == ipsets.Frontends():
        return []
    found = []
    for each in servers:
        protocol = _PROTOCOLS[each.protocol]
        if each.address in on_device or (each.address, each.port, protocol) in named.addresses:
            found.append(each)
        elif each.port in NODE_PORTS if named.ports is None else (each.port, protocol) in named.ports:
            found.append(msgspec.structs.replace(each, is_node_port=True))
    return found


def device() -> Device | None:
    """Returns kube-proxy's device; None where there is none."""
    with IPRoute() as routes:
        indexes = routes.link_lookup(ifname=DEVICE)
        if not indexes:
            return None
        (link,) = routes.get_links(indexes[0])
        addresses = (str(each.get_attr("IFA_ADDRESS")) for each in routes.get_addr(index=indexes[0]))
        return Device(indexes[0], tuple(addresses), link.get_attr("IFLA_IFALIAS") == ALIAS)


def _all() -> list[VirtualServer]:
    """Returns no servers in a kernel without IPVS."""
    try:
        return parse(_TABLE.read_text())
    except FileNotFoundError:
        return []


def servers(of: Device | None) -> list[VirtualServer]:
    """Returns kube-proxy's servers with their present connections."""
    if not (found := _all()):
        return []
    return of_kube_proxy(found, frozenset(of.addresses if of is not None else ()), ipsets.frontends())


def carrying(found: Iterable[VirtualServer], of: Device) -> list[VirtualServer]:
    """Returns servers that have connections, and all others at their addresses on the device.

    While an address is there, what sockets of this host send to it passes no device that we see.
    """
    some = list(found)
    addresses = {each.address for each in some if each.connections} & set(of.addresses)
    return [each for each in some if each.connections or each.address in addresses]


def serving() -> list[VirtualServer]:
    """Returns kube-proxy's servers, unless they are only kept for connections."""
    found = device()
    return servers(found) if found is None or not found.is_kept else []


def remove_servers(gone: Iterable[VirtualServer]) -> None:
    """Removes them by generic netlink. Raises NetlinkError."""
    with IPVS() as ipvs:
        for each in gone:
            family = socket.AF_INET6 if ":" in each.address else socket.AF_INET
            service: Any = IPVSService(
                addr=each.address, port=each.port, protocol=_PROTOCOLS[each.protocol], af=family
            )
            ipvs.service("del", service=service)


def remove_device(found: Device) -> None:
    """Raises NetlinkError."""
    with IPRoute() as routes:
        routes.link("del", index=found.index)


def keep_device(found: Device, addresses: Collection[str]) -> None:
    """Keeps it with these of its addresses, and our alias. Raises NetlinkError."""
    with IPRoute() as routes:
        routes.link("set", index=found.index, IFLA_IFALIAS=ALIAS)
        for address in found.addresses:
            if address not in addresses:
                prefix = 128 if ":" in address else 32
                routes.addr("del", index=found.index, address=address, prefixlen=prefix)


def find_kept() -> str:
    """Describes what is kept for connections; empty where nothing is."""
    found = device()
    if found is None or not found.is_kept:
        return ""
    return f"device {DEVICE} with {len(servers(found))} virtual servers"


def end_kept() -> None:
    """Removes what was kept; where kube-proxy is back, it only loses the alias. Raises NetlinkError."""
    found = device()
    if found is None or not found.marked:
        return
    if not found.is_kept:
        with IPRoute() as routes:
            routes.link("set", index=found.index, IFLA_IFALIAS="")
        return
    if gone := servers(found):
        remove_servers(gone)
    remove_device(found)
    for name in ipsets.find():
        ipsets.remove(name)
