"""kube-proxy's counters in nfnetlink_acct, to which its iptables rules refer since 1.31."""

from __future__ import annotations

import errno

from ebpfproxy.netlink import codec, nfnetlink

#: kubernetes/kubernetes pkg/proxy/metrics/metrics.go
NAMES = ("ct_state_invalid_dropped_pkts", "localhost_nps_accepted_pkts")

_NEW, _GET, _DELETE = 0, 1, 3
_NAME = 1
_MISSING = frozenset({errno.ENOENT, errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT})


def add(name: str) -> None:
    """Creates a counter, as kube-proxy does at its start."""
    with nfnetlink.Netfilter() as netfilter:
        netfilter.request(nfnetlink.ACCOUNTS, _NEW, codec.attribute(_NAME, name.encode() + b"\0"))


def find() -> tuple[str, ...]:
    """Returns the names of kube-proxy's counters."""
    with nfnetlink.Netfilter() as netfilter:
        try:
            found = {_name(entry) for entry in netfilter.dump(nfnetlink.ACCOUNTS, _GET)}
        except OSError as error:
            if error.errno in _MISSING:  # a kernel without it
                return ()
            raise
    return tuple(name for name in NAMES if name.encode() in found)


@codec.reading
def _name(entry: memoryview) -> bytes:
    return bytes(codec.attributes(entry)[_NAME]).rstrip(b"\0")


def remove(name: str) -> None:
    """Raises OSError (EBUSY) while a rule refers to it."""
    with nfnetlink.Netfilter() as netfilter:
        netfilter.request(nfnetlink.ACCOUNTS, _DELETE, codec.attribute(_NAME, name.encode() + b"\0"))
