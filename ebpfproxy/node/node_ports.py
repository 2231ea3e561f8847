"""nodePortAddresses: at which of the node's addresses NodePorts answer (kube-proxy 1.37's values)."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from ebpfproxy.node.facts import is_link_local6
from ebpfproxy.node.network import Network

#: The node's primary addresses; those of the loopback; every one. They go beside each other and beside CIDRs.
PRIMARY, LOCALHOST, ALL = "primary", "localhost", "all"
KEYWORDS = (PRIMARY, LOCALHOST, ALL)
_LOOPBACK = ipaddress.ip_network("127.0.0.0/8")


class NodePortAddressesError(Exception):
    """A value of nodePortAddresses that cannot be used; the message names it."""


def parse_node_port_addresses(texts: Iterable[str]) -> tuple[str, ...]:
    """The values, checked: ``primary``, ``localhost``, ``all`` and CIDRs. Raises NodePortAddressesError."""
    found = tuple(text.strip() for text in texts)
    for text in found:
        if text in KEYWORDS:
            continue
        try:
            ipaddress.ip_network(text, strict=False)
        except ValueError as error:
            known = ", ".join(map(repr, KEYWORDS))
            raise NodePortAddressesError(f"{text!r} is neither a CIDR nor one of {known}: {error}") from None
        if "/" not in text:
            raise NodePortAddressesError(f"{text!r} is not a CIDR: it has no prefix length")
    return found


def names_loopback(texts: Iterable[str]) -> bool:
    """Whether IPv4 addresses of the loopback are among those that are meant."""
    found = tuple(texts)
    return not found or any(
        text in (ALL, LOCALHOST)
        or (text != PRIMARY and ipaddress.ip_network(text, strict=False).overlaps(_LOOPBACK))
        for text in found
    )


def select_node_port_addresses(network: Network, selection: tuple[str, ...]) -> frozenset[bytes]:
    """The addresses that NodePorts answer at, those of the loopback apart: all without a selection.

    What means all leaves link-local IPv6 addresses out: no packet is forwarded from or to one.
    """
    everywhere = frozenset(address for address in network.answered if not is_link_local6(address))
    if not selection:
        return everywhere
    found: set[bytes] = set()
    for text in selection:
        if text == PRIMARY:
            found |= set(network.primary) & network.answered
        elif text == ALL:
            found |= everywhere
        elif text != LOCALHOST:
            within = ipaddress.ip_network(text, strict=False)
            among = network.answered if within.prefixlen else everywhere
            found |= {address for address in among if ipaddress.ip_address(address) in within}
    return frozenset(found)
