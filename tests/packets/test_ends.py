"""Which RST and FIN end a flow: those that their receiver takes for the connection's (RFC 5961, 3.2)."""

from __future__ import annotations

import ipaddress

import pytest
from scapy.layers.inet import TCP

from ebpfproxy.datapath.flows.conntrack_table import Timeouts, flows_of
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.services.model import format_endpoint
from tests.packets.test_flows import PAYLOAD, ends
from tests.packets.wire import PASS, Wire
from tests.packets.world import Side

pytestmark = pytest.mark.root

#: Initial sequence numbers; the backend's wraps round within the first segment.
CLIENT, BACKEND = 3_000_000_000, 0xFFFFFFFC
ASKED, ANSWERED = CLIENT + 1 + len(PAYLOAD), (BACKEND + 1 + len(PAYLOAD)) & 0xFFFFFFFF


class Connection:
    """A client outside, a NodePort, and a backend on the other node: all four entries."""

    def __init__(self, wire: Wire, side: Side, port: int, tables: MapSet) -> None:
        self.wire, self.side, self.port, self.tables = wire, side, port, tables
        self.stands = 0

    def ask(self, flags: str, seq: int, ack: int = 0, payload: bytes = b"") -> None:
        """From the client, in at one hook and out at the other; both let it pass translated."""
        side = self.side
        tcp = TCP(sport=self.port, dport=30080, flags=flags, seq=seq, ack=ack) / payload
        into = self.wire.arrive(side.ip(side.client, side.node) / tcp)
        assert into.verdict == PASS
        assert ends(into.packet) == (side.client, self.port, side.remote_pod, 8080)
        tcp[TCP].dport = 8080
        out = self.wire.leave(side.ip(side.client, side.remote_pod) / tcp, came_by="eth0")
        assert out.verdict == PASS
        assert ends(out.packet)[0] == side.node
        self.stands = ends(out.packet)[1]

    def answer(self, flags: str, seq: int, ack: int = 0, payload: bytes = b"") -> None:
        side = self.side
        tcp = TCP(sport=8080, dport=self.stands, flags=flags, seq=seq, ack=ack) / payload
        into = self.wire.arrive(side.ip(side.remote_pod, side.node) / tcp)
        assert ends(into.packet) == (side.remote_pod, 8080, side.client, self.port)
        tcp[TCP].dport = self.port
        out = self.wire.leave(side.ip(side.remote_pod, side.client) / tcp, came_by="eth0")
        assert ends(out.packet) == (side.node, 30080, side.client, self.port)

    def establish(self) -> Connection:
        self.ask("S", CLIENT)
        self.answer("SA", BACKEND, CLIENT + 1)
        self.ask("PA", CLIENT + 1, BACKEND + 1, PAYLOAD)
        self.answer("PA", BACKEND + 1, ASKED, PAYLOAD)
        self.ask("A", ASKED, ANSWERED)
        return self

    @property
    def states(self) -> tuple[str, int]:
        """The flow's state, and how many of its four entries have the end that it has."""
        entries = list(self.tables["conntrack"].items())
        client = self.side.client
        for row, keys in flows_of(entries, Timeouts(), 0, {}):
            if row.client == _endpoint(client, self.port):
                seen = [value[45] & ~1 for key, value in entries if key in keys]
                return row.state, seen.count(max(seen))
        raise AssertionError("there is no such flow")


def _endpoint(address: str, port: int) -> str:
    return format_endpoint(ipaddress.ip_address(address).packed, port)


@pytest.fixture
def begun(wire: Wire, side: Side, port: int, tables: MapSet) -> Connection:
    return Connection(wire, side, port, tables)


@pytest.fixture
def connection(begun: Connection) -> Connection:
    return begun.establish()


@pytest.mark.parametrize("flags", ["R", "RA"])
def test_a_clients_reset_ends_all_entries(connection: Connection, flags: str) -> None:
    connection.ask(flags, ASKED, ANSWERED)
    assert connection.states == ("CLOSE", 4)


def test_a_backends_reset_ends_all_entries(connection: Connection) -> None:
    connection.answer("R", ANSWERED)
    assert connection.states == ("CLOSE", 4)


@pytest.mark.parametrize("off", [1, -1, 1000, -1000, 1 << 20, 1 << 31])
@pytest.mark.parametrize("flags", ["R", "RA", "FA"])
def test_a_stray_end_of_either_side_ends_nothing(connection: Connection, flags: str, off: int) -> None:
    """It still passes: its receiver judges. A FIN ahead of the data may be a late one, within a window."""
    if flags == "FA" and off > 0:
        off = off | 1 << 30
    connection.ask(flags, (ASKED + off) & 0xFFFFFFFF, ANSWERED)
    connection.answer(flags, (ANSWERED + off) & 0xFFFFFFFF, ASKED)
    assert connection.states == ("ESTABLISHED", 4)
    # What it showed is not believed either: the right one still ends the flow.
    connection.answer("R", ANSWERED)
    assert connection.states == ("CLOSE", 4)


def test_a_reset_behind_data_that_is_under_way_ends_the_flow(connection: Connection) -> None:
    """Its sequence number is past what the receiver has acknowledged, but not past what was sent."""
    connection.answer("PA", ANSWERED, ASKED, PAYLOAD)
    connection.answer("PA", ANSWERED + len(PAYLOAD), ASKED, PAYLOAD)
    connection.answer("PA", ANSWERED, ASKED, PAYLOAD)
    connection.answer("RA", ANSWERED + 2 * len(PAYLOAD), ASKED)
    assert connection.states == ("CLOSE", 4)


def test_a_reset_answers_a_syn_by_what_it_acknowledges(begun: Connection) -> None:
    begun.ask("S", CLIENT)
    begun.answer("RA", 0, CLIENT + 77)
    begun.answer("R", CLIENT + 1)
    assert begun.states[0] == "ESTABLISHED", "an answer, but none to this SYN"
    begun.answer("RA", 0, CLIENT + 1)
    assert begun.states == ("CLOSE", 4)


def test_a_client_that_uses_its_port_again_may_be_reset(connection: Connection) -> None:
    """The client had lost the connection unseen; its new SYN is judged by its own numbers."""
    connection.ask("S", 5000)
    connection.answer("RA", 0, 5001)
    assert connection.states == ("CLOSE", 4)


def test_fins_of_both_sides_close(connection: Connection) -> None:
    connection.ask("FA", ASKED, ANSWERED)
    assert connection.states == ("CLOSE_WAIT", 4)
    connection.answer("FA", ANSWERED, ASKED + 1)
    assert connection.states == ("TIME_WAIT", 4)


def test_a_fin_that_is_sent_again_with_older_data_closes(connection: Connection) -> None:
    """The acknowledgement of the data was lost behind this node: TCP sends it in one segment with the end."""
    connection.ask("FPA", ASKED - len(PAYLOAD), ANSWERED, PAYLOAD + b"more")
    assert connection.states == ("CLOSE_WAIT", 4)
    connection.answer("FPA", (ANSWERED - len(PAYLOAD)) & 0xFFFFFFFF, ASKED + 5, PAYLOAD)
    assert connection.states == ("TIME_WAIT", 4)


def test_a_stray_segment_does_not_hide_the_connections_end(connection: Connection) -> None:
    """A segment of quite other numbers is answered with the right ones, and those count again."""
    connection.ask("A", 7, 9)
    connection.answer("A", ANSWERED, ASKED)
    connection.ask("A", ASKED, ANSWERED)
    connection.answer("R", ANSWERED)
    assert connection.states == ("CLOSE", 4)
