"""Selects the node's addresses that nodePortAddresses names."""

from __future__ import annotations

import ipaddress

from ebpfproxy.config.node_port_addresses import ALL, LOCALHOST, PRIMARY
from ebpfproxy.node.facts import is_link_local6
from ebpfproxy.node.network import Network


def select_node_port_addresses(network: Network, selection: tuple[str, ...]) -> frozenset[bytes]:
    """The addresses that answer on NodePorts, without those of the loopback; all without a selection.

    "All" excludes link-local IPv6 addresses: no packet is forwarded from or to one.
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
