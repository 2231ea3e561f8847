"""Packet programs that create no flow any more (``migrate rollback``): packets that they pass to kube-proxy's rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from scapy.layers.inet import TCP

from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.node.packets import begin_nothing
from tests.packets.packet_cluster import FamilyAddresses
from tests.packets.test_flows import PAYLOAD, ends_of
from tests.packets.test_tcp_close import BACKEND_NEXT, CLIENT_ISN, CLIENT_NEXT, Connection
from tests.packets.wire import PASS, Result, Wire

pytestmark = pytest.mark.root


@pytest.fixture
def connection(wire: Wire, family: FamilyAddresses, port: int, tables: MapSet) -> Connection:
    return Connection(wire, family, port, tables).establish()


@pytest.fixture
def stop_new_flows(tables: MapSet) -> Iterator[Callable[[], None]]:
    node = tables["devices"].lookup(U32.pack(0))
    assert node is not None
    yield lambda: begin_nothing(tables)
    tables["devices"].update(U32.pack(0), node)


def _close(connection: Connection) -> None:
    connection.original("FA", CLIENT_NEXT, BACKEND_NEXT)
    connection.reply("FA", BACKEND_NEXT, CLIENT_NEXT + 1)


def _last_ack(connection: Connection) -> None:
    connection.original("A", CLIENT_NEXT + 1, BACKEND_NEXT + 1)


def _assert_not_translated(connection: Connection, tcp: TCP, source: str) -> None:
    family = connection.family
    result = connection.wire.ingress(family.ip(source, family.node) / tcp)
    assert result.verdict == PASS
    assert ends_of(result.packet) == (source, tcp.sport, family.node, tcp.dport)


def test_every_packet_of_a_connection_from_a_reused_client_port_is_not_translated(
    connection: Connection, stop_new_flows: Callable[[], None]
) -> None:
    """Else the SYN goes to kube-proxy's backend and the ACK, by the closed flow's entry, to the former one: it resets."""
    _close(connection)
    stop_new_flows()
    _last_ack(connection)
    for flags, seq, ack in (("S", 7000, 0), ("A", 7001, 9001), ("PA", 7001, 9001)):
        tcp = TCP(sport=connection.port, dport=30080, flags=flags, seq=seq, ack=ack) / PAYLOAD
        _assert_not_translated(connection, tcp, connection.family.client)


def test_every_packet_from_a_backend_to_a_reused_masquerade_port_is_not_translated(
    connection: Connection, stop_new_flows: Callable[[], None]
) -> None:
    """kube-proxy may choose the port of a closed flow; the SYN-ACK is the first of its packets to meet the entry."""
    _close(connection)
    stop_new_flows()
    _last_ack(connection)
    for flags, seq, ack in (("SA", 9000, 7001), ("A", 9001, 7002), ("PA", 9001, 7002)):
        tcp = TCP(sport=8080, dport=connection.snat_port, flags=flags, seq=seq, ack=ack) / PAYLOAD
        _assert_not_translated(connection, tcp, connection.family.remote_pod)


def test_open_connection_and_its_retransmissions_are_still_translated(
    connection: Connection, stop_new_flows: Callable[[], None]
) -> None:
    stop_new_flows()
    connection.reply("SA", 0xFFFFFFFC, CLIENT_ISN + 1)
    connection.original("S", CLIENT_ISN)
    connection.original("PA", CLIENT_NEXT, BACKEND_NEXT, PAYLOAD)
    connection.reply("A", BACKEND_NEXT, CLIENT_NEXT + len(PAYLOAD))
    assert connection.states == ("ESTABLISHED", 4)


def test_deleting_a_closed_flow_keeps_the_reply_entry_of_a_later_one(
    wire: Wire, family: FamilyAddresses, port: int, stop_new_flows: Callable[[], None]
) -> None:
    """The later flow of the same client and backend, through another frontend, has taken the key of the reply entry."""

    def original(address: str, service_port: int, flags: str, seq: int, ack: int = 0) -> Result:
        tcp = TCP(sport=port, dport=service_port, flags=flags, seq=seq, ack=ack)
        return wire.ingress(family.ip(family.client, address) / tcp)

    def reply(flags: str, seq: int, ack: int) -> tuple[str, int, str, int]:
        tcp = TCP(sport=8080, dport=port, flags=flags, seq=seq, ack=ack)
        return ends_of(wire.egress(family.ip(family.local_pod, family.client) / tcp, iif="p1").packet)

    original(family.node, 30200, "S", 100)
    assert reply("RA", 0, 101) == (family.node, 30200, family.client, port)
    original(family.local_balancer, 80, "S", 5000)
    assert reply("SA", 9000, 5001) == (family.local_balancer, 80, family.client, port)
    stop_new_flows()
    left = original(family.node, 30200, "S", 200)
    assert ends_of(left.packet) == (family.client, port, family.node, 30200)
    assert reply("A", 9001, 5001) == (family.local_balancer, 80, family.client, port)
