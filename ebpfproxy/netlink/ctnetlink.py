"""Flows of netfilter's conntrack: what it translates was begun by kube-proxy and lives on without its rules.

Numbers: linux/netfilter/nfnetlink_conntrack.h, nf_conntrack_common.h. kube-proxy sets no conntrack mark: its
0x4000 is on packets and ends with them, so that nothing of it is left.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec

from ebpfproxy.netlink import codec, nfnetlink

_NEW, _GET, _DELETE = 0, 1, 2
_ORIGINAL, _REPLY, _STATUS, _TIMEOUT, _ID, _ZONE = 1, 2, 3, 7, 12, 18
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_V4_SOURCE, _V4_DESTINATION, _V6_SOURCE, _V6_DESTINATION = 1, 2, 3, 4
_PROTO_NUMBER, _SOURCE_PORT, _DESTINATION_PORT = 1, 2, 3
_DST_NAT = 1 << 5
_IPVS = Path("/proc/net/ip_vs")
#: Errors of a kernel without nfnetlink, or without conntrack there.
_NO_CONNTRACK = (errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT)


class Flow(msgspec.Struct, frozen=True):
    """A flow whose destination is translated from ``asked`` to ``answering``; else the two are equal.

    It answers to ``seen_as``: the client, or the address and port that stand for it.
    """

    protocol: int
    client: tuple[str, int]
    asked: tuple[str, int]
    answering: tuple[str, int]
    seen_as: tuple[str, int]


def _pack_tuple(kind: int, protocol: int, source: tuple[str, int], destination: tuple[str, int]) -> bytes:
    is_v6 = ":" in source[0]
    family = socket.AF_INET6 if is_v6 else socket.AF_INET
    kinds = (_V6_SOURCE, _V6_DESTINATION) if is_v6 else (_V4_SOURCE, _V4_DESTINATION)
    hosts = (socket.inet_pton(family, each[0]) for each in (source, destination))
    ports = zip((_SOURCE_PORT, _DESTINATION_PORT), (source[1], destination[1]), strict=True)
    addresses = b"".join(codec.attribute(*each) for each in zip(kinds, hosts, strict=True))
    proto = codec.attribute(_PROTO_NUMBER, bytes([protocol]))
    proto += b"".join(codec.attribute(each, struct.pack("!H", port)) for each, port in ports)
    return codec.nested(kind, codec.nested(_TUPLE_IP, addresses) + codec.nested(_TUPLE_PROTO, proto))


def _end(data: memoryview, *, source: bool) -> tuple[int, str, int]:
    inside = codec.attributes(data)
    address, proto = codec.attributes(inside[_TUPLE_IP]), codec.attributes(inside[_TUPLE_PROTO])
    v4, v6 = (_V4_SOURCE, _V6_SOURCE) if source else (_V4_DESTINATION, _V6_DESTINATION)
    packed = bytes(address[v4] if v4 in address else address[v6])
    port = proto.get(_SOURCE_PORT if source else _DESTINATION_PORT)
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    number = struct.unpack("!H", port)[0] if port is not None else 0
    return proto[_PROTO_NUMBER][0], socket.inet_ntop(family, packed), number


def _entries(netfilter: nfnetlink.Netfilter, *, translated: bool) -> Iterator[tuple[Flow, list[bytes]]]:
    """Yields flows whose destination is translated, or is not, with the attributes that name them.

    IPVS changes who answers, and sets no status (net/netfilter/ipvs/ip_vs_nfct.c, ip_vs_update_conntrack).
    """
    has_ipvs = _IPVS.exists()
    for entry in netfilter.dump(nfnetlink.CONNTRACK, _GET):
        if read := _read_entry(entry, translated=translated, has_ipvs=has_ipvs):
            yield read


@codec.reading
def _read_entry(entry: memoryview, *, translated: bool, has_ipvs: bool) -> tuple[Flow, list[bytes]] | None:
    found = codec.attributes(entry)
    has_nat = bool(struct.unpack("!I", found[_STATUS])[0] & _DST_NAT)
    if has_nat != translated and not has_ipvs:
        return None
    asked = _end(found[_ORIGINAL], source=False)[1:]
    answering = _end(found[_REPLY], source=True)[1:]
    if (has_nat or asked != answering) != translated:
        return None
    protocol, address, port = _end(found[_ORIGINAL], source=True)
    seen_as = _end(found[_REPLY], source=False)[1:]
    named = [codec.nested(_ORIGINAL, bytes(found[_ORIGINAL]))]
    named += [codec.attribute(kind, bytes(found[kind])) for kind in (_ID, _ZONE) if kind in found]
    return Flow(protocol, (address, port), asked, answering, seen_as), named


def _absent(error: OSError) -> bool:
    return error.errno in _NO_CONNTRACK


def find() -> list[Flow]:
    """All flows whose destination is translated; none where there is no conntrack."""
    try:
        with nfnetlink.Netfilter() as netfilter:
            return [flow for flow, _ in _entries(netfilter, translated=True)]
    except OSError as error:
        if _absent(error):
            return []
        raise


def remove(is_stale: Callable[[Flow], bool], *, translated: bool = True) -> int:
    """Deletes these of the flows whose destination is translated, or is not; returns how many were there."""
    ended = 0
    try:
        with nfnetlink.Netfilter() as netfilter:
            entries = _entries(netfilter, translated=translated)
            stale = [(flow, named) for flow, named in entries if is_stale(flow)]
            for flow, named in stale:
                ended += _delete(netfilter, flow, named)
    except OSError as error:
        if not _absent(error):
            raise
    return ended


def _delete(netfilter: nfnetlink.Netfilter, flow: Flow, named: list[bytes]) -> bool:
    """Returns false where the flow has ended meanwhile."""
    family = socket.AF_INET6 if ":" in flow.asked[0] else socket.AF_INET
    try:
        netfilter.request(nfnetlink.CONNTRACK, _DELETE, *named, family=family)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        return False
    return True


def hold(ends: Iterable[tuple[int, tuple[str, int], tuple[str, int]]], seconds: float) -> None:
    """Creates untranslated flows that end by themselves: NAT chooses none of their ports until then.

    ``ends``: protocol, source and destination of each. Those that exist are left alone, and nothing is done
    where there is no conntrack, or no room in it.
    """
    timeout = codec.attribute(_TIMEOUT, struct.pack("!I", max(1, round(seconds))))
    try:
        with nfnetlink.Netfilter() as netfilter:
            for each in ends:
                _create(netfilter, *each, timeout)
    except OSError as error:
        if not _absent(error) and error.errno != errno.ENOMEM:
            raise


def _create(
    netfilter: nfnetlink.Netfilter,
    protocol: int,
    source: tuple[str, int],
    destination: tuple[str, int],
    timeout: bytes,
) -> None:
    original = _pack_tuple(_ORIGINAL, protocol, source, destination)
    reply = _pack_tuple(_REPLY, protocol, destination, source)
    family = socket.AF_INET6 if ":" in source[0] else socket.AF_INET
    try:
        netfilter.request(
            nfnetlink.CONNTRACK, _NEW, original, reply, timeout, family=family, flags=codec.CREATE
        )
    except OSError as error:
        if error.errno != errno.EEXIST:
            raise
