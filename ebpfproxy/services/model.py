"""The result of ``services``: service ports with their frontends and backends.

Addresses are packed bytes in network order, 4 of them for IPv4 and 16 for IPv6; ports are plain integers.
Everything here is immutable, hashable and compares by value, so that a change is a comparison.
"""

from __future__ import annotations

import enum
import socket
from typing import NamedTuple

import msgspec


class Protocol(enum.IntEnum):
    """IANA protocol numbers, as in the IP header."""

    TCP = 6
    UDP = 17
    SCTP = 132


class Family(enum.IntEnum):
    IPV4 = 4
    IPV6 = 6

    def __str__(self) -> str:
        return f"IPv{self.value}"


class FrontendKind(enum.IntEnum):
    CLUSTER_IP = 0
    EXTERNAL_IP = 1
    LOAD_BALANCER = 2
    NODE_PORT = 3

    def __str__(self) -> str:
        return _KIND_NAMES[self]


_KIND_NAMES = {
    FrontendKind.CLUSTER_IP: "ClusterIP",
    FrontendKind.EXTERNAL_IP: "ExternalIP",
    FrontendKind.LOAD_BALANCER: "LoadBalancer",
    FrontendKind.NODE_PORT: "NodePort",
}


class Prefix(NamedTuple):
    """A range of addresses. The bits beyond ``length`` are 0."""

    address: bytes
    length: int

    def contains(self, address: bytes) -> bool:
        """True if the address is in the range; False for one of the other family, and for an empty one."""
        if len(self.address) != len(address):
            return False
        rest = 8 * len(address) - self.length
        return int.from_bytes(self.address) >> rest == int.from_bytes(address) >> rest


class Policy(enum.IntEnum):
    """Which of a service port's two backend sets a frontend uses (a traffic policy's values)."""

    CLUSTER = 0
    LOCAL = 1


class Algorithm(enum.IntEnum):
    """How a backend is chosen. Weights count with every one of them."""

    RANDOM = 0
    ROUND_ROBIN = 1
    LEAST_CONNECTIONS = 2
    SHORTEST_DELAY = 3
    NEVER_QUEUE = 4
    DESTINATION_HASH = 5
    SOURCE_HASH = 6
    MAGLEV = 7

    def __str__(self) -> str:
        return _ALGORITHM_NAMES[self]

    @property
    def looks_at_loads(self) -> bool:
        return Algorithm.LEAST_CONNECTIONS <= self <= Algorithm.NEVER_QUEUE


_ALGORITHM_NAMES = {
    Algorithm.RANDOM: "random",
    Algorithm.ROUND_ROBIN: "round-robin",
    Algorithm.LEAST_CONNECTIONS: "least-connections",
    Algorithm.SHORTEST_DELAY: "shortest-expected-delay",
    Algorithm.NEVER_QUEUE: "never-queue",
    Algorithm.DESTINATION_HASH: "destination-hash",
    Algorithm.SOURCE_HASH: "source-hash",
    Algorithm.MAGLEV: "maglev",
}


class BackendState(enum.IntEnum):
    """DRAINED: by hand, or by weight 0. GONE: no endpoint any more, but something is still open to it."""

    ACTIVE = 0
    TERMINATING = 1
    QUARANTINED = 2
    DRAINED = 3
    GONE = 4

    def __str__(self) -> str:
        return self.name.lower()


class Backend(msgspec.Struct, frozen=True, order=True, gc=False):
    """An endpoint's address and port, which identify it; its state is kept elsewhere.

    No tuple, since there are hundreds of thousands: this takes half of the memory, and is no garbage
    collector's business.
    """

    address: bytes
    port: int
    protocol: Protocol


class Frontend(NamedTuple):
    """Address, port and protocol that clients use, with the policy of each scope.

    A NodePort's address is all zeros: it stands for every address of the node.
    ``internal`` is for clients in the cluster (pods of this node and the node itself), ``external`` for
    traffic that arrives from outside.
    """

    kind: FrontendKind
    address: bytes
    port: int
    protocol: Protocol
    internal: Policy
    external: Policy


class ServicePortKey(NamedTuple):
    """Identity of a service port in one family; its service id stays the same across restarts."""

    namespace: str
    name: str
    port_name: str
    protocol: Protocol
    family: Family


class ServicePort(msgspec.Struct, frozen=True, gc=False):
    """One port of a Service in one address family: all that a datapath must know of it.

    ``cluster`` and ``local`` are the backends that new connections use under each policy, sorted, without
    duplicates. ``draining`` are the terminating endpoints in neither set: they serve old connections only.
    ``terminating`` names the backends of ``cluster`` and ``local`` that are terminating (they are used
    because nothing else is left). ``idle`` are the endpoints that are not ready, but there: established
    connections to them go on. ``drained`` are endpoints that could serve, but take no new connections: by
    hand, or by a weight of 0. ``weights`` are of members of ``cluster`` and ``local``, sorted; who is not
    named has 1.
    """

    key: ServicePortKey
    frontends: tuple[Frontend, ...]
    cluster: tuple[Backend, ...]
    local: tuple[Backend, ...]
    draining: tuple[Backend, ...] = ()
    terminating: frozenset[Backend] = frozenset()
    idle: tuple[Backend, ...] = ()
    affinity_seconds: int = 0
    algorithm: Algorithm = Algorithm.RANDOM
    drained: tuple[Backend, ...] = ()
    weights: tuple[tuple[Backend, int], ...] = ()
    #: Sources that may use the load balancer's addresses; None: all.
    source_ranges: tuple[Prefix, ...] | None = None


class HealthCheck(NamedTuple):
    """A Service with a healthCheckNodePort, and its ready endpoints' addresses on this node."""

    namespace: str
    name: str
    port: int
    local_endpoints: int


def format_address(address: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)


def format_endpoint(address: bytes, port: int) -> str:
    """``10.0.0.1:53`` or ``[fd00::1]:53``."""
    text = format_address(address)
    return f"{text}:{port}" if len(address) == 4 else f"[{text}]:{port}"
