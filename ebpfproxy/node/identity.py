"""Which node this is."""

from __future__ import annotations

import os
import socket
import sys

_SO_NETNS_COOKIE = 71  # asm-generic/socket.h, Linux 5.14


class NodeNameError(Exception):
    """There is no usable name."""


def node_name(override: str | None) -> str:
    """``--hostname-override``, else the host's name: trimmed and in lower case, as kube-proxy does it.

    Raises NodeNameError where nothing is left.
    """
    name = (override or os.uname().nodename).strip().lower()
    if not name:
        raise NodeNameError("the node has no name: set --hostname-override")
    return name


def netns_cookie() -> int:
    """The cookie of this process's network namespace: what bpf_get_netns_cookie gives in programs."""
    with socket.socket() as probe:
        return cookie_of(probe)


def cookie_of(probe: socket.socket) -> int:
    """The cookie of the network namespace that a socket belongs to."""
    return int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), sys.byteorder)
