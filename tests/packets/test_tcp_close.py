"""Which RST and FIN close a flow: those that the receiver accepts for the connection (RFC 5961, 3.2)."""

from __future__ import annotations

import ipaddress

import pytest
from scapy.layers.inet import TCP

from ebpfproxy.datapath.abi.flow_layout import Seen
from ebpfproxy.datapath.flows.conntrack_table import Timeouts, flows_of
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.services.model import format_endpoint
from tests.packets.flow_slots import FlowSlots
from tests.packets.packet_cluster import FamilyAddresses
from tests.packets.test_flows import PAYLOAD, ends_of
from tests.packets.wire import PASS, Wire

pytestmark = pytest.mark.root

#: Initial sequence numbers; the backend's wraps around within the first segment.
CLIENT_ISN, BACKEND_ISN = 3_000_000_000, 0xFFFFFFFC
#: The next sequence numbers after one segment of data from each side.
CLIENT_NEXT, BACKEND_NEXT = CLIENT_ISN + 1 + len(PAYLOAD), (BACKEND_ISN + 1 + len(PAYLOAD)) & 0xFFFFFFFF


class Connection:
    """A TCP connection of an external client to a NodePort with a remote backend: four conntrack entries."""

    def __init__(self, wire: Wire, family: FamilyAddresses, port: int, tables: MapSet) -> None:
        self.wire, self.family, self.port, self.tables = wire, family, port, tables
        self.snat_port = 0

    def original(self, flags: str, seq: int, ack: int = 0, payload: bytes = b"") -> None:
        """Runs a segment of the client through ingress and egress; both pass it, translated."""
        family = self.family
        tcp = TCP(sport=self.port, dport=30080, flags=flags, seq=seq, ack=ack) / payload
        ingress = self.wire.ingress(family.ip(family.client, family.node) / tcp)
        assert ingress.verdict == PASS
        assert ends_of(ingress.packet) == (family.client, self.port, family.remote_pod, 8080)
        tcp[TCP].dport = 8080
        egress = self.wire.egress(family.ip(family.client, family.remote_pod) / tcp, iif="eth0")
        assert egress.verdict == PASS
        assert ends_of(egress.packet)[0] == family.node
        self.snat_port = ends_of(egress.packet)[1]

    def reply(self, flags: str, seq: int, ack: int = 0, payload: bytes = b"") -> None:
        """Runs a segment of the backend through ingress and egress; both pass it, translated."""
        family = self.family
        tcp = TCP(sport=8080, dport=self.snat_port, flags=flags, seq=seq, ack=ack) / payload
        ingress = self.wire.ingress(family.ip(family.remote_pod, family.node) / tcp)
        assert ends_of(ingress.packet) == (family.remote_pod, 8080, family.client, self.port)
        tcp[TCP].dport = self.port
        egress = self.wire.egress(family.ip(family.remote_pod, family.client) / tcp, iif="eth0")
        assert ends_of(egress.packet) == (family.node, 30080, family.client, self.port)

    def establish(self) -> Connection:
        self.original("S", CLIENT_ISN)
        self.reply("SA", BACKEND_ISN, CLIENT_ISN + 1)
        self.original("PA", CLIENT_ISN + 1, BACKEND_ISN + 1, PAYLOAD)
        self.reply("PA", BACKEND_ISN + 1, CLIENT_NEXT, PAYLOAD)
        self.original("A", CLIENT_NEXT, BACKEND_NEXT)
        return self

    @property
    def states(self) -> tuple[str, int]:
        """The flow's state, and how many of its four entries have the flags of that state."""
        # All four have the client's port in key or value. Other tests have left thousands of entries.
        port, client = self.port.to_bytes(2, "big"), self.family.client
        entries = [
            entry for entry in self.tables["conntrack"].items() if port in entry[0] or port in entry[1]
        ]
        for row, keys in flows_of(entries, Timeouts(), 0, {}):
            if row.client == _endpoint(client, self.port):
                seen = [value[45] & ~(Seen.REPLY | Seen.MASKED) for key, value in entries if key in keys]
                return row.state, seen.count(max(seen))
        raise AssertionError("there is no such flow")


def _endpoint(address: str, port: int) -> str:
    return format_endpoint(ipaddress.ip_address(address).packed, port)


@pytest.fixture
def new_connection(wire: Wire, family: FamilyAddresses, port: int, tables: MapSet) -> Connection:
    return Connection(wire, family, port, tables)


@pytest.fixture
def connection(new_connection: Connection) -> Connection:
    return new_connection.establish()


@pytest.mark.parametrize("flags", ["R", "RA"])
def test_client_rst_closes_all_four_entries(connection: Connection, flags: str) -> None:
    connection.original(flags, CLIENT_NEXT, BACKEND_NEXT)
    assert connection.states == ("CLOSE", 4)


def test_backend_rst_closes_all_four_entries(connection: Connection) -> None:
    connection.reply("R", BACKEND_NEXT)
    assert connection.states == ("CLOSE", 4)


@pytest.mark.parametrize("off", [1, -1, 1000, -1000, 1 << 20, 1 << 31])
@pytest.mark.parametrize("flags", ["R", "RA", "FA"])
def test_rst_or_fin_with_a_wrong_sequence_number_is_forwarded_and_closes_nothing(
    connection: Connection, flags: str, off: int
) -> None:
    """The receiver decides. A FIN that is ahead by less than a window may have overtaken data."""
    if flags == "FA" and off > 0:
        off = off | 1 << 30
    connection.original(flags, (CLIENT_NEXT + off) & 0xFFFFFFFF, BACKEND_NEXT)
    connection.reply(flags, (BACKEND_NEXT + off) & 0xFFFFFFFF, CLIENT_NEXT)
    assert connection.states == ("ESTABLISHED", 4)
    # The wrong numbers are not stored either: an RST with the right number still closes the flow.
    connection.reply("R", BACKEND_NEXT)
    assert connection.states == ("CLOSE", 4)


def test_rst_after_unacknowledged_data_closes_the_flow(connection: Connection) -> None:
    """Its sequence number is greater than what the receiver has acknowledged, but not than what was sent."""
    connection.reply("PA", BACKEND_NEXT, CLIENT_NEXT, PAYLOAD)
    connection.reply("PA", BACKEND_NEXT + len(PAYLOAD), CLIENT_NEXT, PAYLOAD)
    connection.reply("PA", BACKEND_NEXT, CLIENT_NEXT, PAYLOAD)
    connection.reply("RA", BACKEND_NEXT + 2 * len(PAYLOAD), CLIENT_NEXT)
    assert connection.states == ("CLOSE", 4)


def test_rst_in_syn_sent_has_to_acknowledge_the_syn(new_connection: Connection) -> None:
    new_connection.original("S", CLIENT_ISN)
    new_connection.reply("RA", 0, CLIENT_ISN + 77)
    new_connection.reply("R", CLIENT_ISN + 1)
    assert new_connection.states[0] == "SYN_RECV", "this RST does not acknowledge the SYN"
    new_connection.reply("RA", 0, CLIENT_ISN + 1)
    assert new_connection.states == ("CLOSE", 4)


def test_rst_for_a_syn_from_a_reused_port_closes_the_flow(connection: Connection) -> None:
    """The client lost the connection without a FIN or RST; the numbers of its new SYN count from then on."""
    connection.original("S", 5000)
    connection.reply("RA", 0, 5001)
    assert connection.states == ("CLOSE", 4)


def test_fin_of_both_sides_leads_to_time_wait(connection: Connection) -> None:
    connection.original("FA", CLIENT_NEXT, BACKEND_NEXT)
    assert connection.states == ("CLOSE_WAIT", 4)
    connection.reply("FA", BACKEND_NEXT, CLIENT_NEXT + 1)
    assert connection.states == ("TIME_WAIT", 4)


def test_retransmitted_fin_with_data_closes(connection: Connection) -> None:
    """The ACK of the data was lost after this node, so that TCP sends data and FIN in one segment."""
    connection.original("FPA", CLIENT_NEXT - len(PAYLOAD), BACKEND_NEXT, PAYLOAD + b"more")
    assert connection.states == ("CLOSE_WAIT", 4)
    connection.reply("FPA", (BACKEND_NEXT - len(PAYLOAD)) & 0xFFFFFFFF, CLIENT_NEXT + 5, PAYLOAD)
    assert connection.states == ("TIME_WAIT", 4)


def test_out_of_window_segment_does_not_keep_a_later_rst_from_closing(connection: Connection) -> None:
    """The peer answers a segment with wrong numbers with the right ones, which count again."""
    connection.original("A", 7, 9)
    connection.reply("A", BACKEND_NEXT, CLIENT_NEXT)
    connection.original("A", CLIENT_NEXT, BACKEND_NEXT)
    connection.reply("R", BACKEND_NEXT)
    assert connection.states == ("CLOSE", 4)


def test_connection_that_begins_anew_has_no_copy_of_the_former_one(connection: Connection) -> None:
    """A CPU that is late with a packet of the former connection may have put its entries into the flow cache."""
    slots = FlowSlots(connection.tables)
    port, client = connection.port.to_bytes(2, "big"), ipaddress.ip_address(connection.family.client).packed
    keys = [
        key
        for key, value in connection.tables["conntrack"].items()
        if client in key + value and port in (key[32:34], key[34:36], value[34:36])
    ]
    assert len(keys) == 4

    def send() -> None:
        connection.original("A", CLIENT_NEXT, BACKEND_NEXT)
        connection.reply("A", BACKEND_NEXT, CLIENT_NEXT)

    slots.admit_by(keys, send)
    copies = {key: slots.value(key) for key in keys}
    connection.reply("R", BACKEND_NEXT)
    assert connection.states == ("CLOSE", 4)
    for key, copy in copies.items():
        assert copy is not None
        slots.store(key, copy)
    # This inserts the entries of both directions.
    connection.original("S", 5000)
    assert [slots.value(key) for key in keys] == [None] * 4
