"""Translation of flows at tc ingress and egress, packet by packet."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from itertools import starmap
from typing import Any

import pytest
from scapy.compat import raw
from scapy.layers.inet import TCP, UDP
from scapy.layers.sctp import SCTP, SCTPChunkData, SCTPChunkInit
from scapy.packet import Packet, Raw

from ebpfproxy.datapath.abi.flow_layout import Entry, NatFlags
from ebpfproxy.datapath.kernel.maps import MapSet
from tests.packets.packet_cluster import PORTS, V6, FamilyAddresses
from tests.packets.wire import PASS, REDIRECT, Result, Wire, ip_of, with_right_checksums

pytestmark = pytest.mark.root

PAYLOAD = b"0123456789abcdef"


@pytest.fixture(params=PORTS)
def protocol(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def segment(protocol: str, sport: int, dport: int, flags: str = "S", payload: bytes = PAYLOAD) -> Packet:
    if protocol == "TCP":
        return TCP(sport=sport, dport=dport, flags=flags, seq=1000, ack=2000) / Raw(payload)
    if protocol == "UDP":
        return UDP(sport=sport, dport=dport) / Raw(payload)
    opening = SCTPChunkInit(init_tag=7) if flags == "S" else b""
    return SCTP(sport=sport, dport=dport, tag=7) / opening / SCTPChunkData(tsn=1, data=payload)


def ends_of(packet: Packet) -> tuple[str, int, str, int]:
    """Source address and port, destination address and port."""
    ip = ip_of(packet)
    return ip.src, ip.payload.sport, ip.dst, ip.payload.dport


def assert_passed(result: Result, *expected: Any) -> Packet:
    """Asserts verdict, addresses and ports, unchanged payload and right checksums; returns the packet."""
    assert result.verdict == PASS
    packet = result.packet
    assert ends_of(packet) == expected
    assert with_right_checksums(packet) == result.bytes
    assert PAYLOAD in result.bytes
    return packet


def masqueraded_port(wire: Wire, family: FamilyAddresses, protocol: str, port: int, node: str) -> int:
    """Runs the first packet of a flow through egress; returns the source port after masquerading."""
    target = PORTS[protocol][2]
    out = wire.egress(
        family.ip(family.client, family.remote_pod) / segment(protocol, port, target), iif="eth0"
    ).packet
    source = ends_of(out)
    assert (source[0], source[2], source[3]) == (node, family.remote_pod, target)
    assert with_right_checksums(out) == raw(out)
    return source[1]


def test_node_port_to_a_remote_backend_is_translated_in_both_directions(
    wire: Wire, family: FamilyAddresses, protocol: str, port: int
) -> None:
    """DNAT to the backend, SNAT to the node's address, and the reverse of both in reply direction."""
    _, node_port, target = PORTS[protocol]
    assert_passed(
        wire.ingress(family.ip(family.client, family.node) / segment(protocol, port, node_port)),
        *(family.client, port, family.remote_pod, target),
    )
    snat_port = masqueraded_port(wire, family, protocol, port, family.node)
    assert_passed(
        wire.ingress(family.ip(family.remote_pod, family.node) / segment(protocol, target, snat_port, "SA")),
        *(family.remote_pod, target, family.client, port),
    )
    assert_passed(
        wire.egress(
            family.ip(family.remote_pod, family.client) / segment(protocol, target, port, "SA"), iif="eth0"
        ),
        *(family.node, node_port, family.client, port),
    )


def test_direct_flow_that_collides_with_a_service_flow_gets_another_source_port(
    wire: Wire, family: FamilyAddresses, protocol: str, port: int, new_port: Callable[[], int]
) -> None:
    """The backend sees two distinct flows, and replies of each have the source that the client sent to."""
    service_port, _, target = PORTS[protocol]
    request = family.ip(family.client, family.local_pod)
    reply = family.ip(family.local_pod, family.client)
    assert_passed(
        wire.ingress(family.ip(family.client, family.local_balancer) / segment(protocol, port, service_port)),
        *(family.client, port, family.local_pod, target),
    )
    out = wire.ingress(request / segment(protocol, port, target))
    other = ends_of(out.packet)[1]
    assert other != port
    for flags in ("S", "A"):
        assert_passed(
            wire.ingress(request / segment(protocol, port, target, flags)),
            *(family.client, other, family.local_pod, target),
        )
    assert_passed(
        wire.egress(reply / segment(protocol, target, other, "SA"), iif="p1"),
        *(family.local_pod, target, family.client, port),
    )
    assert_passed(
        wire.egress(reply / segment(protocol, target, port, "SA"), iif="p1"),
        *(family.local_balancer, service_port, family.client, port),
    )
    # Only the same source port to the target port collides.
    for asked, source in ((target, new_port()), (9000, port)):
        packet = request / segment(protocol, source, asked)
        assert_passed(wire.ingress(packet), family.client, source, family.local_pod, asked)


def test_flow_that_others_masquerade_by_a_port_of_ours_gets_another_one(
    wire: Wire, family: FamilyAddresses, protocol: str, port: int, new_port: Callable[[], int]
) -> None:
    """Netfilter's MASQUERADE takes any port. Replies go to the client of each flow, also if the port is used again."""
    _, node_port, target = PORTS[protocol]
    wire.ingress(family.ip(family.client, family.node) / segment(protocol, port, node_port))
    taken = masqueraded_port(wire, family, protocol, port, family.node)
    to_backend, reply = (
        family.ip(family.node, family.remote_pod),
        family.ip(family.remote_pod, family.node),
    )
    others = set()
    for _ in range(2):
        packet = to_backend / segment(protocol, taken, target)
        other = ends_of(wire.egress(packet, iif="p2").packet)[1]
        others.add(other)
        assert other != taken
        for flags in ("S", "A"):
            assert_passed(
                wire.egress(to_backend / segment(protocol, taken, target, flags), iif="p2"),
                *(family.node, other, family.remote_pod, target),
            )
        assert_passed(
            wire.ingress(reply / segment(protocol, target, other, "SA")),
            *(family.remote_pod, target, family.node, taken),
        )
        assert_passed(
            wire.ingress(reply / segment(protocol, target, taken, "SA")),
            *(family.remote_pod, target, family.client, port),
        )
        if protocol != "TCP":
            break
        reset = TCP(sport=taken, dport=target, flags="R", seq=1001 + len(PAYLOAD))
        wire.egress(to_backend / reset, iif="p2")
    # Where another flow has no such port nothing is changed, nor at a device that leads to this node's pods.
    port = new_port()
    wire.ingress(family.ip(family.client, family.node) / segment(protocol, port, node_port))
    taken = masqueraded_port(wire, family, protocol, port, family.node)
    for device, source in (("eth0", new_port()), ("p1", taken)):
        out = wire.egress(to_backend / segment(protocol, source, target), device, iif="p2")
        assert_passed(out, family.node, source, family.remote_pod, target)


def test_direct_flow_keeps_its_source_port_once_the_service_flow_is_deleted(
    wire: Wire, family: FamilyAddresses, port: int, tables: MapSet
) -> None:
    """The client reuses the port after the Service's flow is deleted, which then no longer collides."""
    service_port, _, target = PORTS["TCP"]
    to_pod = family.ip(family.client, family.local_pod)
    wire.ingress(family.ip(family.client, family.local_balancer) / segment("TCP", port, service_port))
    other = ends_of(wire.ingress(to_pod / segment("TCP", port, target)).packet)[1]
    assert other != port
    reset = to_pod / TCP(sport=port, dport=target, flags="R", seq=1001 + len(PAYLOAD))
    assert ends_of(wire.ingress(reset).packet)[1] == other
    # The sweeper deletes the Service's flow first.
    client = ipaddress.ip_address(family.client).packed
    gone = [
        entry.key
        for entry in starmap(Entry, tables["conntrack"].items())
        if client in (entry.flow.source, entry.flow.destination)
        and port in (entry.flow.source_port, entry.flow.destination_port)
        and not entry.flags & NatFlags.SOURCE
    ]
    assert len(gone) == 2
    for key in gone:
        tables["conntrack"].delete(key)
    for flags in ("S", "A"):
        packet = to_pod / segment("TCP", port, target, flags)
        assert_passed(wire.ingress(packet), family.client, port, family.local_pod, target)


@pytest.mark.parametrize("frontend", ["web", "web_external", "web_balancer"])
def test_every_address_of_a_service_is_translated_for_external_clients(
    wire: Wire, family: FamilyAddresses, protocol: str, port: int, frontend: str
) -> None:
    service_port, _, target = PORTS[protocol]
    assert_passed(
        wire.ingress(
            family.ip(family.client, getattr(family, frontend)) / segment(protocol, port, service_port)
        ),
        *(family.client, port, family.remote_pod, target),
    )
    masqueraded_port(wire, family, protocol, port, family.node)


def test_external_traffic_policy_local_preserves_the_client_address(
    wire: Wire, family: FamilyAddresses, protocol: str, port: int
) -> None:
    service_port, _, target = PORTS[protocol]
    assert_passed(
        wire.ingress(family.ip(family.client, family.local_balancer) / segment(protocol, port, service_port)),
        *(family.client, port, family.local_pod, target),
    )
    assert_passed(
        wire.egress(
            family.ip(family.client, family.local_pod) / segment(protocol, port, target), "p1", iif="eth0"
        ),
        *(family.client, port, family.local_pod, target),
    )
    assert_passed(
        wire.ingress(
            family.ip(family.local_pod, family.client) / segment(protocol, target, port, "SA"), "p1"
        ),
        *(family.local_pod, target, family.client, port),
    )
    assert_passed(
        wire.egress(
            family.ip(family.local_pod, family.client) / segment(protocol, target, port, "SA"), iif="p1"
        ),
        *(family.local_balancer, service_port, family.client, port),
    )


def test_pod_to_cluster_ip_keeps_its_source_address(
    wire: Wire, family: FamilyAddresses, protocol: str, port: int
) -> None:
    """Packets of SCTP, of clients in the kernel and of sandboxed pods pass no socket hook."""
    service_port, _, target = PORTS[protocol]
    assert_passed(
        wire.ingress(family.ip(family.client_pod, family.web) / segment(protocol, port, service_port), "p2"),
        *(family.client_pod, port, family.remote_pod, target),
    )
    assert_passed(
        wire.egress(
            family.ip(family.client_pod, family.remote_pod) / segment(protocol, port, target), iif="p2"
        ),
        *(family.client_pod, port, family.remote_pod, target),
    )
    assert_passed(
        wire.egress(
            family.ip(family.remote_pod, family.client_pod) / segment(protocol, target, port, "SA"),
            "p2",
            iif="eth0",
        ),
        *(family.web, service_port, family.client_pod, port),
    )


def test_hairpin_of_a_pod_to_itself_is_masqueraded(
    wire: Wire, family: FamilyAddresses, protocol: str, port: int
) -> None:
    """Without masquerading, the pod would send the reply to itself and it would not be translated."""
    service_port, _, target = PORTS[protocol]
    assert_passed(
        wire.ingress(family.ip(family.local_pod, family.own) / segment(protocol, port, service_port), "p1"),
        *(family.local_pod, port, family.local_pod, target),
    )
    out = wire.egress(
        family.ip(family.local_pod, family.local_pod) / segment(protocol, port, target), "p1", iif="p1"
    )
    snat_port = ends_of(out.packet)[1]
    assert_passed(out, family.node_on_pods, snat_port, family.local_pod, target)
    assert_passed(
        wire.ingress(
            family.ip(family.local_pod, family.node_on_pods) / segment(protocol, target, snat_port, "SA"),
            "p1",
        ),
        *(family.local_pod, target, family.local_pod, port),
    )
    assert_passed(
        wire.egress(
            family.ip(family.local_pod, family.local_pod) / segment(protocol, target, port, "SA"),
            "p1",
            iif="p1",
        ),
        *(family.own, service_port, family.local_pod, port),
    )


def test_pod_to_load_balancer_ip_ignores_external_traffic_policy_local(
    wire: Wire, family: FamilyAddresses, protocol: str, port: int
) -> None:
    """No endpoint is local: in-cluster clients get policy Cluster."""
    service_port, _, target = PORTS[protocol]
    assert_passed(
        wire.ingress(
            family.ip(family.client_pod, family.elsewhere_balancer) / segment(protocol, port, service_port),
            "p2",
        ),
        *(family.client_pod, port, family.remote_pod, target),
    )


def test_host_packet_at_egress_is_redirected_to_the_route_of_the_backend(
    wire: Wire, family: FamilyAddresses, protocol: str, port: int
) -> None:
    """Packets of a client in the kernel are first seen at egress, with the frontend's address.

    A direct connection to the backend may have the same source port: the flow gets one that no socket of the
    host has, unless it is a reserved port, which servers may require.
    """
    service_port, _, target = PORTS[protocol]
    reserved = port % 1000 + 1
    for own in (port, reserved):
        out = wire.egress(family.ip(family.node, family.web) / segment(protocol, own, service_port))
        assert out.verdict == REDIRECT
        seen = ends_of(out.packet)[1]
        assert ends_of(out.packet) == (family.node, seen, family.remote_pod, target)
        assert (seen == own) is (own == reserved)
        assert with_right_checksums(out.packet) == out.bytes
        assert_passed(
            wire.ingress(family.ip(family.remote_pod, family.node) / segment(protocol, target, seen, "SA")),
            *(family.web, service_port, family.node, own),
        )


def test_host_packet_from_a_link_local_address_is_masqueraded(wire: Wire, protocol: str, port: int) -> None:
    """The kernel's helper finds no route from such an address: the backend is not on this node for that."""
    service_port, _, target = PORTS[protocol]
    local = "fe80::7"
    request = V6.ip(local, V6.web) / segment(protocol, port, service_port)
    result = wire.egress(request)
    source, snat_port, *backend = ends_of(result.packet)
    assert (result.verdict, source, backend) == (REDIRECT, V6.node, [V6.remote_pod, target])
    assert with_right_checksums(result.packet) == result.bytes
    reply = V6.ip(V6.remote_pod, V6.node) / segment(protocol, target, snat_port, "SA")
    assert_passed(wire.ingress(reply), V6.web, service_port, local, port)


def test_host_to_a_local_pod_gets_the_source_address_of_the_pods_device(
    wire: Wire, family: FamilyAddresses, protocol: str, port: int
) -> None:
    service_port, _, target = PORTS[protocol]
    out = wire.egress(family.ip(family.node, family.own) / segment(protocol, port, service_port))
    assert out.verdict == REDIRECT
    source = ends_of(out.packet)
    assert source == (family.node_on_pods, source[1], family.local_pod, target)
    assert_passed(
        wire.ingress(
            family.ip(family.local_pod, family.node_on_pods) / segment(protocol, target, source[1], "SA"),
            "p1",
        ),
        *(family.own, service_port, family.node, port),
    )


def test_later_packets_of_a_flow_keep_its_backend(
    wire: Wire, family: FamilyAddresses, protocol: str, port: int
) -> None:
    service_port, _, target = PORTS[protocol]
    for flags in ("S", "A", "PA", "FA"):
        assert_passed(
            wire.ingress(family.ip(family.client, family.web) / segment(protocol, port, service_port, flags)),
            *(family.client, port, family.remote_pod, target),
        )


def test_masqueraded_flow_keeps_its_source_port(
    wire: Wire, family: FamilyAddresses, protocol: str, port: int
) -> None:
    wire.ingress(family.ip(family.client, family.node) / segment(protocol, port, PORTS[protocol][1]))
    found = {masqueraded_port(wire, family, protocol, port, family.node) for _ in range(3)}
    assert len(found) == 1


def test_two_clients_with_the_same_source_port_get_distinct_ports(
    wire: Wire, family: FamilyAddresses, protocol: str, port: int
) -> None:
    _, node_port, target = PORTS[protocol]
    snat_ports = {}
    for client in (family.client, family.other_client):
        wire.ingress(family.ip(client, family.node) / segment(protocol, port, node_port))
        out = wire.egress(family.ip(client, family.remote_pod) / segment(protocol, port, target), iif="eth0")
        snat_ports[client] = ends_of(out.packet)[1]
    assert len(set(snat_ports.values())) == 2
    for client, snat_port in snat_ports.items():
        assert_passed(
            wire.ingress(
                family.ip(family.remote_pod, family.node) / segment(protocol, target, snat_port, "SA")
            ),
            *(family.remote_pod, target, client, port),
        )


def test_one_client_port_to_two_frontends_of_one_backend_gets_distinct_source_ports(
    wire: Wire, family: FamilyAddresses, protocol: str, port: int
) -> None:
    """The backend would see one connection twice: the second gets another port at the first hook."""
    service_port, node_port, target = PORTS[protocol]
    flows = []
    for frontend, dport in ((family.web, service_port), (family.node, node_port)):
        out = wire.ingress(family.ip(family.client, frontend) / segment(protocol, port, dport))
        source_port = ends_of(out.packet)[1]
        assert_passed(out, family.client, source_port, family.remote_pod, target)
        flows.append((frontend, dport, source_port))
    assert len({source_port for _, _, source_port in flows}) == 2
    for frontend, dport, source_port in flows:
        assert_passed(
            wire.egress(
                family.ip(family.remote_pod, family.client) / segment(protocol, target, source_port, "SA"),
                iif="eth0",
            ),
            *(frontend, dport, family.client, port),
        )


def test_masqueraded_flows_have_distinct_source_ports(
    wire: Wire, family: FamilyAddresses, new_port: Callable[[], int]
) -> None:
    found = set()
    for _ in range(1000):
        port = new_port()
        wire.ingress(family.ip(family.client, family.node) / segment("TCP", port, PORTS["TCP"][1]))
        source = masqueraded_port(wire, family, "TCP", port, family.node)
        # A flow without a reply expires after 60 s at most, which an emulator needs for fewer flows.
        reply = family.ip(family.remote_pod, family.node) / segment("TCP", PORTS["TCP"][2], source, "SA")
        assert ends_of(wire.ingress(reply).packet)[2:] == (family.client, port)
        found.add(source)
    assert len(found) == 1000
    assert min(found) >= 1024
    assert max(found) < 15000, "this is in ip_local_port_range of the node"


def test_syn_from_a_reused_port_after_fin_creates_a_new_flow(
    wire: Wire, family: FamilyAddresses, port: int
) -> None:
    """A SYN from the same port after FIN of both sides replaces the entries of the closed flow."""
    original = family.ip(family.client, family.local_balancer)
    reply = family.ip(family.local_pod, family.client)
    wire.ingress(original / segment("TCP", port, 80, "S"))
    wire.egress(reply / segment("TCP", 8080, port, "SA"), iif="p1")
    wire.ingress(original / TCP(sport=port, dport=80, flags="FA", seq=2000, ack=1000))
    wire.egress(reply / TCP(sport=8080, dport=port, flags="FA", seq=1000, ack=2001), iif="p1")
    assert_passed(
        wire.ingress(original / segment("TCP", port, 80, "S")), family.client, port, family.local_pod, 8080
    )
    assert_passed(
        wire.egress(reply / segment("TCP", 8080, port, "SA"), iif="p1"),
        *(family.local_balancer, 80, family.client, port),
    )


def test_client_address_is_kept_after_a_masqueraded_flow_from_the_same_port(
    wire: Wire, family: FamilyAddresses, port: int
) -> None:
    """The second flow, to the same backend, leaves with the client's address (externalTrafficPolicy Local)."""
    to_pod, to_client = family.ip(family.client, family.local_pod), family.ip(family.local_pod, family.client)
    to_node = family.ip(family.local_pod, family.node_on_pods)
    opening = to_pod / segment("TCP", port, 8080, "S")
    assert_passed(
        wire.ingress(family.ip(family.client, family.own) / segment("TCP", port, 80, "S")),
        *(family.client, port, family.local_pod, 8080),
    )
    source = ends_of(wire.egress(opening, "p1", iif="eth0").packet)
    assert source[0] == family.node_on_pods
    # The backend resets the first connection.
    reset = TCP(sport=8080, flags="RA", seq=0, ack=1001 + len(PAYLOAD))
    reset.dport = source[1]
    wire.ingress(to_node / reset, "p1")
    reset.dport = port
    wire.egress(to_client / reset, iif="p1")

    assert_passed(
        wire.ingress(family.ip(family.client, family.local_balancer) / segment("TCP", port, 80, "S")),
        *(family.client, port, family.local_pod, 8080),
    )
    for flags in ("S", "A"):
        assert_passed(
            wire.egress(to_pod / segment("TCP", port, 8080, flags), "p1", iif="eth0"),
            *(family.client, port, family.local_pod, 8080),
        )
    assert_passed(
        wire.egress(to_client / segment("TCP", 8080, port, "SA"), iif="p1"),
        *(family.local_balancer, 80, family.client, port),
    )
