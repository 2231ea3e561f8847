"""Forwarding at XDP, packet by packet. The result is compared with that of the tc programs for the same packet.

Where the kernel does not report the XDP features of a veth (before Linux 6.3), the program is attached in generic mode:
only the verdict differs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.compat import raw
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.layers.sctp import SCTP
from scapy.packet import Packet

from ebpfproxy.datapath.abi.flow_layout import Seen, unpack_nat
from ebpfproxy.datapath.abi.layout import U32, U64
from ebpfproxy.datapath.kernel.maps import MapSet
from tests.lab import Lab
from tests.packets.flow_slots import FlowHops, FlowSlots
from tests.packets.forwarded_flow import PORTS_OF_CLIENTS, SEGMENTS, Flow, tcp
from tests.packets.packet_cluster import PORTS, V4, V6, FamilyAddresses, PacketCluster
from tests.packets.wire import (
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

FORWARDED = (XDP_TX, XDP_REDIRECT)
GATEWAY_MAC, NODE_B_MAC, STRANGE_MAC = "02:00:00:00:00:fe", "02:00:00:00:00:0b", "02:00:00:00:00:77"
#: Clients are behind the gateway, backends behind node-b.
NEIGHBOURS = {
    "172.18.0.254": GATEWAY_MAC,
    "fd00:172:18::fe": GATEWAY_MAC,
    "172.18.0.2": NODE_B_MAC,
    "fd00:172:18::2": NODE_B_MAC,
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[PacketCluster]:
    with Lab(takes_xdp=True) as lab:
        made = PacketCluster(lab, "--xdp", "generic")
        for hop in NEIGHBOURS:
            _set_neighbour(made, hop, "permanent")
        yield made
        made.wire.close()


def _set_neighbour(cluster: PacketCluster, hop: str, state: str) -> None:
    address = ["lladdr", NEIGHBOURS[hop]]
    cluster.node.run(["ip", "neighbour", "replace", hop, *address, "dev", "eth0", "nud", state])


@pytest.fixture(autouse=True)
def verified_next_hops(tables: MapSet) -> None:
    """Until a test says otherwise no packet is left to the kernel so that it verifies a next hop."""
    hops = tables["next_hops"]
    in_an_hour = U64.pack(time.monotonic_ns() + 3600 * 10**9)
    hops.update_many({U32.pack(at): in_an_hour for at in range(hops.spec.max_entries)})


@pytest.fixture(params=SEGMENTS)
def flow(wire: Wire, family: FamilyAddresses, request: pytest.FixtureRequest) -> Flow:
    return Flow(wire, family, request.param)


def as_frame(wire: Wire, packet: Packet) -> Packet:
    return Ether(dst=wire.mac("eth0"), src=GATEWAY_MAC) / packet


def is_left_to_tc(wire: Wire, frame: Packet) -> bool:
    """Returns True if XDP passes the frame to tc unchanged."""
    result = wire.xdp(frame)
    return result.verdict == XDP_PASS and result.bytes == raw(frame)


def assert_forwarded(wire: Wire, packet: Packet, next_hop: str) -> Result:
    """Asserts that XDP rewrites the packet as tc does, and sends it to its next hop."""
    at_tc = wire.ingress(packet)
    assert (at_tc.verdict, at_tc.packet.dst) == (REDIRECT, next_hop)
    result = wire.xdp(packet)
    assert result.verdict in FORWARDED
    assert (result.packet.src, result.packet.dst) == (wire.mac("eth0"), next_hop)
    assert result.bytes == at_tc.bytes
    return result


def test_request_and_response_are_translated_and_sent_to_their_next_hops(
    wire: Wire, family: FamilyAddresses, flow: Flow
) -> None:
    request = assert_forwarded(wire, flow.request(), NODE_B_MAC)
    ip = ip_of(request.packet)
    assert (ip.src, ip.payload.sport) == (family.node, flow.seen_as)
    assert (ip.dst, ip.payload.dport) == (family.remote_pod, flow.target)
    assert with_right_checksums(request.packet) == request.bytes
    response = assert_forwarded(wire, flow.response(), GATEWAY_MAC)
    ip = ip_of(response.packet)
    assert (ip.src, ip.payload.sport) == (family.node, flow.node_port)
    assert (ip.dst, ip.payload.dport) == (family.client, flow.port)
    assert with_right_checksums(response.packet) == response.bytes
    for result in (request, response):
        assert (ip_of(result.packet).ttl if family.version == 4 else result.packet[IPv6].hlim) == 63


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(data=st.data())
def test_packets_with_any_payload_and_port_are_rewritten_as_at_tc(wire: Wire, data: st.DataObject) -> None:
    """Checksums take all values, among them those that must not become 0 and those that must stay 0."""
    family = data.draw(st.sampled_from([V4, V6]))
    protocol = data.draw(st.sampled_from(sorted(SEGMENTS)))
    flow = Flow(wire, family, protocol)
    for _ in range(8):
        payload = data.draw(st.binary(max_size=1400))
        packet = family.ip(family.client, family.node) / flow.segment(flow.port, flow.node_port, "A", payload)
        if protocol == "UDP":
            packet[UDP].chksum = data.draw(st.sampled_from([None, 0] if family.version == 4 else [None]))
        assert_forwarded(wire, packet, NODE_B_MAC)


def test_incorrect_checksum_stays_incorrect(wire: Wire, flow: Flow) -> None:
    packet = flow.request()
    right = with_right_checksums(packet)
    packet = packet.__class__(right)
    ip_of(packet).payload.chksum ^= 0x1234
    result = assert_forwarded(wire, packet, NODE_B_MAC)
    assert with_right_checksums(result.packet) != result.bytes


def test_short_frame_keeps_its_padding(wire: Wire, flow: Flow) -> None:
    packet = flow.request("A", b"")
    padded = Ether(raw(as_frame(wire, packet)) + b"\0" * 6)
    result = wire.xdp(padded)
    assert result.verdict in FORWARDED
    assert len(result.bytes) == len(raw(padded))


def test_packets_with_unusual_headers_are_left_to_tc(wire: Wire, family: FamilyAddresses, flow: Flow) -> None:
    usual = as_frame(wire, flow.request())
    assert wire.xdp(usual).verdict in FORWARDED
    ip, payload = ip_of(usual), bytes(ip_of(usual).payload)
    few = family.ip(ip.src, ip.dst, **{"ttl" if family.version == 4 else "hlim": 1}) / ip.payload
    assert is_left_to_tc(wire, as_frame(wire, few)), "hops"
    assert is_left_to_tc(wire, Ether(dst=STRANGE_MAC, src=GATEWAY_MAC) / ip), "another link address"
    assert is_left_to_tc(wire, Ether(dst=wire.mac("eth0")) / Dot1Q(vlan=7) / ip), "a VLAN"
    assert is_left_to_tc(wire, Ether(raw(usual)[:-1])), "a truncated frame"
    assert is_left_to_tc(wire, Ether(raw(usual)[: len(raw(usual)) - len(payload) + 5])), "a truncated header"
    if family.version == 4:
        unusual = [
            IP(src=ip.src, dst=ip.dst, options=[IPOption_NOP()] * 4) / ip.payload,
            IP(src=ip.src, dst=ip.dst, flags="MF") / ip.payload,
            IP(src=ip.src, dst=ip.dst, frag=3) / ip.payload,
        ]
    else:
        unusual = [
            IPv6(src=ip.src, dst=ip.dst) / IPv6ExtHdrDestOpt() / ip.payload,
            IPv6(src=ip.src, dst=ip.dst) / IPv6ExtHdrFragment(m=1) / ip.payload,
        ]
    for packet in unusual:
        assert is_left_to_tc(wire, as_frame(wire, packet)), packet.summary()


def test_packets_with_a_partial_checksum_are_left_to_tc(
    wire: Wire, family: FamilyAddresses, flow: Flow
) -> None:
    """A virtual device leaves the sum of the pseudo-header in the checksum field (CHECKSUM_PARTIAL)."""
    packet = flow.request()
    checked = packet.__class__(with_right_checksums(packet))
    header = bytes(ip_of(checked).payload)
    sum_of_segment = _fold(sum(header[i] << 8 | header[i + 1] for i in range(0, len(header) & ~1, 2)))
    if len(header) & 1:
        sum_of_segment = _fold(sum_of_segment + (header[-1] << 8))
    # The sums of pseudo-header and segment are 0xFFFF together.
    ip_of(checked).payload.chksum = 0xFFFF - sum_of_segment
    assert is_left_to_tc(wire, as_frame(wire, checked))


def _fold(total: int) -> int:
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def test_packets_that_belong_to_no_forwarded_flow_are_left_to_tc(
    wire: Wire, family: FamilyAddresses, flow: Flow
) -> None:
    other = next(PORTS_OF_CLIENTS)
    service_port, _, target = PORTS["TCP"]
    to_local = family.ip(family.client, family.local_balancer) / tcp(other, service_port, "S", b"")
    wire.ingress(to_local)
    for packet in (
        family.ip(family.client, family.node) / tcp(next(PORTS_OF_CLIENTS), PORTS["TCP"][1], "S", b""),
        to_local,
        family.ip(family.client, family.local_balancer) / tcp(other, service_port, "A", b""),
        family.ip(family.client, family.remote_pod) / tcp(other, target, "A", b""),
        family.ip(family.client, family.node) / ICMP(),
        family.ip(family.client, family.node) / SCTP(sport=1, dport=PORTS["SCTP"][1]),
    ):
        assert is_left_to_tc(wire, as_frame(wire, packet)), packet.summary()
    assert is_left_to_tc(wire, Ether(dst=wire.mac("eth0"), src=GATEWAY_MAC) / ARP())


def test_packets_to_a_next_hop_without_a_link_address_are_left_to_tc(
    cluster: PacketCluster, wire: Wire, family: FamilyAddresses, flow: Flow
) -> None:
    hop = "172.18.0.2" if family.version == 4 else "fd00:172:18::2"
    cluster.node.run(["ip", "neighbour", "delete", hop, "dev", "eth0"])
    try:
        assert is_left_to_tc(wire, as_frame(wire, flow.request()))
        assert wire.ingress(flow.request()).verdict == REDIRECT
    finally:
        _set_neighbour(cluster, hop, "permanent")
    assert_forwarded(wire, flow.request(), NODE_B_MAC)


def test_packets_larger_than_the_mtu_of_the_route_are_left_to_tc(
    cluster: PacketCluster, wire: Wire, family: FamilyAddresses, flow: Flow
) -> None:
    network = (
        ("10.244.2.0/24", "172.18.0.2") if family.version == 4 else ("fd00:10:244:2::/64", "fd00:172:18::2")
    )
    change = ["ip", "route", "change", network[0], "via", network[1], "dev", "eth0"]
    cluster.node.run([*change, "mtu", "lock", "1300"])
    try:
        assert is_left_to_tc(wire, as_frame(wire, flow.request(payload=b"x" * 1301)))
        assert_forwarded(wire, flow.request(payload=b"x" * 1000), NODE_B_MAC)
    finally:
        cluster.node.run(change)


def test_connection_that_closes_at_xdp_is_closed_at_tc(wire: Wire, family: FamilyAddresses) -> None:
    """A SYN from the same port is left to tc, where it creates another flow."""
    flow = Flow(wire, family, "TCP")
    to, back = family.ip(family.client, family.node), family.ip(family.remote_pod, family.node)

    def sent(flags: str, seq: int, ack: int) -> Packet:
        return to / TCP(sport=flow.port, dport=flow.node_port, flags=flags, seq=seq, ack=ack)

    def answered(flags: str, seq: int, ack: int) -> Packet:
        return back / TCP(sport=flow.target, dport=flow.seen_as, flags=flags, seq=seq, ack=ack)

    for packet in (
        sent("S", 1000, 0),
        answered("SA", 2000, 1001),
        sent("A", 1001, 2001),
        sent("FA", 1001, 2001),
        answered("FA", 2001, 1002),
        sent("A", 1002, 2002),
    ):
        assert wire.xdp(packet).verdict in FORWARDED
    again = sent("S", 5000, 0)
    assert is_left_to_tc(wire, as_frame(wire, again))
    assert wire.ingress(again).verdict == REDIRECT
    assert wire.xdp(again).verdict in FORWARDED


def test_kernel_gets_a_packet_to_each_next_hop_at_intervals(
    wire: Wire, family: FamilyAddresses, tables: MapSet
) -> None:
    """Otherwise no neighbour discovery would verify its link address."""
    flow = Flow(wire, family, "UDP")
    assert_forwarded(wire, flow.request(), NODE_B_MAC)
    long_ago = {key: U64.pack(1) for key, value in tables["next_hops"].items() if value != bytes(8)}
    tables["next_hops"].update_many(long_ago)
    assert is_left_to_tc(wire, as_frame(wire, flow.request()))
    at_tc = wire.ingress(as_frame(wire, flow.request()))
    # The kernel writes the link addresses after the program.
    assert (at_tc.verdict, at_tc.packet.dst) == (REDIRECT, wire.mac("eth0"))
    assert_forwarded(wire, flow.request(), NODE_B_MAC)


def cached(wire: Wire, tables: MapSet, flow: Flow) -> FlowHops:
    """Where a flow's packets are sent is known, and good for an hour."""
    slots = FlowSlots(tables)
    hops = FlowHops(tables, slots)
    assert wire.xdp(flow.response()).verdict in FORWARDED

    def send() -> None:
        for packet in (flow.request(), flow.response()):
            assert wire.xdp(packet).verdict in FORWARDED

    slots.admit_by(flow.keys, send)
    for key in flow.keys:
        hops.keep(key)
    return hops


def test_packets_of_a_flow_that_has_lasted_are_forwarded_by_the_flow_cache(
    wire: Wire, flow: Flow, tables: MapSet
) -> None:
    packets = flow.request("PA"), flow.response("PA")
    before = [wire.xdp(packet) for packet in packets]
    cached(wire, tables, flow)
    for key in flow.keys:
        tables["conntrack"].delete(key)
    after = [wire.xdp(packet) for packet in packets]
    assert after == before
    assert before[0].verdict in FORWARDED
    for result in after:
        assert with_right_checksums(result.packet) == result.bytes


def test_packets_go_to_another_next_hop_a_moment_after_it_has_changed(
    wire: Wire, family: FamilyAddresses, flow: Flow, tables: MapSet, cluster: PacketCluster
) -> None:
    hops = cached(wire, tables, flow)
    hop = family.node_b
    try:
        cluster.node.run(
            ["ip", "neighbour", "replace", hop, "lladdr", STRANGE_MAC, "dev", "eth0", "nud", "permanent"]
        )
        assert wire.xdp(flow.request()).packet.dst == NODE_B_MAC
        hops.keep(flow.keys[0], seconds=-1)
        assert wire.xdp(flow.request()).packet.dst == STRANGE_MAC
    finally:
        _set_neighbour(cluster, hop, "permanent")


def test_unusual_packets_of_a_cached_flow_are_left_to_tc(wire: Wire, flow: Flow, tables: MapSet) -> None:
    unusual = {
        "too big": as_frame(wire, flow.request(payload=bytes(1480))),
        "to another host": Ether(dst=STRANGE_MAC, src=GATEWAY_MAC) / flow.request(),
        "the last hop": as_frame(wire, flow.request()),
    }
    ip = ip_of(unusual["the last hop"])
    setattr(ip, "ttl" if ip.version == 4 else "hlim", 1)
    for what, frame in unusual.items():
        cached(wire, tables, flow)
        assert is_left_to_tc(wire, frame), what


@pytest.mark.parametrize("seq_off", [0, 1])
def test_rst_of_a_cached_flow_is_compared_with_the_newest_numbers(
    wire: Wire, family: FamilyAddresses, tables: MapSet, seq_off: int
) -> None:
    flow = Flow(wire, family, "TCP")
    for packet in (flow.response("SA"), flow.request("A")):
        assert wire.xdp(packet).verdict in FORWARDED
    cached(wire, tables, flow)
    answer = flow.response(payload=bytes(100))
    answer[TCP].seq = flow.request()[TCP].ack
    acknowledgement = flow.request(payload=b"")
    acknowledgement[TCP].ack = answer[TCP].seq + 100
    reset = flow.response("R", b"")
    reset[TCP].seq = answer[TCP].seq + 100 + seq_off
    for packet in (answer, acknowledgement, reset):
        assert wire.xdp(packet).verdict in FORWARDED
    values = [tables["conntrack"].lookup(key) for key in flow.keys]
    seen = [unpack_nat(value).seen for value in values if value]
    assert [bool(each & Seen.RST) for each in seen] == [not seq_off] * 2
