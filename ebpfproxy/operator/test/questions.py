"""Which client asks what, and which answer is right: pure, from what exists in the cluster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from ebpfproxy.operator.api import Object
from ebpfproxy.operator.test import objects
from ebpfproxy.operator.test.site import Node

#: How many nodes and their servers each client asks: its own first, then those that follow. So the number of
#: questions grows with that of nodes, not with its square.
RING = 8

DIRECT, CLUSTER_IP, NODE_PORT = "headless, direct", "ClusterIP", "NodePort"
AFFINITY, HAIRPIN = "session affinity", "hairpin"
INTERNAL, EXTERNAL = "internalTrafficPolicy Local", "externalTrafficPolicy Local"


class Server(msgspec.Struct, frozen=True):
    name: str
    node: str
    addresses: tuple[str, ...]


class Service(msgspec.Struct, frozen=True):
    """``node_ports`` by protocol."""

    name: str
    addresses: tuple[str, ...]
    node_ports: Mapping[str, int]


class Client(msgspec.Struct, frozen=True):
    """A pod that asks; ``role`` as in ``objects``."""

    name: str
    role: str
    node: Node


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """``by``: the servers that may answer (None: any), ``decided_on``: the node whose agent selects one."""

    check: str
    service: str
    protocol: str
    address: str
    port: int
    decided_on: str
    by: tuple[str, ...] | None = None
    same: bool = False
    sources: tuple[str, ...] | None = None

    @property
    def family(self) -> str:
        return family(self.address)


class Cluster(msgspec.Struct, frozen=True):
    """What exists. ``first`` is the name of the node that has all servers of the Service ``one``."""

    nodes: tuple[Node, ...]
    servers: tuple[Server, ...]
    services: Mapping[str, Service]
    first: str

    def on(self, node: str) -> tuple[str, ...]:
        return tuple(server.name for server in self.servers if server.node == node)

    def protocols(self, *names: str) -> Iterator[tuple[Service, str]]:
        """Yields a Service with each protocol; without SCTP where no server has it."""
        for name, protocol in zip(names, ("TCP", "UDP", "SCTP"), strict=False):
            if name in self.services:
                yield self.services[name], protocol


def family(address: str) -> str:
    return "IPv6" if ":" in address else "IPv4"


def of_client(client: Client, cluster: Cluster) -> list[Question]:
    """All questions of a client on a node, in a pod's network or the node's own."""
    return [
        *_direct(client, cluster),
        *_cluster_ips(client, cluster),
        *_node_ports(client, cluster),
        *_local_inside(client, cluster),
        *_local_outside(client, cluster),
    ]


def hairpin(local: Service, name: str, node: Node, alone: bool) -> list[Question]:
    """A server asks the Service whose endpoints on its node are it alone, if ``alone``."""
    return [
        Question(
            check=HAIRPIN,
            service=local.name,
            protocol=protocol,
            address=address,
            port=objects.PORT,
            decided_on=node.name,
            by=(name,) if alone else None,
        )
        for address in local.addresses
        for protocol in ("TCP", "UDP")
    ]


def _direct(client: Client, cluster: Cluster) -> Iterator[Question]:
    """Endpoints of a headless Service are asked by their own addresses, which nothing may translate."""
    names = [node.name for node in _ring(cluster.nodes, client.node)]
    for server in (each for each in cluster.servers if each.node in names):
        for address in server.addresses:
            yield Question(
                check=DIRECT,
                service=objects.HEADLESS,
                protocol="TCP",
                address=address,
                port=objects.TARGET_PORT,
                decided_on=client.node.name,
                by=(server.name,),
                # Networks of pods may masquerade a node's own processes.
                sources=() if client.role == objects.CLIENT else None,
            )


def _of_any_server(client: Client, cluster: Cluster) -> Iterator[tuple[Service, str]]:
    names = [objects.ANY, objects.ANY]
    # A node's own socket of SCTP names all the node's addresses to the server, which leads past the Service.
    if client.role == objects.CLIENT:
        names.append(objects.OVER_SCTP)
    return cluster.protocols(*names)


def _cluster_ips(client: Client, cluster: Cluster) -> Iterator[Question]:
    for service, protocol in _of_any_server(client, cluster):
        yield from at_cluster_ips(CLUSTER_IP, client.node, service, protocol)
    yield from at_cluster_ips(AFFINITY, client.node, cluster.services[objects.STICKY], "TCP", same=True)


def at_cluster_ips(
    check: str,
    node: Node,
    service: Service,
    protocol: str,
    *,
    by: tuple[str, ...] | None = None,
    same: bool = False,
) -> Iterator[Question]:
    for address in service.addresses:
        yield Question(
            check=check,
            service=service.name,
            protocol=protocol,
            address=address,
            port=objects.PORT,
            decided_on=node.name,
            by=by,
            same=same,
        )


def _node_ports(client: Client, cluster: Cluster) -> Iterator[Question]:
    for service, protocol in _of_any_server(client, cluster):
        for node in _ring(cluster.nodes, client.node):
            yield from _at_node_ports(NODE_PORT, service, protocol, node)


def _at_node_ports(
    check: str,
    service: Service,
    protocol: str,
    node: Node,
    *,
    by: tuple[str, ...] | None = None,
    sources: tuple[str, ...] | None = None,
) -> Iterator[Question]:
    families = set(map(family, service.addresses))
    for address in node.node_ports:
        if family(address) in families:
            yield Question(
                check=check,
                service=service.name,
                protocol=protocol,
                address=address,
                port=service.node_ports[protocol],
                decided_on=node.name,
                by=by,
                sources=sources,
            )


def _local_inside(client: Client, cluster: Cluster) -> Iterator[Question]:
    """Only servers of the client's node answer; if it has none, nobody does."""
    here = client.node.name
    for service, protocol in cluster.protocols(objects.LOCAL, objects.LOCAL):
        yield from at_cluster_ips(INTERNAL, client.node, service, protocol, by=cluster.on(here))
    by = cluster.on(here) if here == cluster.first else ()
    yield from at_cluster_ips(INTERNAL, client.node, cluster.services[objects.ONE], "TCP", by=by)


def _local_outside(client: Client, cluster: Cluster) -> Iterator[Question]:
    """From other nodes only servers of the asked node answer, and see the client's address, or its node's
    where the pod network masquerades; a client's own node answers with any server (KEP-2086)."""
    for node in _ring(cluster.nodes, client.node):
        is_own = node == client.node
        sources = None if is_own else client.node.addresses
        for service, protocol in cluster.protocols(objects.LOCAL, objects.LOCAL):
            by = None if is_own else cluster.on(node.name)
            kept = sources if protocol == "TCP" else None
            yield from _at_node_ports(EXTERNAL, service, protocol, node, by=by, sources=kept)
        by = cluster.on(cluster.first) if is_own or node.name == cluster.first else ()
        one = cluster.services[objects.ONE]
        yield from _at_node_ports(EXTERNAL, one, "TCP", node, by=by, sources=sources)


def _ring(nodes: Sequence[Node], first: Node) -> list[Node]:
    at = nodes.index(first)
    return [*nodes[at:], *nodes[:at]][:RING]


def plain(asked: Iterable[Question]) -> list[Object]:
    """As the module ``pod`` reads them."""
    return [
        {
            "id": number,
            "protocol": each.protocol,
            "address": each.address,
            "port": each.port,
            "by": each.by,
            "same": each.same,
            "sources": each.sources,
        }
        for number, each in enumerate(asked)
    ]


def endpoint(question: Question) -> str:
    """The address and port that is asked, as one writes it."""
    host = f"[{question.address}]" if ":" in question.address else question.address
    return f"{host}:{question.port}"


def expected(question: Question) -> str:
    """The right answer in words."""
    if question.by is None:
        return "the same server each time" if question.same else "an answer"
    if not question.by:
        return "no answer, as no server is on the node"
    names = " or ".join(question.by)
    kept = " that sees the client's address" if question.sources is not None else ""
    return f"an answer of {names}{kept}"
