"""nodePortAddresses: at which of the node's addresses NodePorts answer (kube-proxy 1.37's values)."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

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
