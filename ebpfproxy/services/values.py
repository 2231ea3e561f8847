"""Checks single values as the API writes them; warnings about those that are invalid."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable
from datetime import datetime
from socket import inet_pton

import msgspec

from ebpfproxy.kube.objects import ObjectKey, Resource
from ebpfproxy.services.model import Family, Prefix, Protocol

#: Longest name of a Service, a namespace or a port: a DNS label (RFC 1123).
MAX_NAME = 63

_PROTOCOLS = {protocol.name: protocol for protocol in Protocol}
_MAPPED = b"\0" * 10 + b"\xff\xff"
#: A reason that holds for frontends only: manifests of a single host have backends there.
LOOPBACK = "is loopback"

_LEADING_ZEROS = re.compile(r"(?<![0-9A-Fa-f])0+(?=[0-9A-Fa-f])")
_LOOPBACK6 = b"\0" * 15 + b"\1"
_BROADCAST = b"\xff" * 4
#: Other first bytes, of either family, begin addresses that anything may have.
_UNUSUAL = frozenset((0, 127, 169, *range(224, 240), 0xFE, 0xFF))
_IPV4, _IPV6 = int(socket.AF_INET), int(socket.AF_INET6)


class Warning(msgspec.Struct, frozen=True, gc=False):
    """A field whose value is ignored, and the reason. The rest of the object is used."""

    resource: Resource
    key: ObjectKey
    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.resource} {self.key}: {self.field}: {self.message}"


def parse_address(text: str, *, strict: bool = False) -> bytes | None:
    """Packed bytes of an IPv4 or IPv6 address, without a zone.

    Leading zeros mean nothing, as for kube-proxy (k8s.io/utils/net, ParseIPSloppy): API servers took
    ``010.0.0.1`` for 10.0.0.1 until 1.36, and keep objects that have it. ``strict``: they are wrong, as in a
    configuration, which other programs read as octal. None for anything else, IPv4-mapped
    IPv6 among it: it would name one address in two families.
    """
    try:
        packed = inet_pton(_IPV6 if ":" in text else _IPV4, text)
    except (OSError, ValueError):
        plain = _LEADING_ZEROS.sub("", text)
        if strict or plain == text:
            return None
        return parse_address(plain)
    return None if packed.startswith(_MAPPED) else packed


def usual_addresses(texts: Iterable[str], family: Family) -> list[bytes] | None:
    """Packed bytes of all these addresses; None where one of them needs a closer look.

    That is one for which inet_pton(3) is not all that :func:`parse_address` does, or that
    :func:`unusable_address` may have a word about.
    """
    kind = _IPV4 if family is Family.IPV4 else _IPV6
    try:
        found = [inet_pton(kind, text) for text in texts]
    except (OSError, ValueError):
        return None
    return found if _UNUSUAL.isdisjoint([address[0] for address in found]) else None


def parse_prefix(text: str) -> Prefix | None:
    """Parses ``192.0.2.0/24``; bits beyond the prefix are cleared. None for anything else."""
    host, slash, digits = text.partition("/")
    address = parse_address(host)
    if address is None or not slash or not (digits.isascii() and digits.isdigit()) or len(digits) > 3:
        return None
    bits, length = 8 * len(address), int(digits)
    if length > bits:
        return None
    number = int.from_bytes(address, "big") >> (bits - length) << (bits - length)
    return Prefix(number.to_bytes(len(address), "big"), length)


def unusable_address(address: bytes) -> str | None:
    """Why this should be neither a frontend's nor a backend's address, if so.

    The API server refuses the same in endpoints and externalIPs (core/v1, ValidateEndpointIP): a link-local
    backend would be another one on every node, or its metadata service. Multicast and broadcast are refused
    beyond that. 240.0.0.0/4 is not: clusters give it to pods.
    Called once for each endpoint, hence without ``ipaddress``.
    """
    first, second = address[0], address[1]
    if first not in _UNUSUAL:
        return None
    if not first and not any(address):
        return "is unspecified"
    if len(address) == 4:
        if first == 127:
            return LOOPBACK
        if first == 169 and second == 254:
            return "is link-local"
        if 224 <= first < 240:
            return "is multicast"
        return "is broadcast" if address == _BROADCAST else None
    if address == _LOOPBACK6:
        return LOOPBACK
    if first == 0xFE and second & 0xC0 == 0x80:
        return "is link-local"
    return "is multicast" if first == 0xFF else None


def parse_protocol(text: str | None) -> Protocol | None:
    """The protocol, TCP where none is named; None for one that the API does not have."""
    return _PROTOCOLS.get(text or "TCP")


def valid_port(number: int) -> bool:
    return 0 < number < 65536


def parse_port(text: str) -> int | None:
    """The number of a port; None for any other text, however long."""
    if not (text.isascii() and text.isdigit()) or len(text) > 5:
        return None
    return int(text) if valid_port(int(text)) else None


def unusable_name(name: str) -> str | None:
    """Why a Service, namespace or port cannot have this name, if so. Manifests may hold any text.

    Metrics and maps show it to people: a terminal must not obey it.
    """
    if len(name) <= MAX_NAME and name.isascii() and name.isprintable():
        return None
    if not name.isprintable():
        return "has characters that cannot be printed"
    return f"is longer than {MAX_NAME} bytes" if len(name.encode()) > MAX_NAME else None


def parse_time(text: str) -> float | None:
    """Unix seconds of an RFC 3339 time; None for anything else, one without an offset among it."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return None
    return when.timestamp() if when.tzinfo is not None else None
