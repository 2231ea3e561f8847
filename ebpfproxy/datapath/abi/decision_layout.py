"""The bytes of decisions, and of what a command wants to see of them, as in ``bpf/lib/decision.h``.

The conventions are those of ``layout``.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

from ebpfproxy.datapath.abi.flow_layout import BackendUse
from ebpfproxy.datapath.abi.layout import NOBODY, NSEC_PER_SEC, pack_address, unpack_address
from ebpfproxy.datapath.abi.node_layout import PacketEvent
from ebpfproxy.services.model import Algorithm

DECISION = struct.Struct("=Q16sII2sHBBBB40s")
_TASK = struct.Struct("=QQII16s")
_SENDER = struct.Struct("=16s2sHI16x")
TRACING = struct.Struct("=QQQIIII16s16sII")
DECISION_STATE = struct.Struct("=QQQQQQQ16s")
#: ``place`` of ``struct decision``: these lower bits are its ``Algorithm``, those above its :class:`Place`.
BITS_OF_ALGORITHM = 4
#: ``namespace/name`` of a pod, which may be cut.
POD_NAME = struct.Struct("=128s")
#: These are offsets in ``struct tracing``: what a command wants follows its lease; the agent writes the last.
WANTED_AT, PROGRAMS_AT = 8, 76


class DecisionKind(enum.IntEnum):
    """``enum decision_kind``."""

    CHOSEN = 0
    AFFINITY_HIT = 1
    REFUSED = 2
    DROPPED = 3
    MASQUERADE_FAILED = 4
    BACKEND_LEFT = 5
    STALE_SOCKET_ENDED = 6
    BIND_REFUSED = 7

    def __str__(self) -> str:
        return self.name.lower().replace("_", "-")


#: The kinds of connections that go well.
SUCCESSES = frozenset({DecisionKind.CHOSEN, DecisionKind.AFFINITY_HIT})
#: Their client is a task wherever they are made.
_OF_SOCKETS = frozenset({DecisionKind.STALE_SOCKET_ENDED, DecisionKind.BIND_REFUSED})


class Place(enum.IntEnum):
    """``enum decision_place``: where a decision was made."""

    SOCKET = 0
    INGRESS = 1
    EGRESS = 2
    AGENT = 3

    def __str__(self) -> str:
        return self.name.lower()


class Task(NamedTuple):
    """Who asked at a socket. ``netns`` is the lower half of the network namespace's cookie."""

    cgroup: int
    cookie: int
    netns: int
    pid: int
    comm: str


class Sender(NamedTuple):
    """Who sent a packet. The port is in host byte order."""

    address: bytes
    port: int
    ifindex: int


class Decision(NamedTuple):
    """``struct decision``. ``time`` is CLOCK_MONOTONIC in ns, ports are in host byte order.

    ``service_id`` and ``backend_id`` are None where there is none. ``client``: a task at the socket, else the
    sender of a packet. ``reason`` means something unless ``kind`` is a success.
    """

    time: int
    kind: DecisionKind
    reason: PacketEvent
    place: Place
    algorithm: Algorithm
    protocol: int
    frontend: bytes
    frontend_port: int
    service_id: int | None
    backend_id: int | None
    candidates: int
    client: Task | Sender


# They are by number: to call an enumeration takes as long as all else of a decision.
_KINDS, _REASONS, _PLACES, _ALGORITHMS = map(tuple, (DecisionKind, PacketEvent, Place, Algorithm))


def unpack_decision(packed: bytes) -> Decision:
    """Raises IndexError for a kind, reason, place or algorithm that this version does not know."""
    time, frontend, service, backend, port, candidates, kind, reason, protocol, place, client = (
        DECISION.unpack(packed)
    )
    found = _PLACES[place >> BITS_OF_ALGORITHM]
    return Decision(
        time,
        _KINDS[kind],
        _REASONS[reason],
        found,
        _ALGORITHMS[place & ((1 << BITS_OF_ALGORITHM) - 1)],
        protocol,
        unpack_address(frontend),
        int.from_bytes(port, "big"),
        None if service == NOBODY else service,
        None if backend == NOBODY else backend,
        candidates,
        _task(client) if found is Place.SOCKET or kind in _OF_SOCKETS else _sender(client),
    )


def pack_socket_ended(
    frontend: bytes, port: int, protocol: int, use: BackendUse, *, cookie: int, netns: int
) -> bytes:
    """A decision of the agent: a socket was closed, which a program gives its time."""
    return DECISION.pack(
        0,
        pack_address(frontend),
        use.service_id,
        use.backend_id,
        port.to_bytes(2, "big"),
        0,
        DecisionKind.STALE_SOCKET_ENDED,
        PacketEvent.BACKEND_GONE,
        protocol,
        Place.AGENT << 4,
        _TASK.pack(0, cookie, netns, 0, b""),
    )


def _task(packed: bytes) -> Task:
    cgroup, cookie, netns, pid, comm = _TASK.unpack(packed)
    return Task(cgroup, cookie, netns, pid, comm.partition(b"\0")[0].decode(errors="replace"))


def _sender(packed: bytes) -> Sender:
    address, port, _, ifindex = _SENDER.unpack(packed)
    return Sender(unpack_address(address), int.from_bytes(port, "big"), ifindex)


class TracingPrograms(enum.IntEnum):
    """``enum tracing_programs``, by which the agent answers a command."""

    PLAIN = 0
    REPORTING = 1
    FAILED = 2


class Client(NamedTuple):
    """The client whose decisions are wanted: up to one address of each family, and a cookie's lower half."""

    addresses: tuple[bytes, ...]
    netns: int


#: Decisions a second, of each CPU.
DEFAULT_RATE = 2000


class Wanted(NamedTuple):
    """What a command wants to see. ``rate``: decisions a second, of each CPU.

    ``one_in``: one in so many of those that go well. ``by_service``: only Services in ``traced_services``.
    """

    kinds: frozenset[DecisionKind]
    one_in: int = 1
    rate: int = DEFAULT_RATE
    by_service: bool = False
    client: Client | None = None


#: The part of a second's decisions that may come at once.
_BURST = 0.25


def pack_wanted(wanted: Wanted) -> bytes:
    """``struct tracing`` between the lease and what the agent writes, which are not part of it."""
    client = wanted.client
    addresses = [pack_address(address) for address in client.addresses] if client else []
    first, second = (addresses * 2 + [b"", b""])[:2]
    return TRACING.pack(
        0,
        NSEC_PER_SEC // wanted.rate,
        int(_BURST * NSEC_PER_SEC),
        sum(1 << kind for kind in wanted.kinds),
        wanted.one_in,
        wanted.by_service,
        client is not None,
        first,
        second,
        client.netns if client else 0,
        0,
    )[WANTED_AT:PROGRAMS_AT]


class Lost(NamedTuple):
    """Decisions that were not reported: above the rate, and with the ring full."""

    limited: int
    full: int
