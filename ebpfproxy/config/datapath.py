"""What the datapath is told: sizes of maps and tables, unused features, when connections end."""

from __future__ import annotations

import enum
from pathlib import Path

import msgspec

BPFFS = Path("/sys/fs/bpf")
#: Primes, as Cilium's option has them.
MAGLEV_SIZES = (251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65521, 131071)
MAGLEV_DEFAULT_SIZE = 16381


class Capacity(msgspec.Struct, frozen=True):
    """How much the maps can hold. Fixed when they are made; another value makes new ones beside the old."""

    #: Service ports, counted once for each address family.
    services: int = 65536
    #: Distinct endpoint address, port and protocol; both families together.
    backends: int = 262144
    #: Connected sockets that are open and were translated; memory is taken for those that are there.
    connected: int = 1 << 19
    #: Unconnected UDP sockets that are open and have sent to a Service; memory as for ``connected``.
    unconnected: int = 1 << 18
    #: Conntrack entries: two for each flow, four where it is masqueraded. 180 bytes each, taken at once.
    conntrack: int = 1 << 19
    #: Prefixes of all loadBalancerSourceRanges.
    source_ranges: int = 1 << 18
    #: Places in selections: one a backend and service port, more with weights, a table's size with Maglev.
    slots: int = 1 << 20
    #: Clients with session affinity. 110 bytes each, taken at once.
    affinity: int = 1 << 16

    @property
    def frontends(self) -> int:
        return 2 * self.services


class Feature(enum.StrEnum):
    """Features that are used where present; without one the named fallback works."""

    SET_RETVAL = "set-retval"  # without: refused connections fail with EPERM (5.18)
    TCX = "tcx"  # without: clsact filters (6.6)
    MPTCP = "mptcp"  # without: getpeername() of MPTCP sockets gives the backend (5.19 with BTF)


class StaleTcp(enum.StrEnum):
    """When TCP connections to a backend are ended: once it is gone, already when it is not ready, never."""

    GONE = "gone"
    UNREADY = "unready"
    NEVER = "never"
