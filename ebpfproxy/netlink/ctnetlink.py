"""Flows of netfilter's conntrack: what it translates was begun by kube-proxy and lives on without its rules.

Numbers: linux/netfilter/nfnetlink_conntrack.h, nf_conntrack_common.h. kube-proxy sets no conntrack mark: its
0x4000 is on packets and ends with them, so that nothing of it is left.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from ebpfproxy.netlink import codec, nfnetlink

_GET, _DELETE = 1, 2
_ORIGINAL, _REPLY, _STATUS, _ID, _ZONE = 1, 2, 3, 12, 18
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_V4_SOURCE, _V4_DESTINATION, _V6_SOURCE, _V6_DESTINATION = 1, 2, 3, 4
_PROTO_NUMBER, _SOURCE_PORT, _DESTINATION_PORT = 1, 2, 3
_DST_NAT = 1 << 5
_IPVS = Path("/proc/net/ip_vs")


class Flow(msgspec.Struct, frozen=True):
    """A flow whose destination is translated from ``asked`` to ``answering``; else the two are equal.

    It answers to ``seen_as``: the client, or the address and port that stand for it.
    """

    protocol: int
    client: tuple[str, int]
    asked: tuple[str, int]
    answering: tuple[str, int]
    seen_as: tuple[str, int]


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
        found = codec.attributes(entry)
        has_nat = bool(struct.unpack("!I", found[_STATUS])[0] & _DST_NAT)
        if has_nat != translated and not has_ipvs:
            continue
        asked = _end(found[_ORIGINAL], source=False)[1:]
        answering = _end(found[_REPLY], source=True)[1:]
        if (has_nat or asked != answering) != translated:
            continue
        protocol, address, port = _end(found[_ORIGINAL], source=True)
        seen_as = _end(found[_REPLY], source=False)[1:]
        named = [codec.nested(_ORIGINAL, bytes(found[_ORIGINAL]))]
        named += [codec.attribute(kind, bytes(found[kind])) for kind in (_ID, _ZONE) if kind in found]
        yield Flow(protocol, (address, port), asked, answering, seen_as), named


def _find(netfilter: nfnetlink.Netfilter, *, translated: bool) -> list[tuple[Flow, list[bytes]]]:
    """Returns none where there is no conntrack."""
    try:
        return list(_entries(netfilter, translated=translated))
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return []
        raise


def find() -> list[Flow]:
    """All flows whose destination is translated; none where there is no conntrack."""
    with nfnetlink.Netfilter() as netfilter:
        return [flow for flow, _ in _find(netfilter, translated=True)]


def remove(is_stale: Callable[[Flow], bool], *, translated: bool = True) -> int:
    """Deletes these of the flows whose destination is translated, or is not; returns how many were there."""
    with nfnetlink.Netfilter() as netfilter:
        stale = [(flow, named) for flow, named in _find(netfilter, translated=translated) if is_stale(flow)]
        ended = 0
        for flow, named in stale:
            family = socket.AF_INET6 if ":" in flow.asked[0] else socket.AF_INET
            try:
                netfilter.request(nfnetlink.CONNTRACK, _DELETE, *named, family=family)
                ended += 1
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
    return ended
