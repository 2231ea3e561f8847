"""Direct server return where a client's packets come in, packet by packet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from scapy.compat import raw
from scapy.layers.inet import IP, UDP, IPOption_NOP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment
from scapy.packet import Packet, Raw

from ebpfproxy.datapath.abi.flow_layout import Seen
from ebpfproxy.datapath.abi.layout import U32, U64
from ebpfproxy.datapath.flows.conntrack_table import Timeouts
from ebpfproxy.datapath.flows.sweeper import Sweeper
from ebpfproxy.datapath.kernel.maps import MapSet
from tests.packets.dsr_packets import (
    HERE,
    NODE_B_MAC,
    NS,
    PROTOCOLS,
    DsrRequest,
    aged,
    dsr_cluster,
    entry_of,
    key,
    option,
    option_in,
    too_big,
    transport,
    without_option,
)
from tests.packets.packet_cluster import PORTS, FamilyAddresses, PacketCluster
from tests.packets.wire import (
    PASS,
    REDIRECT,
    XDP_PASS,
    XDP_REDIRECT,
    XDP_TX,
    Result,
    Wire,
    ip_of,
    with_right_checksums,
)

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def cluster() -> Iterator[PacketCluster]:
    with dsr_cluster() as made:
        yield made


@pytest.fixture(params=PROTOCOLS)
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Request:
    """A flow of a client outside to a Service with its backend on node-b."""

    def __init__(self, wire: Wire, family: FamilyAddresses, protocol: str, port: int) -> None:
        self.wire, self.family, self.protocol, self.port = wire, family, protocol, port
        self.frontend_port, _, self.target = PORTS[protocol]

    def packet(self, flags: str = "S", payload: bytes = b"", **fields: Any) -> Packet:
        inner = transport(self.protocol, self.port, self.frontend_port, flags, **fields)
        return self.family.ip(self.family.client, self.family.web_balancer) / inner / Raw(payload)

    def send(self, flags: str = "S", payload: bytes = b"", **fields: Any) -> Result:
        return self.wire.ingress(self.packet(flags, payload, **fields))

    @property
    def key(self) -> bytes:
        return key(self.family.client, self.family.web_balancer, self.port, self.frontend_port, self.protocol)

    @property
    def reply_key(self) -> bytes:
        return key(self.family.remote_pod, self.family.client, self.target, self.port, self.protocol)

    @property
    def option(self) -> bytes:
        return option(self.family, self.family.web_balancer, self.frontend_port)

    def assert_forwarded(self, result: Result) -> None:
        """The packet has the client's address and the backend's, right checksums, and one hop less."""
        assert result.verdict == REDIRECT
        ip = without_option(result.packet)
        assert (ip.src, ip.dst) == (self.family.client, self.family.remote_pod)
        assert (ip.payload.sport, ip.payload.dport) == (self.port, self.target)
        assert (ip.ttl if ip.version == 4 else ip.hlim) == 63
        sent = ip_of(result.packet)
        if sent.version == 4:
            assert sent.len == len(raw(sent)) and with_right_checksums(sent) == raw(sent)
        else:
            assert sent.plen == len(raw(sent)) - 40
        assert with_right_checksums(ip) == raw(ip)


@pytest.fixture
def request_of(wire: Wire, family: FamilyAddresses, protocol: str, port: int) -> Request:
    return Request(wire, family, protocol, port)


def test_first_packet_keeps_the_client_and_carries_the_frontend(request_of: Request) -> None:
    for payload in (b"", b"odd", b"0123456789abcdef"):
        result = request_of.send(payload=payload)
        request_of.assert_forwarded(result)
        assert option_in(result.packet) == request_of.option


def test_node_port_is_sent_with_the_address_that_was_asked(
    wire: Wire, family: FamilyAddresses, protocol: str, port: int
) -> None:
    _, node_port, _ = PORTS[protocol]
    packet = family.ip(family.client, family.node) / transport(protocol, port, node_port)
    assert option_in(wire.ingress(packet).packet) == option(family, family.node, node_port)


def test_segments_after_the_handshake_are_translated_and_have_no_option(
    wire: Wire, family: FamilyAddresses, port: int
) -> None:
    flow = Request(wire, family, "TCP", port)
    assert option_in(flow.send("S", seq=100).packet)
    assert option_in(flow.send("S", seq=100).packet), "a SYN that is sent again"
    for flags, payload in (("A", b""), ("PA", b"data"), ("FA", b"")):
        result = flow.send(flags, payload, seq=101, ack=500)
        flow.assert_forwarded(result)
        assert not option_in(result.packet)


def test_datagrams_have_it_for_a_second_and_then_once_a_second(
    wire: Wire, family: FamilyAddresses, port: int, tables: MapSet
) -> None:
    flow = Request(wire, family, "UDP", port)
    for _ in range(2):
        result = flow.send(payload=b"x")
        flow.assert_forwarded(result)
        assert option_in(result.packet) == flow.option
    aged(tables, flow.key, 1.5)
    for expected in (flow.option, b""):
        result = flow.send(payload=b"x")
        flow.assert_forwarded(result)
        assert option_in(result.packet) == expected


def test_cluster_ip_is_masqueraded(wire: Wire, family: FamilyAddresses, protocol: str, port: int) -> None:
    packet = family.ip(family.client, family.web) / transport(protocol, port, PORTS[protocol][0])
    result = wire.ingress(packet)
    at_egress = wire.egress(ip_of(result.packet), iif="eth0") if result.verdict == PASS else result
    assert (ip_of(at_egress.packet).src, option_in(at_egress.packet)) == (family.node, b"")


def _masqueraded_as(wire: Wire, packet: Packet) -> tuple[str, bytes]:
    result = wire.ingress(packet)
    if result.verdict == PASS:
        result = wire.egress(ip_of(result.packet), iif="eth0")
    return ip_of(result.packet).src, option_in(result.packet)


def test_first_packets_without_room_for_the_option_are_masqueraded(
    wire: Wire, family: FamilyAddresses, new_port: Callable[[], int]
) -> None:
    """A large datagram, a fragment, and headers between IP's and the datagram's. The next flow is not."""
    size = 8 if family.version == 4 else 24
    header = 28 if family.version == 4 else 48
    flow = Request(wire, family, "UDP", new_port())
    assert _masqueraded_as(wire, flow.packet(payload=bytes(1500 - header - size + 1))) == (family.node, b"")
    flow = Request(wire, family, "UDP", new_port())
    assert _masqueraded_as(wire, flow.packet(payload=bytes(1500 - header - size)))[0] == family.client
    flow = Request(wire, family, "UDP", new_port())
    ip = ip_of(flow.packet(payload=bytes(64)))
    if family.version == 4:
        unusual = [
            IP(src=ip.src, dst=ip.dst, flags="MF") / ip.payload,
            IP(src=ip.src, dst=ip.dst, options=[IPOption_NOP()] * 4) / ip.payload,
        ]
    else:
        unusual = [
            IPv6(src=ip.src, dst=ip.dst) / IPv6ExtHdrFragment(m=1, id=7) / ip.payload,
            IPv6(src=ip.src, dst=ip.dst) / IPv6ExtHdrDestOpt() / ip.payload,
        ]
    for packet in unusual:
        packet[UDP].sport = new_port()
        assert wire.ingress(packet).verdict == PASS, "to be masqueraded at egress"


def test_a_large_datagram_of_a_flow_goes_without_the_option(
    wire: Wire, family: FamilyAddresses, port: int
) -> None:
    flow = Request(wire, family, "UDP", port)
    assert option_in(flow.send(payload=b"x").packet)
    result = flow.send(payload=bytes(1500 - (28 if family.version == 4 else 48)))
    flow.assert_forwarded(result)
    assert not option_in(result.packet)


def test_client_that_is_the_backends_node_is_masqueraded(
    wire: Wire, family: FamilyAddresses, protocol: str, port: int
) -> None:
    """That node drops what comes in with its own address."""
    inner = transport(protocol, port, PORTS[protocol][0])
    packet = family.ip(family.node_b, family.web_balancer) / inner
    assert _masqueraded_as(wire, packet) == (family.node, b"")


def test_second_frontend_with_the_same_backend_and_port_is_masqueraded(
    wire: Wire, family: FamilyAddresses, protocol: str, port: int
) -> None:
    """Its backend's node could not tell the two flows apart."""
    first = Request(wire, family, protocol, port)
    assert option_in(first.send().packet)
    packet = family.ip(family.client, family.web_external) / transport(protocol, port, first.frontend_port)
    assert _masqueraded_as(wire, packet) == (family.node, b"")
    assert option_in(first.send().packet) == first.option


@pytest.mark.parametrize("flags", ["FA", "R"])
def test_frontend_with_the_same_backend_is_masqueraded_after_a_connection_that_was_not_reset(
    wire: Wire, family: FamilyAddresses, port: int, flags: str
) -> None:
    """The client's port stays with DSR, and the backend may be in TIME_WAIT."""
    first = Request(wire, family, "TCP", port)
    for each in ("S", "A", flags):
        assert first.send(each, seq=1000 + (each != "S"), ack=7000).verdict == REDIRECT
    packet = family.ip(family.client, family.web_external) / transport("TCP", port, first.frontend_port)
    source, sent = _masqueraded_as(wire, packet)
    assert (source, bool(sent)) == ((family.client, True) if flags == "R" else (family.node, False))


def test_backend_on_this_node_sees_the_client(
    wire: Wire, family: FamilyAddresses, protocol: str, port: int
) -> None:
    frontend_port, _, target = PORTS[protocol]
    packet = family.ip(family.client, HERE[family.version]) / transport(protocol, port, frontend_port)
    result = wire.ingress(packet)
    ip = ip_of(result.packet)
    assert (result.verdict, ip.src, ip.dst, ip.payload.dport) == (
        PASS,
        family.client,
        family.local_pod,
        target,
    )
    at_pod = wire.egress(ip, "p1", iif="eth0")
    assert (at_pod.verdict, at_pod.bytes[14:]) == (PASS, result.bytes[14:])
    reply = family.ip(family.local_pod, family.client) / transport(protocol, target, port, "SA")
    answered = ip_of(wire.egress(reply, iif="p1").packet)
    assert (answered.src, answered.payload.sport) == (HERE[family.version], frontend_port)


def test_state_of_a_connection_of_which_one_direction_is_seen(
    wire: Wire, family: FamilyAddresses, port: int, tables: MapSet
) -> None:
    """The client's ACK tells that it is answered, and its FIN that it ends. No other RST or FIN does."""
    flow, first = Request(wire, family, "TCP", port), 1 << 31
    flow.send("S", seq=first)
    seen = []
    for flags, seq, ack in (
        ("R", first + 1 + (1 << 30), 0),
        ("A", first + 1, 7000),
        ("FA", first + 1 - (1 << 30), 7000),
        ("FA", first + 1, 7000),
    ):
        flow.assert_forwarded(flow.send(flags, seq=seq, ack=ack))
        found = entry_of(tables, flow.key)
        assert found is not None
        seen.append(found.seen)
    assert seen == [Seen(0), Seen.REPLY, Seen.REPLY, Seen.REPLY | Seen.FIN | Seen.REPLY_FIN]
    flow.assert_forwarded(flow.send("A", seq=first + 2, ack=7001))
    assert option_in(flow.send("S", seq=900000).packet), "another connection from the same port"
    found = entry_of(tables, flow.key)
    assert found is not None and found.seen == Seen(0)


def test_reset_by_the_client_ends_the_flow(
    wire: Wire, family: FamilyAddresses, port: int, tables: MapSet
) -> None:
    flow = Request(wire, family, "TCP", port)
    flow.send("S", seq=1000)
    flow.send("R", seq=1001)
    found = entry_of(tables, flow.key)
    assert found is not None and found.seen & Seen.RST


def test_flows_end_after_their_time_although_no_reply_was_seen(
    wire: Wire, family: FamilyAddresses, new_port: Callable[[], int], tables: MapSet
) -> None:
    """As flows whose replies pass: those that a client has confirmed, has not, and has closed; and datagrams."""
    idle = {"confirmed": 110, "unconfirmed": 70, "closed": 80, "one datagram": 40, "datagrams": 100}
    flows = {what: Request(wire, family, "UDP" if "datagram" in what else "TCP", new_port()) for what in idle}
    for what, flow in flows.items():
        flow.send("S", seq=1000)
        if what in ("confirmed", "closed"):
            flow.send("A", seq=1001, ack=1)
        if what == "closed":
            flow.send("FA", seq=1001, ack=1)
        aged(tables, flow.key, idle[what], lasted=2 if what in ("datagrams", "confirmed") else 0)
        aged(tables, flow.reply_key, idle[what])
    sweeper = Sweeper(tables, Timeouts(), next(tables.folder.glob("progs-*")))
    try:
        sweeper.sweep()
    finally:
        sweeper.close()
    left = [what for what, flow in flows.items() if entry_of(tables, flow.key) is not None]
    assert left == ["confirmed", "datagrams"]


def test_error_about_a_reply_goes_on_to_the_backend(
    wire: Wire, family: FamilyAddresses, protocol: str, port: int
) -> None:
    """Routers between backend and client send it to the frontend, as the source of the reply.

    It goes on from the hook, as the flow's packets do: netfilter has seen none of them.
    """
    flow = Request(wire, family, protocol, port)
    flow.send()
    reply = family.ip(family.web_balancer, family.client) / transport(
        protocol, flow.frontend_port, port, "SA"
    )
    quoted = Raw(raw(reply)[: 28 if family.version == 4 else 48])
    result = wire.ingress(too_big(family, family.web_balancer, quoted))
    ip = ip_of(result.packet)
    inner = (IP if family.version == 4 else IPv6)(raw(ip.payload)[8:])
    assert (result.verdict, ip.dst) == (REDIRECT, family.remote_pod)
    assert (inner.src, inner.dst) == (family.remote_pod, family.client)


@pytest.fixture
def verified_next_hops(tables: MapSet) -> None:
    """No packet is left to the kernel so that it verifies a next hop."""
    hops = tables["next_hops"]
    in_an_hour = U64.pack(time.monotonic_ns() + 3600 * NS)
    hops.update_many({U32.pack(at): in_an_hour for at in range(hops.spec.max_entries)})


def test_xdp_forwards_what_has_no_option(
    wire: Wire, family: FamilyAddresses, new_port: Callable[[], int], tables: MapSet, verified_next_hops: None
) -> None:
    """The same bytes leave as at tc, where all packets go that get the option."""
    flow = Request(wire, family, "TCP", new_port())
    flow.send("S", seq=1000)
    assert wire.xdp(flow.packet("S", seq=1000)).verdict == XDP_PASS
    datagrams = Request(wire, family, "UDP", new_port())
    datagrams.send(payload=b"x")
    assert wire.xdp(datagrams.packet(payload=b"x")).verdict == XDP_PASS
    aged(tables, datagrams.key, 1.5)
    assert wire.xdp(datagrams.packet(payload=b"x")).verdict == XDP_PASS
    assert option_in(datagrams.send(payload=b"x").packet)
    for packet in (flow.packet("A", b"data", seq=1001, ack=1), datagrams.packet(payload=b"x")):
        at_xdp, at_tc = wire.xdp(packet), wire.ingress(packet)
        assert at_xdp.verdict in (XDP_TX, XDP_REDIRECT)
        assert at_xdp.bytes == at_tc.bytes
        assert (at_xdp.packet.dst, option_in(at_xdp.packet)) == (NODE_B_MAC, b"")
    found = entry_of(tables, flow.key)
    assert found is not None and found.seen == Seen.REPLY


def test_packets_that_come_to_the_backends_node_later_keep_their_flow(
    wire: Wire, family: FamilyAddresses, protocol: str, port: int, tables: MapSet
) -> None:
    """Routers may choose another node for a client; meanwhile an endpoint has left the Service."""
    flow = DsrRequest(wire, family, protocol, port)
    wire.ingress(flow.packet(seq=1) if protocol == "TCP" else flow.packet())
    flow.assert_answered(flow.frontend, flow.frontend_port)
    found, epochs = entry_of(tables, flow.keys[0]), tables.shared("epochs")
    assert found is not None
    epoch = epochs.words()[found.service_id]
    epochs.store(found.service_id * U64.size, U64.pack(epoch + 1))
    inner = transport(protocol, port, flow.frontend_port, "A", **({"seq": 2} if protocol == "TCP" else {}))
    result = wire.ingress(family.ip(family.client, flow.frontend) / inner / Raw(b"x"))
    epochs.store(found.service_id * U64.size, U64.pack(epoch))
    assert (result.verdict, ip_of(result.packet).dst) == (PASS, family.local_pod)
    flow.assert_answered(flow.frontend, flow.frontend_port)
