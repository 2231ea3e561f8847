"""Single values as the API writes them, checked; and what is said about those that are wrong."""

from __future__ import annotations

import ipaddress
import socket

import msgspec

from ebpfproxy.objects import ObjectKey, Resource
from ebpfproxy.services.model import Protocol

#: Longest name of a Service, a namespace or a port: a DNS label (RFC 1123).
MAX_NAME = 63

_PROTOCOLS = {protocol.name: protocol for protocol in Protocol}
_MAPPED = b"\0" * 10 + b"\xff\xff"


class Warning(msgspec.Struct, frozen=True, gc=False):
    """A value that is not used, where it stands, and why. The rest of the object is used."""

    resource: Resource
    key: ObjectKey
    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.resource} {self.key}: {self.field}: {self.message}"


def parse_address(text: str) -> bytes | None:
    """Packed bytes of an IPv4 or IPv6 address as Go's parser takes it: no zone, no leading zeros.

    None for anything else, IPv4-mapped IPv6 among it: it would name one address in two families.
    """
    try:
        if ":" not in text:
            return socket.inet_pton(socket.AF_INET, text)
        packed = socket.inet_pton(socket.AF_INET6, text)
    except (OSError, ValueError):
        return None
    return None if packed.startswith(_MAPPED) else packed


def unusable_frontend(address: bytes) -> str | None:
    """Why clients may not be made to mean a Service by this address, if so."""
    ip = ipaddress.ip_address(address)
    for kind in ("unspecified", "loopback", "link_local", "multicast"):
        if getattr(ip, f"is_{kind}"):
            return f"is {kind.replace('_', '-')}"
    return None


def unusable_backend(address: bytes) -> str | None:
    """Why no connection can be made to this address, if so. Called once for each endpoint, hence quick."""
    if address[0] == 0xFF or (len(address) == 4 and address[0] >= 224):
        return "is not a unicast address"
    return "is unspecified" if not any(address) else None


def parse_protocol(text: str | None) -> Protocol | None:
    """The protocol, TCP where none is named; None for one that the API does not have."""
    return _PROTOCOLS.get(text or "TCP")


def valid_port(number: int) -> bool:
    return 0 < number < 65536
