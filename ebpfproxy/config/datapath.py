"""Settings of the datapath: sizes of maps and tables, unused features, when connections are closed."""

from __future__ import annotations

import enum
from pathlib import Path

import msgspec

BPFFS = Path("/sys/fs/bpf")
#: The primes that Cilium's option accepts.
MAGLEV_SIZES = (251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65521, 131071)
MAGLEV_DEFAULT_SIZE = 16381
#: Service ports, and pairs of one and a backend, that are measured each on their own.
MEASURED = 4096


class Capacity(msgspec.Struct, frozen=True):
    """The sizes of maps. They are fixed at creation; another value creates new maps beside the old ones."""

    #: Service ports, counted once for each address family.
    services: int = 65536
    #: Distinct endpoint address, port and protocol; both families together.
    backends: int = 262144
    #: Open connected sockets that were translated; memory is allocated per socket.
    connected: int = 1 << 19
    #: Open unconnected UDP sockets that have sent to a Service; memory as for ``connected``.
    unconnected: int = 1 << 18
    #: Conntrack entries: two per flow, four if it is masqueraded. 180 bytes each, allocated in advance;
    #: an eighth as many, at most 2,097,152, have a copy of 130 bytes, with XDP 194.
    conntrack: int = 1 << 19
    #: Prefixes of all loadBalancerSourceRanges.
    source_ranges: int = 1 << 18
    #: Slots of selections: one per backend and service port, more with weights, a table's size with Maglev.
    slots: int = 1 << 20
    #: Clients with session affinity. 110 bytes each, allocated in advance.
    affinity: int = 1 << 16

    @property
    def frontends(self) -> int:
        return 2 * self.services


class Feature(enum.StrEnum):
    """Kernel features that are used if present; each has a fallback."""

    SET_RETVAL = "set-retval"  # without: refused connections fail with EPERM (5.18)
    TCX = "tcx"  # without: clsact filters (6.6)
    MPTCP = "mptcp"  # without: getpeername() of MPTCP sockets gives the backend (5.19 with BTF)
    SOCKET_FIELDS = "socket-fields"  # without: helper calls tell what sockets are (6.2 with BTF)


class Xdp(enum.StrEnum):
    """Where flows that only pass through this node are forwarded before the kernel makes packet buffers."""

    NONE = "none"  # a plain "off" is a boolean in YAML
    NATIVE = "native"
    GENERIC = "generic"


class ExternalTraffic(enum.StrEnum):
    """How a client outside gets its replies from a backend on another node, with traffic policy Cluster."""

    SNAT = "snat"  # by the node that got its request, which masquerades it
    DSR_ACCEPT = "dsr-accept"  # the same, while other nodes may already do otherwise
    DSR = "dsr"  # from the backend's node


class StaleTcp(enum.StrEnum):
    """When TCP connections to a backend are closed: once it is gone, already when not ready, or never."""

    GONE = "gone"
    UNREADY = "unready"
    NEVER = "never"
