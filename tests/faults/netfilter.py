"""netfilter's own conntrack in a namespace, without room."""

from __future__ import annotations

import errno
import struct
import subprocess
from ipaddress import IPv4Address

from ebpfproxy.netlink import codec, ctnetlink, nfnetlink

#: A rule that reads a packet's connection: from then on this namespace tracks all.
_TRACKS = "table inet tracks { chain packets { type filter hook prerouting priority 0; ct state established accept; }; }"
_NEW, _STATUS, _TIMEOUT = 0, 3, 7
#: IPS_SEEN_REPLY, IPS_ASSURED and IPS_CONFIRMED: such an entry makes no room for another one.
_KEPT = 1 << 1 | 1 << 2 | 1 << 3
_UDP = 17
_FIRST = int(IPv4Address("10.99.0.1"))


def track() -> None:
    subprocess.run(["nft", _TRACKS], check=True)


def stop_tracking() -> None:
    subprocess.run(["nft", "delete table inet tracks"], check=True)


def fill(seconds: int) -> int:
    """Adds entries that nobody uses until there is no room, which end after ``seconds``; returns their number.

    nf_conntrack_max is one of the whole system, and counts for each namespace.
    """
    more = codec.attribute(_STATUS, struct.pack("!I", _KEPT)) + codec.attribute(
        _TIMEOUT, struct.pack("!I", seconds)
    )
    count = 0
    with nfnetlink.Netfilter() as netfilter:
        while True:
            source = str(IPv4Address(_FIRST + count // 50_000)), 1024 + count % 50_000
            there = "10.98.0.1", 9
            original = ctnetlink._pack_tuple(1, _UDP, source, there)
            reply = ctnetlink._pack_tuple(2, _UDP, there, source)
            try:
                netfilter.request(
                    nfnetlink.CONNTRACK, _NEW, original, reply, more, family=2, flags=codec.CREATE
                )
            except OSError as error:
                if error.errno == errno.ENOMEM:
                    return count
                raise
            count += 1
