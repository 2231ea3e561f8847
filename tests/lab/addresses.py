"""Addresses and routes of a lab: none of a family that the kernel does not know."""

from __future__ import annotations

import socket
from typing import Any

from tests.lab.spaces import HAS_IPV6


def add_address(where: Any, index: int, address: str, prefix: int) -> None:
    if not _is_known(address):
        return
    # IFA_F_NODAD: the address is usable without duplicate address detection.
    options = {"flags": 0x02} if ":" in address else {}
    where.addr("add", index=index, address=address, prefixlen=prefix, **options)


def add_route(where: Any, index: int, to: str, gateway: str = "", **options: Any) -> None:
    """``to``: an address, a CIDR or "default"."""
    if not _is_known(gateway + to):
        return
    family = socket.AF_INET6 if ":" in gateway + to else socket.AF_INET
    through = {"gateway": gateway} if gateway else {}
    where.route(options.pop("command", "add"), dst=to, oif=index, family=family, **through, **options)


def _is_known(address: str) -> bool:
    return HAS_IPV6 or ":" not in address
