"""nodePortAddresses: the addresses of the node that answer on NodePorts (values of kube-proxy 1.37)."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

#: The node's primary addresses, those of the loopback, all. They can be combined, also with CIDRs.
PRIMARY, LOCALHOST, ALL = "primary", "localhost", "all"
KEYWORDS = (PRIMARY, LOCALHOST, ALL)
_LOOPBACK = ipaddress.ip_network("127.0.0.0/8")


class NodePortAddressesError(Exception):
    """An invalid value of nodePortAddresses; the message names it."""


def parse_node_port_addresses(texts: Iterable[str]) -> tuple[str, ...]:
    """Checks the values: ``primary``, ``localhost``, ``all`` and CIDRs. Raises NodePortAddressesError."""
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
    """Whether the values include IPv4 addresses of the loopback."""
    found = tuple(texts)
    return not found or any(
        text in (ALL, LOCALHOST)
        or (text != PRIMARY and ipaddress.ip_network(text, strict=False).overlaps(_LOOPBACK))
        for text in found
    )
