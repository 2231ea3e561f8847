"""kube-proxy's ipsets: in IPVS mode its iptables rules match them.

Numbers of protocols are IP's. Names: kubernetes/kubernetes pkg/proxy/ipvs/proxier.go, ipsetInfo; ipset.go:
IPv6's begin with KUBE-6- and are cut at 31 characters.
"""

from __future__ import annotations

import socket
from typing import Any, NamedTuple

from pyroute2.ipset import IPSet
from pyroute2.netlink.exceptions import NetlinkError

from ebpfproxy.operator.migrate.node.tools import ToolError

_FRONTENDS = ("EXTERNAL-IP", "EXTERNAL-IP-LOCAL", "LOAD-BALANCER")
_NODE_PORTS = {
    "NODE-PORT-TCP": socket.IPPROTO_TCP,
    "NODE-PORT-UDP": socket.IPPROTO_UDP,
    "NODE-PORT-SCTP-HASH": socket.IPPROTO_SCTP,
}
_OTHERS = (
    "LOOP-BACK",
    "CLUSTER-IP",
    "LOAD-BALANCER-FW",
    "LOAD-BALANCER-LOCAL",
    "LOAD-BALANCER-SOURCE-IP",
    "LOAD-BALANCER-SOURCE-CIDR",
    "NODE-PORT-LOCAL-TCP",
    "NODE-PORT-LOCAL-UDP",
    "NODE-PORT-LOCAL-SCTP-HASH",
    "HEALTH-CHECK-NODE-PORT",
    "IPVS-IPS",
)
_PREFIXES = ("KUBE-", "KUBE-6-")
_LONGEST_NAME = 31


def _named(*names: str) -> frozenset[str]:
    return frozenset(f"{prefix}{name}"[:_LONGEST_NAME] for prefix in _PREFIXES for name in names)


#: These name virtual servers whose address may be on another device than kube-proxy's.
NAMING = _named(*_FRONTENDS, *_NODE_PORTS)
NAMES = NAMING | _named(*_OTHERS)


class Frontends(NamedTuple):
    """What the sets have, except cluster IPs.

    ``addresses``: (address, port, protocol) of load balancers and external IPs; ``ports``: (port, protocol)
    of NodePorts, None without a set of them.
    """

    addresses: frozenset[tuple[str, int, int]] = frozenset()
    ports: frozenset[tuple[int, int]] | None = None


def find() -> tuple[str, ...]:
    """Returns names of kube-proxy's sets, each asked for by name: a list would have all entries. Empty in a
    kernel without ipsets.
    """
    try:
        with IPSet() as sets:
            return tuple(name for name in sorted(NAMES) if exists(sets, name))
    except OSError:
        return ()


def exists(sets: Any, name: str) -> bool:
    try:
        return bool(list(sets.headers(name)))
    except NetlinkError:
        return False


def frontends() -> Frontends:
    """Returns empty ones in a kernel without ipsets. Raises ToolError."""
    addresses: set[tuple[str, int, int]] = set()
    ports: set[tuple[int, int]] | None = None
    try:
        with IPSet() as sets:
            for prefix in _PREFIXES:
                for name in _FRONTENDS:
                    addresses.update(_entries(sets, f"{prefix}{name}") or ())
                for name, number in _NODE_PORTS.items():
                    entries = _entries(sets, f"{prefix}{name}")
                    if entries is not None:
                        ports = (ports or set()) | {(port, number) for _, port, _ in entries}
    except OSError:
        pass
    return Frontends(frozenset(addresses), None if ports is None else frozenset(ports))


def _entries(sets: Any, name: str) -> list[tuple[str, int, int]] | None:
    """Returns address, port and protocol, as far as the set's type has them. None without such a set.

    Raises ToolError.
    """
    found = []
    try:
        for message in sets.list(name):
            data = message.get_attr("IPSET_ATTR_ADT")
            for entry in data.get_attrs("IPSET_ATTR_DATA") if data is not None else ():
                port, protocol = entry.get_attr("IPSET_ATTR_PORT_FROM"), entry.get_attr("IPSET_ATTR_PROTO")
                found.append((_address(entry.get_attr("IPSET_ATTR_IP_FROM")), port, protocol or 0))
    except NetlinkError:
        return None
    except (AttributeError, TypeError) as error:
        # pyroute2 leaves an attribute that it cannot decode as bytes.
        raise ToolError(f"the kernel's list of the ipset {name} is not understood: {error}") from error
    return found


def _address(attribute: Any) -> str:
    if attribute is None:
        return ""
    return attribute.get_attr("IPSET_ATTR_IPADDR_IPV4") or attribute.get_attr("IPSET_ATTR_IPADDR_IPV6") or ""


def remove(name: str) -> None:
    """Raises NetlinkError while a rule uses it."""
    with IPSet() as sets:
        sets.destroy(name)
