"""Direct server return at the backend's node, packet by packet."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.compat import raw
from scapy.layers.inet import TCP
from scapy.packet import Raw

from ebpfproxy.datapath.abi.flow_layout import NatFlags, Seen
from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.abi.node_layout import DeviceFlags, PacketEvent, unpack_device
from ebpfproxy.datapath.kernel.maps import MapSet
from tests.lab.waiting import until
from tests.packets.dsr_packets import (
    CLUSTER_IP,
    HERE,
    NODE_PORTS,
    NS,
    PROTOCOLS,
    RANGED,
    DsrRequest,
    aged,
    count,
    dsr_cluster,
    entry_of,
    header_check,
    key,
    option,
    option_in,
    too_big,
    transport,
    with_option,
)
from tests.packets.packet_cluster import PORTS, FamilyAddresses, PacketCluster
from tests.packets.wire import (
    DROP,
    PASS,
    REDIRECT,
    Wire,
    ip_of,
    with_right_checksums,
)

pytestmark = pytest.mark.root

LOOPBACK, MULTICAST = {4: "127.0.0.1", 6: "::1"}, {4: "224.0.0.1", 6: "ff02::1"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[PacketCluster]:
    with dsr_cluster() as made:
        yield made


@pytest.fixture(params=PROTOCOLS)
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def dsr_request(wire: Wire, family: FamilyAddresses, protocol: str, port: int) -> DsrRequest:
    return DsrRequest(wire, family, protocol, port)


def test_option_is_taken_away_and_the_reply_comes_from_the_frontend(dsr_request: DsrRequest) -> None:
    result = dsr_request.wire.ingress(dsr_request.packet())
    assert result.verdict == PASS
    assert raw(ip_of(result.packet)) == with_right_checksums(dsr_request.plain(payload=b"x"))
    dsr_request.assert_answered(dsr_request.frontend, dsr_request.frontend_port)


def test_what_one_node_sends_another_one_takes(
    wire: Wire, family: FamilyAddresses, protocol: str, port: int
) -> None:
    flow, frontend_port = DsrRequest(wire, family, protocol, port), PORTS[protocol][0]
    request = family.ip(family.client, family.web_balancer) / transport(protocol, port, frontend_port)
    content = option_in(wire.ingress(request).packet)
    assert content
    assert wire.ingress(flow.packet(content)).verdict == PASS
    flow.assert_answered(family.web_balancer, frontend_port)


def test_node_port_of_another_node_is_answered_with_its_address(
    wire: Wire, family: FamilyAddresses, protocol: str, port: int
) -> None:
    dsr_request, node_port = DsrRequest(wire, family, protocol, port), NODE_PORTS[protocol]
    assert wire.ingress(dsr_request.packet(option(family, family.node_b, node_port))).verdict == PASS
    dsr_request.assert_answered(family.node_b, node_port)


def test_packets_without_the_option_keep_the_flow_and_are_unchanged(
    dsr_request: DsrRequest, tables: MapSet
) -> None:
    dsr_request.wire.ingress(
        dsr_request.packet(seq=10) if dsr_request.protocol == "TCP" else dsr_request.packet()
    )
    dsr_request.reply()
    for packed in dsr_request.keys:
        aged(tables, packed, 20)
    before = time.monotonic_ns()
    packet = dsr_request.plain(
        "A", b"data", **({"seq": 11, "ack": 1} if dsr_request.protocol == "TCP" else {})
    )
    result = dsr_request.wire.ingress(packet)
    assert (result.verdict, raw(ip_of(result.packet))) == (PASS, with_right_checksums(packet))
    original = entry_of(tables, dsr_request.keys[0])
    assert original is not None and original.last > before - NS
    assert original.flags == NatFlags.DSR_BACKEND
    dsr_request.assert_answered(dsr_request.frontend, dsr_request.frontend_port)


def test_connection_ends_with_both_fins(
    wire: Wire, family: FamilyAddresses, port: int, tables: MapSet
) -> None:
    """Then a direct connection from the same port is one of its own."""
    flow = DsrRequest(wire, family, "TCP", port)
    wire.ingress(flow.packet(seq=99, payload=b""))
    flow.reply("SA", seq=500, ack=100)
    for packet in (flow.plain("A", seq=100, ack=501), flow.plain("FA", seq=100, ack=501)):
        assert wire.ingress(packet).verdict == PASS
    answer = family.ip(family.local_pod, family.client) / transport(
        "TCP", flow.target, port, "FA", seq=501, ack=101
    )
    wire.egress(answer, iif="p1")
    original = entry_of(tables, flow.keys[0])
    assert original is not None and original.seen & Seen.FIN and original.seen & Seen.REPLY_FIN
    later = (
        flow.plain("S", seq=9000),
        flow.plain("A", seq=9001, ack=1),
        flow.plain("PA", b"x", seq=9001, ack=1),
    )
    ports = {ip_of(wire.ingress(packet).packet).payload.sport for packet in later}
    assert len(ports) == 1 and port not in ports
    wire.ingress(flow.packet(seq=20000, payload=b""))
    packet = flow.plain("A", seq=20001, ack=1)
    assert raw(ip_of(wire.ingress(packet).packet)) == with_right_checksums(packet), "inserted again"


def test_masquerade_of_a_former_connection_with_the_backend_is_over(
    wire: Wire, family: FamilyAddresses, port: int
) -> None:
    """It was through a frontend that this node masquerades clients of, and would change what leaves for the pod."""
    flow = DsrRequest(wire, family, "TCP", port)
    frontend, frontend_port = CLUSTER_IP[family.version], flow.frontend_port
    former = [
        family.ip(family.client, frontend) / transport("TCP", port, frontend_port, flags, seq=seq)
        for flags, seq in (("S", 100), ("R", 101))
    ]
    masked = wire.egress(ip_of(wire.ingress(former[0]).packet), "p1", iif="eth0")
    assert ip_of(masked.packet).src != family.client
    wire.ingress(former[1])
    assert wire.ingress(flow.packet(seq=5000, payload=b"")).verdict == PASS
    packet = flow.plain("S", seq=5000)
    assert raw(ip_of(wire.egress(packet, "p1", iif="eth0").packet)) == with_right_checksums(packet)
    flow.assert_answered(flow.frontend, flow.frontend_port)


def test_lost_entry_is_inserted_by_the_next_datagram_with_the_option(
    wire: Wire, family: FamilyAddresses, port: int, tables: MapSet
) -> None:
    flow = DsrRequest(wire, family, "UDP", port)
    for _ in range(2):
        wire.ingress(flow.packet())
        flow.assert_answered(flow.frontend, flow.frontend_port)
        for packed in flow.keys:
            tables["conntrack"].delete(packed)


def test_datagrams_may_come_through_another_frontend_later(
    wire: Wire, family: FamilyAddresses, port: int
) -> None:
    flow = DsrRequest(wire, family, "UDP", port)
    wire.ingress(flow.packet())
    other = option(family, family.node_b, NODE_PORTS["UDP"])
    assert wire.ingress(flow.packet(other)).verdict == PASS
    flow.assert_answered(family.node_b, NODE_PORTS["UDP"])


def test_open_connection_keeps_its_frontend(wire: Wire, family: FamilyAddresses, port: int) -> None:
    """Whoever forges an option, or uses a port twice, does not break it."""
    flow = DsrRequest(wire, family, "TCP", port)
    wire.ingress(flow.packet(seq=1))
    other = option(family, family.node_b, NODE_PORTS["TCP"])
    result = wire.ingress(flow.packet(other, seq=1000))
    assert (result.verdict, option_in(result.packet)) == (PASS, b"")
    flow.assert_answered(flow.frontend, flow.frontend_port)


def test_segment_that_opens_no_connection_inserts_nothing(
    wire: Wire, family: FamilyAddresses, port: int, tables: MapSet
) -> None:
    flow = DsrRequest(wire, family, "TCP", port)
    assert wire.ingress(flow.packet(flags="A", seq=1, ack=1)).verdict == PASS
    assert [entry_of(tables, packed) for packed in flow.keys] == [None, None]


WRONG = (
    "unknown address",
    "unknown port",
    "cluster IP",
    "policy Local",
    "another node's cluster IP port",
    "NodePort of a loopback address",
    "NodePort of a multicast address",
)


@pytest.mark.parametrize("what", WRONG)
def test_frontends_that_no_service_has_outside_are_refused(
    dsr_request: DsrRequest, tables: MapSet, what: str
) -> None:
    family, port = dsr_request.family, dsr_request.frontend_port
    address, number = {
        "unknown address": (family.other_client, port),
        "unknown port": (dsr_request.frontend, 1),
        "cluster IP": (family.web, port),
        "policy Local": (family.local_balancer, port),
        "another node's cluster IP port": (family.node_b, port),
        "NodePort of a loopback address": (LOOPBACK[family.version], NODE_PORTS[dsr_request.protocol]),
        "NodePort of a multicast address": (MULTICAST[family.version], NODE_PORTS[dsr_request.protocol]),
    }[what]
    before = count(tables, PacketEvent.DSR)
    assert dsr_request.wire.ingress(dsr_request.packet(option(family, address, number))).verdict == DROP
    assert count(tables, PacketEvent.DSR) == before + 1
    assert entry_of(tables, dsr_request.keys[1]) is None


def test_option_for_another_port_of_the_pod_is_refused(
    wire: Wire, family: FamilyAddresses, port: int
) -> None:
    content = option(family, HERE[family.version], PORTS["TCP"][0])
    inner = TCP(sport=port, dport=9, flags="S")
    packet = with_option(wire, family, family.local_pod, content, inner)
    assert wire.ingress(packet).verdict == DROP


def test_option_from_a_pod_of_this_node_is_refused(dsr_request: DsrRequest) -> None:
    """Also for another node's pod, and for a flow that is known."""
    family, wire = dsr_request.family, dsr_request.wire
    content = option(family, dsr_request.frontend, dsr_request.frontend_port)
    for to in (family.local_pod, family.remote_pod):
        packet = with_option(wire, family, to, content, dsr_request.inner(), "p2")
        assert wire.ingress(packet, "p2").verdict == DROP
    assert wire.ingress(dsr_request.packet()).verdict == PASS
    assert wire.ingress(dsr_request.packet(device="p2"), "p2").verdict == DROP


def test_option_through_a_tunnel_is_refused(
    cluster: PacketCluster, dsr_request: DsrRequest, tables: MapSet
) -> None:
    """Nodes send none there, but a pod can send to the tunnel's end."""
    wire, node = dsr_request.wire, cluster.node
    node.run(["ip", "link", "add", "vx0", "up", "type", "vxlan", "id", "7", "dstport", "4799", "dev", "eth0"])
    try:
        shown = node.run(["ip", "-o", "link", "show", "vx0"])
        number, mac = int(shown.split(":")[0]), shown.split("link/ether ")[1][:17]
        until(lambda: _is_tunnel(tables, number), "not known as a tunnel")
        wire.devices["vx0"] = number, mac
        before = count(tables, PacketEvent.DSR)
        assert wire.ingress(dsr_request.packet(device="vx0"), "vx0").verdict == DROP
        assert count(tables, PacketEvent.DSR) == before + 1
        assert entry_of(tables, dsr_request.keys[1]) is None
    finally:
        node.run(["ip", "link", "delete", "vx0"])
        until(lambda: not _is_tunnel(tables, number), "still there")


def _is_tunnel(tables: MapSet, number: int) -> bool:
    value = tables["devices"].lookup(U32.pack(number))
    return value is not None and bool(unpack_device(value).flags & DeviceFlags.TUNNEL)


def test_option_that_cannot_be_taken_away_stays(wire: Wire, family: FamilyAddresses, port: int) -> None:
    """The kernel may refuse it for what it has merged of several datagrams. The backend's kernel skips it."""
    flow = DsrRequest(wire, family, "UDP", port)
    packet = flow.packet(payload=bytes(1000))
    result = wire.send_bytes("from_device", "eth0", raw(packet), gso_size=500)
    assert (result.verdict, result.bytes) == (PASS, raw(packet))
    flow.assert_answered(flow.frontend, flow.frontend_port)


def test_option_does_not_bypass_source_ranges(dsr_request: DsrRequest, tables: MapSet) -> None:
    content = option(dsr_request.family, RANGED[dsr_request.family.version], dsr_request.frontend_port)
    before = count(tables, PacketEvent.SOURCE_RANGE)
    assert dsr_request.wire.ingress(dsr_request.packet(content)).verdict == DROP
    assert count(tables, PacketEvent.SOURCE_RANGE) == before + 1


def test_packets_for_other_nodes_pass_with_their_option(
    wire: Wire, family: FamilyAddresses, protocol: str, port: int, tables: MapSet
) -> None:
    """This node may be a router between two others."""
    frontend_port, _, target = PORTS[protocol]
    content = option(family, family.web_balancer, frontend_port)
    packet = with_option(wire, family, family.remote_pod, content, transport(protocol, port, target))
    result = wire.ingress(packet)
    assert (result.verdict, option_in(result.packet)) == (PASS, content)
    reply = key(family.remote_pod, family.client, target, port, protocol, egress=True)
    assert entry_of(tables, reply) is None


def _malformed(family: FamilyAddresses, right: bytes) -> list[bytes]:
    if family.version == 4:
        return [
            right[:1] + b"\7" + right[2:],
            right[:1] + b"\0" + right[2:],
            b"\1\1\1\1" + right,
            right[:4],
            b"\x1a" + right[1:],
        ]
    return [
        right[:1] + b"\x10" + right[2:],
        b"\x1c" + right[1:],
        right[:6],
        b"\1\4" + bytes(4) + right + bytes(2),
    ]


def test_malformed_options_are_none(dsr_request: DsrRequest, tables: MapSet) -> None:
    """Such packets are somebody else's, and pass as they are."""
    right = option(dsr_request.family, dsr_request.frontend, dsr_request.frontend_port)
    for content in _malformed(dsr_request.family, right):
        packet = dsr_request.packet(content)
        result = dsr_request.wire.ingress(packet)
        assert (result.verdict, result.bytes) == (PASS, raw(packet))
        assert entry_of(tables, dsr_request.keys[1]) is None


def test_packet_whose_header_has_no_length_keeps_its_option(dsr_request: DsrRequest, tables: MapSet) -> None:
    """The length of BIG TCP is not in the header. Such packets pass as they are."""
    sent = bytearray(raw(dsr_request.packet()))
    at = 14 + (2 if dsr_request.family.version == 4 else 4)
    sent[at : at + 2] = bytes(2)
    result = dsr_request.wire.send_bytes("from_device", "eth0", bytes(sent))
    assert (result.verdict, result.bytes) == (PASS, bytes(sent))
    assert entry_of(tables, dsr_request.keys[1]) is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(data=st.data())
def test_damaged_headers_are_left_or_stripped_of_a_whole_option(
    wire: Wire, family: FamilyAddresses, data: st.DataObject
) -> None:
    """Whatever the bytes of the headers: what follows them stays, and a right checksum of IPv4 stays right."""
    protocol = data.draw(st.sampled_from(PROTOCOLS))
    size = 8 if family.version == 4 else 24
    flow = DsrRequest(wire, family, protocol, data.draw(st.integers(1024, 65535)))
    sent = bytearray(raw(flow.packet()))
    at_content = 14 + (20 if family.version == 4 else 40)
    for at, value in data.draw(
        st.lists(st.tuples(st.integers(14, at_content + size + 3), st.integers(0, 255)), max_size=3)
    ):
        sent[at] = value
    result = wire.send_bytes("from_device", "eth0", bytes(sent))
    if result.verdict != PASS or len(result.bytes) == len(sent):
        assert result.verdict in (PASS, DROP, REDIRECT)
        return
    assert len(result.bytes) == len(sent) - size
    assert result.bytes[at_content:] == sent[at_content + size :]
    before, after = (
        struct.unpack_from("!H", each, 14 + (2 if family.version == 4 else 4))[0]
        for each in (sent, result.bytes)
    )
    assert before - after == size
    if family.version == 4:
        header, left = (
            bytes(sent[14:][: (sent[14] & 15) * 4]),
            result.bytes[14:][: (result.bytes[14] & 15) * 4],
        )
        assert bool(header_check(header)) == bool(header_check(left))


def test_truncated_packets_with_an_option_pass(dsr_request: DsrRequest, tables: MapSet) -> None:
    whole = raw(dsr_request.packet(payload=b""))
    for size in range(14 + (20 if dsr_request.family.version == 4 else 40), len(whole)):
        result = dsr_request.wire.send_bytes("from_device", "eth0", whole[:size])
        assert (result.verdict, result.bytes[:size]) == (PASS, whole[:size])
    assert entry_of(tables, dsr_request.keys[1]) is None


def test_error_that_another_node_has_sent_on_passes(dsr_request: DsrRequest) -> None:
    dsr_request.wire.ingress(dsr_request.packet())
    quoted = Raw(
        raw(
            dsr_request.family.ip(dsr_request.family.local_pod, dsr_request.family.client)
            / dsr_request.inner()
        )[:48]
    )
    error = too_big(dsr_request.family, dsr_request.family.local_pod, quoted)
    result = dsr_request.wire.ingress(error)
    assert (result.verdict, raw(ip_of(result.packet))) == (PASS, raw(error))
